"""Every case records unchanged, and its responses are those of real weighted retraining."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import RecordingError
from lightning_dtda.estimators import InfluenceFunctions
from lightning_dtda.replay import Replay, training_examples
from tests.zoo.cases import CASES, RANDOM_ITEMS, REFUSED

DROPOUT_INSIDE_CUDNN = {"packed_lstm"}
"""On a GPU, cuDNN draws what these drop out."""

STEP = 1e-7
"""Change of the weights: below the distance to the next kink of a ReLU, mostly."""

TOLERANCES = {
    "gin": (1e-5, 1e-3),
    "tabular": (1e-5, 5e-3),
    "gpt2": (1e-3, 1e-3),
    "gpt2_lora": (1e-3, 1e-3),
}
"""Other changes of the weights, and tolerances. GIN and the tabular network have biases in front of BatchNorm, whose
gradients are rounding that Adam makes steps of. The causal language model computes its loss in float32."""

STEPS_OF_ROUNDING = {"gin", "tabular"}
"""Those with such biases: on a GPU, sums round otherwise each time, and so no two trainings are alike."""

ON_A_GPU = 10
"""Times the tolerance there: other inputs are close to a kink."""


def projected(module, batch):
    """A fixed random combination of the parameters: what the training made of them, and nothing of the query."""
    parameters = torch.cat([parameter.reshape(-1) for parameter in module.parameters()])
    weights = torch.randn(len(parameters), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (parameters * weights.to(parameters)).sum().reshape(1)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}
"""What Lightning calls torch's devices."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request, case, monkeypatch):
    """On a GPU, with kernels that draw nothing inside: that these are refused has a test of its own."""
    if request.param == "cpu":
        yield "cpu"
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", case.name not in DROPOUT_INSIDE_CUDNN)
    with sdpa_kernel(SDPBackend.MATH):
        yield "cuda"
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def recorded(case, device, tmp_path):
    """Two recorded runs in float64, and a module and data to attribute them with."""
    if case.name in REFUSED:
        pytest.skip("refused, with the reason: see the test of that")
    batches = "store" if case.name in RANDOM_ITEMS else "indices"
    for seed in range(2):
        module, data = _made(case, seed)
        recorder = TrajectoryRecorder(tmp_path, batches=batches)
        case.trainer(recorder, precision="64-true", accelerator=ACCELERATORS[device], devices=1).fit(module, data)
    return Ensemble.open(tmp_path), *_made(case, 0)


def _made(case, seed):
    module, data = case.make(seed, float64=True)
    if case.float32_inside:
        # Adam divides by gradients that are near zero at first, which rounding to float32 makes other numbers of
        module.configure_optimizers = lambda: torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad], lr=0.1
        )
    return module, data


@pytest.mark.slow
def test_responses_are_those_of_weighted_retraining(case, device, recorded):
    if device == "cuda" and case.name in STEPS_OF_ROUNDING:
        pytest.skip("two trainings with the same weights differ")
    ensemble, module, data = recorded
    queries = Subset(case.queries(), range(2))
    attribution = attribute(
        ensemble,
        module,
        data,
        queries=queries,
        measurement=projected,
        estimator=UnrolledDifferentiation(horizon=None),
        device=device,
        progress=False,
    )
    responses = attribution.responses[:, 0].double()
    assert responses.abs().max() > 0
    replay = Replay([*ensemble], module, training_examples(data), precision="float64", device=device)
    step, tolerance = TOLERANCES.get(case.name, (STEP, 1e-5))
    weights = torch.randn(responses.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for change in (step, -step, 2 * step, -2 * step):
        theta, buffers = replay.retrain((1 + change * weights).to(device))
        values.append(_projections(module, replay.layout, theta, buffers).cpu())
    differences = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
    error = (differences + (responses * weights).sum(1)).norm() / responses.norm()
    assert error < (tolerance if device == "cpu" else ON_A_GPU * tolerance)


def _projections(module, layout, theta, buffers):
    """The same combination of the retrained parameters, in the order of the module's."""
    found = []
    for run, vector in enumerate(theta):
        parameters = layout.unflatten(vector)
        parts = [
            parameters[name] if name in parameters else buffers[name][run] for name, _ in module.named_parameters()
        ]
        flat = torch.cat([part.reshape(-1) for part in parts])
        weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append((flat * weights.to(flat)).sum())
    return torch.stack(found)


@pytest.mark.slow
def test_influence_functions_answer(case, device, recorded):
    ensemble, module, data = recorded
    if case.name == "contrastive":
        pytest.skip("the contrastive loss of one image alone is zero")
    queries = Subset(case.queries(), [0])
    found = attribute(
        ensemble, module, data, queries=queries, estimator=InfluenceFunctions(), device=device, progress=False
    )
    assert found.responses.isfinite().all()
    assert found.responses.abs().max() > 0


@needs_gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_answers_on_a_gpu_in_the_precision_of_the_training(case, device, precision, tmp_path):
    if case.name in REFUSED:
        pytest.skip("refused, with the reason: see the test of that")
    module, data = case.make(0)
    recorder = TrajectoryRecorder(tmp_path, batches="store" if case.name in RANDOM_ITEMS else "indices")
    case.trainer(recorder, precision=precision, accelerator=ACCELERATORS[device], devices=1).fit(module, data)
    module, data = case.make(0)
    queries = Subset(case.queries(), range(2))
    ensemble = Ensemble.open(tmp_path)
    found = attribute(
        ensemble, module, data, queries=queries, measurement=projected, device=device, progress=False
    ).responses
    assert found.isfinite().all()
    assert found.abs().max() > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_attributed_is_refused_before_the_training(name, tmp_path):
    case = CASES[name]
    case.skip_unless_installed()
    module, data = case.make(0)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    with pytest.raises(RecordingError, match=REFUSED[name]):
        case.trainer(TrajectoryRecorder(tmp_path)).fit(module, data)
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
