"""LSTMs by hand, against torch's own differentiated twice by autograd; what is not done by hand goes by torch's own."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_dtda.replay.kernels import enabled_kernels, using_kernels
from lightning_dtda.replay.recurrent import twice_differentiable_recurrence
from tests.replay.steps import normal

B, T, F, H = 4, 5, 3, 6
FUNCTIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
EXACT = 1e-12  # relative; the same sums in another order, in double precision
SINGLE = 1e-5  # the same in single precision

OPTIONS = {
    "plain": {},
    "time first": {"batch_first": False},
    "layers with dropout": {"num_layers": 3, "dropout": 0.4},
    "both directions": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "no biases": {"bias": False, "num_layers": 2},
}


def lstm(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return nn.LSTM(F, H, **{"batch_first": True} | options).to(dtype)


def tensors_of(result):
    """Return outputs and states, whatever the kind of the layer."""
    outputs, states = result
    outputs = outputs.data if isinstance(outputs, PackedSequence) else outputs
    return [outputs, *(states if isinstance(states, tuple) else [states])]


def derivatives(layer, arguments, by, used=slice(None), prepare=lambda results: results):
    """Return results, a gradient, and its derivative along a direction."""
    torch.manual_seed(1)
    results = prepare(tensors_of(layer(*arguments)))
    loss = sum((one.tanh() * normal(*one.shape, seed=7).to(one)).sum() for one in results[used])
    first = grad(loss, by, create_graph=True)
    along = [normal(*one.shape, seed=number).to(one) for number, one in enumerate(by)]
    return [*results, *first, *grad(first, by, along, allow_unused=True, materialize_grads=True)]


def compare(layer, arguments, by, tolerance=EXACT, **how):
    with using_kernels(set(enabled_kernels()) - {"mkldnn", "cudnn"}):
        expected = derivatives(layer, arguments, by, **how)
    with twice_differentiable_recurrence():
        found = derivatives(layer, arguments, by, **how)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)], ids=str)
@pytest.mark.parametrize("starts", [False, True], ids=["from zero", "from states"])
def test_both_derivatives_are_those_of_torchs_own_layer(options, dtype, tolerance, starts):
    layer = lstm(dtype, **options)
    x = normal(B, T, F).to(dtype).requires_grad_()
    count = layer.num_layers * (1 + layer.bidirectional)
    batch = B if layer.batch_first else T
    states = [normal(count, batch, H, seed=seed).to(dtype).requires_grad_() for seed in (2, 3)] if starts else []
    arguments = (x, tuple(states)) if starts else (x,)
    compare(layer, arguments, [x, *states, *layer.parameters()], tolerance)


@pytest.mark.parametrize("used", [0, 1, 2], ids=["outputs", "last outputs", "last cells"])
def test_a_loss_may_use_some_of_the_results(used):
    layer = lstm(num_layers=2)
    compare(layer, (normal(B, T, F),), list(layer.parameters()), used=slice(used, used + 1))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_hh_l1"])
def test_weights_may_be_frozen(frozen):
    layer = lstm(num_layers=2)
    layer.get_parameter(frozen).requires_grad_(False)
    x = normal(B, T, F).requires_grad_()
    compare(layer, (x,), [x, *(one for one in layer.parameters() if one.requires_grad)])


def test_only_the_states_it_starts_from_may_be_trained():
    layer = lstm().requires_grad_(False)
    states = [normal(1, B, H, seed=seed).requires_grad_() for seed in (2, 3)]
    compare(layer, (normal(B, T, F), tuple(states)), states)


def test_sequences_without_a_batch_and_of_one_step():
    layer = lstm()
    for x in (normal(T, F), normal(B, 1, F)):
        compare(layer, (x,), list(layer.parameters()))


def test_the_results_may_be_changed_in_place():
    layer = lstm(num_layers=2)
    compare(
        layer,
        (normal(B, T, F),),
        list(layer.parameters()),
        prepare=lambda results: [one.mul_(2) for one in results],
    )


OTHERS = {
    "projection": lambda: (lstm(proj_size=2), normal(B, T, F)),
    "packed": lambda: (lstm(num_layers=2), pack_padded_sequence(normal(B, T, F), [5, 4, 4, 1], batch_first=True)),
    "GRU": lambda: (nn.GRU(F, H, 2, bidirectional=True).double(), normal(B, T, F)),
    "packed GRU": lambda: (nn.GRU(F, H).double(), pack_padded_sequence(normal(T, B, F), [5, 4, 4, 1])),
    "tanh": lambda: (nn.RNN(F, H).double(), normal(B, T, F)),
    "relu": lambda: (nn.RNN(F, H, nonlinearity="relu").double(), normal(B, T, F)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=list(OTHERS))
def test_other_layers_go_by_torchs_plain_kernels(make):
    layer, x = make()
    compare(layer, (x,), list(layer.parameters()), tolerance=0)


def test_torchs_own_layers_are_back_afterwards():
    before = {name: getattr(torch._VF, name) for name in FUNCTIONS}
    with suppress(ValueError), twice_differentiable_recurrence():
        assert all(getattr(torch._VF, name) != before[name] for name in FUNCTIONS)
        raise ValueError
    assert all(getattr(torch._VF, name) == before[name] for name in FUNCTIONS)


@pytest.mark.parametrize("used", [slice(None), slice(1), slice(2, None)], ids=["all", "outputs", "last cells"])
def test_a_loss_may_have_a_gradient_in_it(used):
    """Which makes a third derivative of what is asked of it."""

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lstm(num_layers=2, bidirectional=True)

        def forward(self, x):
            results = tensors_of(self.layer(x))
            slopes = grad(sum(one.sin().sum() for one in results[used]), x, create_graph=True)
            return slopes[0] ** 2, results[0]

    module = Penalised()
    compare(module, (normal(B, T, F).requires_grad_(),), list(module.parameters()))
