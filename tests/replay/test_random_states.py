"""Every generator that a step may draw from is put back to where it was, and draws what it drew then."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay import random_states
from lightning_dtda.replay.random_states import DrawnIn, Generators, drawn_from

CPU = torch.device("cpu")


class Drawing(nn.Module):
    """Has generators of its own, one of them in a submodule and one under two names."""

    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(1)
        self.rng = np.random.default_rng(2)
        self.layer = nn.Linear(2, 2)
        self.layer.old = np.random.RandomState(3)
        self.layer.coin = random.Random(4)
        self.again = self.noise


# by name, in the order of the submodules
DRAWS = {
    "cpu": lambda module: torch.randn(3).tolist(),
    "numpy": lambda module: np.random.rand(3).tolist(),
    "python": lambda module: [random.random() for _ in range(3)],
    "own.0": lambda module: torch.rand(3, generator=module.noise).tolist(),
    "own.1": lambda module: module.rng.normal(size=3).tolist(),
    "own.2": lambda module: module.layer.old.randn(3).tolist(),
    "own.3": lambda module: [module.layer.coin.gauss(0, 1) for _ in range(3)],
}


@pytest.fixture
def module():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return Drawing()


def everything(module):
    return {name: draw(module) for name, draw in DRAWS.items()}


def test_all_generators_draw_again_what_they_drew(module):
    generators = Generators(module, CPU)
    everything(module)  # not at the start of any
    states = generators.states()
    assert sorted(states) == sorted(DRAWS)
    drawn = everything(module)
    assert everything(module) != drawn
    generators.set(states)
    assert everything(module) == drawn


def test_a_normal_number_that_is_kept_for_the_next_call_comes_again(module):
    generators = Generators(module, CPU)
    draws = {
        "numpy": lambda: np.random.randn(),  # numpy draws two at once, and keeps one
        "python": lambda: random.gauss(0, 1),
        "own.2": lambda: module.layer.old.randn(),
        "own.3": lambda: module.layer.coin.gauss(0, 1),
    }
    for draw in draws.values():
        draw()  # from here on, each of them keeps one
    states = generators.states()
    drawn = {name: [draw() for _ in range(3)] for name, draw in draws.items()}
    generators.set(states)
    assert {name: [draw() for _ in range(3)] for name, draw in draws.items()} == drawn
    for name, draw in draws.items():  # the kept number alone leaves a trace in the state
        generators.set(states)
        draw()
        assert list(drawn_from(states, generators.states())) == [name]


@pytest.mark.parametrize("name", DRAWS)
def test_only_the_generator_that_was_drawn_from_is_named(module, name):
    generators = Generators(module, CPU)
    before = generators.states()
    DRAWS[name](module)
    found = drawn_from(before, generators.states())
    assert list(found) == [name]
    assert torch.equal(found[name], before[name])


@pytest.mark.parametrize("memory", ["as in CPython", "not known", "something else"])
def test_the_state_of_python_is_the_one_at_hand_however_it_was_reached(module, monkeypatch, memory):
    if memory != "as in CPython":
        content = {"not known": None, "something else": bytes(2500)}[memory]
        monkeypatch.setattr(random_states, "_memory_of_python", lambda: content)
    generators = Generators(module, CPU)
    start = random.getstate()
    changes = [
        lambda: None,
        random.random,
        lambda: random.gauss(0, 1),  # draws two at once, and keeps one
        lambda: random.gauss(0, 1),
        lambda: random.seed(3),
        lambda: random.setstate(start),
        lambda: random.setstate((*start[:2], 0.5)),  # differs by the number kept
        lambda: None,
        lambda: random.setstate(start),
    ]
    for change in changes:
        change()
        here = random.getstate()
        state = generators.states()["python"]
        assert generators.states()["python"].equal(state)
        random.seed(9)
        generators.set({"python": state})
        assert random.getstate() == here


def test_nothing_that_is_drawn_inside_is_missed_afterwards(module):
    generators = Generators(module, CPU)
    states = generators.states()
    expected = everything(module)
    generators.set(states)

    def fail():
        with generators.kept():
            everything(module)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert everything(module) == expected


def test_a_seed_is_one_for_all_of_them(module):
    generators = Generators(module, CPU)
    drawn = []
    for seed in (5, 5, 6):
        generators.seed(seed)
        drawn.append(everything(module))
    assert drawn[0] == drawn[1]
    assert all(drawn[0][name] != drawn[2][name] for name in DRAWS)


def test_a_generator_of_the_module_does_not_repeat_the_global_one(module):
    module.noise = torch.Generator()
    Generators(module, CPU).seed(5)
    assert not torch.equal(torch.rand(3), torch.rand(3, generator=module.noise))


def test_states_are_bytes_that_can_be_stored(module):
    generators = Generators(module, CPU)
    states = generators.states()
    assert all(state.dtype == torch.uint8 and state.ndim == 1 for state in states.values())
    drawn = everything(module)
    # out of a larger tensor, as a shard has them
    generators.set({name: torch.cat([state, state])[: len(state)].clone() for name, state in states.items()})
    assert everything(module) == drawn


def test_generators_of_a_copy_are_its_own(module):
    import copy

    copied = copy.deepcopy(module)
    states = Generators(copied, CPU).states()
    expected = DRAWS["own.1"](copied)
    DRAWS["own.1"](module)
    Generators(copied, CPU).set(states)
    assert DRAWS["own.1"](copied) == expected


# in whatever is the default data type; more than 16 numbers, which torch draws another way than fewer
FLOATS = {
    "randn": lambda: torch.randn(20),
    "rand": lambda: torch.rand(20),
    "randn_like": lambda: torch.randn_like(torch.ones(20)),
    "rand_like": lambda: torch.rand_like(torch.ones(20)),
    "normal with tensors": lambda: torch.normal(torch.arange(20.0), 2.0),
    "normal in place": lambda: torch.empty(20).normal_(1, 2),
    "uniform in place": lambda: torch.empty(20).uniform_(-1, 1),
    "exponential in place": lambda: torch.empty(20).exponential_(),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(20), 0.3),
    "alpha dropout": lambda: torch.nn.functional.alpha_dropout(torch.ones(20), 0.3, training=True),
    "channels": lambda: torch.nn.functional.dropout2d(torch.ones(4, 5, 2, 2), 0.3),
    "bernoulli": lambda: torch.bernoulli(torch.full((20,), 0.5)),
    "a distribution": lambda: torch.distributions.Normal(torch.zeros(20), torch.ones(20)).rsample(),
    "a distribution of counts": lambda: torch.distributions.Bernoulli(torch.full((20,), 0.5)).sample(),
}


def default(dtype, function):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(3)
        return function()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("draw", FLOATS.values(), ids=FLOATS)
def test_a_replay_in_double_draws_what_was_drawn_in_single(draw):
    single = default(torch.float32, lambda: (draw(), torch.get_rng_state()))

    def in_double():
        with DrawnIn(torch.float32, torch.float64):
            return draw(), torch.get_rng_state()

    double = default(torch.float64, in_double)
    assert double[0].dtype == torch.float64
    # what is made of the numbers is computed in double: equal up to single precision
    torch.testing.assert_close(double[0].float(), single[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(double[1], single[1])


def test_without_it_other_numbers_would_be_drawn():
    single, double = (default(dtype, lambda: torch.randn(20)) for dtype in (torch.float32, torch.float64))
    assert not torch.allclose(single.double(), double, rtol=1e-3)


@pytest.mark.parametrize(
    "draw", [lambda: torch.randint(9, (5,)), lambda: torch.randperm(7)], ids=["randint", "randperm"]
)
def test_integers_are_drawn_as_they_are(draw):
    single = default(torch.float32, draw)

    def in_double():
        with DrawnIn(torch.float32, torch.float64):
            return draw()

    double = default(torch.float64, in_double)
    assert double.dtype == torch.int64
    assert torch.equal(single, double)


def test_numbers_asked_for_in_single_stay_single():
    def in_double():
        with DrawnIn(torch.float32, torch.float64):
            return torch.empty(20, dtype=torch.float32).normal_()

    assert torch.equal(default(torch.float64, in_double), default(torch.float32, lambda: torch.empty(20).normal_()))


def test_dropout_of_parameters_in_double_is_differentiated():
    weight = torch.ones(20, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    with DrawnIn(torch.float32, torch.float64):
        dropped = torch.nn.functional.dropout(weight, 0.3)
        (gradient,) = torch.autograd.grad((dropped**2).sum(), weight)
    torch.testing.assert_close(gradient, 2 * dropped / 0.7)
    assert 0 < int((dropped == 0).sum()) < 20


def test_numbers_drawn_on_a_gpu_are_not_drawn_again_on_the_cpu(module):
    with pytest.raises(ReplayError, match=r'cannot draw the same\. Give device="cuda"'):
        Generators(module, CPU).set({"cuda": torch.get_rng_state()})


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("damage", ["empty", "shorter", "ones", "of another"])
def test_an_invalid_state_is_refused_by_the_name_of_the_generator(module, name, damage):
    generators = Generators(module, CPU)
    states = generators.states()
    other = states["own.1" if name in ("cpu", "numpy", "python", "own.0") else "cpu"]
    state = {"empty": states[name][:0], "shorter": states[name][:-9], "ones": torch.full_like(states[name], 255)}
    with pytest.raises(ReplayError, match=f"generator {name} does not fit"):
        generators.set({name: state.get(damage, other)})


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.Philox])
def test_a_position_behind_the_state_is_refused_as_numpy_would_read_there(bits):
    # without the check, the next draw ends the process with a segmentation fault
    module = nn.Module()
    module.rng = np.random.Generator(bits(0))
    generators = Generators(module, CPU)
    content = json.loads(bytes(generators.states()["own.0"].numpy()))
    if bits is np.random.MT19937:
        content["state"]["pos"] = 9**7
    else:
        content["buffer_pos"] = 9**7
    forged = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    with pytest.raises(ReplayError, match=r"own\.0 does not fit .*position 4782969"):
        generators.set({"own.0": forged})


def test_a_position_behind_the_state_of_the_global_generator_is_refused(module):
    generators = Generators(module, CPU)
    state = generators.states()["numpy"].clone()
    state[624 * 4 + 2] = 1
    with pytest.raises(ReplayError, match="numpy does not fit"):
        generators.set({"numpy": state})
