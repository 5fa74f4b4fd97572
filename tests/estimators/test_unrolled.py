"""How runs and queries are batched must not show in the responses; what does not fit is refused."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.attribution import responses
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators import sweep_costs, unrolled
from lightning_dtda.execution.memory import peak_memory
from lightning_dtda.replay.stacked import Stacked
from tests.regression import WeightedRegressor, loader, weighted_data

INPUTS, TARGETS, WEIGHTS = weighted_data(dtype=torch.float32)
QUERIES = TensorDataset(*weighted_data(5, seed=1, dtype=torch.float32))


def module():
    return WeightedRegressor(
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), dtype=torch.float32
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three runs of 12 steps, the last batch of an epoch with two of five examples; gradients recorded."""
    root = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        pl.Trainer(
            max_epochs=4,
            callbacks=[TrajectoryRecorder(root)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module(), loader(INPUTS, TARGETS, WEIGHTS, batch_size=5))
    return root


def attribution(root, *, inputs=INPUTS, **arguments):
    return attribute(
        Ensemble.open(root),
        module(),
        TensorDataset(inputs, TARGETS, WEIGHTS),
        queries=QUERIES,
        estimator=UnrolledDifferentiation(**arguments),
        progress=False,
    )


def test_batches_of_runs_change_nothing_but_rounding(root):
    single, stacked = (attribution(root, runs_per_batch=size).responses for size in (1, 3))
    torch.testing.assert_close(single, stacked, rtol=1e-4, atol=1e-6)


def test_chunks_of_queries_change_nothing_but_rounding(root, monkeypatch, take_100_mib):
    whole = attribution(root).responses
    take_100_mib("reverse_costs")
    plans = []
    original = UnrolledDifferentiation.plan
    monkeypatch.setattr(UnrolledDifferentiation, "plan", lambda *a: plans.append(original(*a)) or plans[-1])
    chunked = attribution(root, memory_budget=0.25).responses
    assert plans[0].queries_per_chunk == 2
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


@pytest.fixture
def plans(monkeypatch):
    """The plans that are made."""
    made = []
    original = UnrolledDifferentiation.plan
    monkeypatch.setattr(UnrolledDifferentiation, "plan", lambda *given: made.append(original(*given)) or made[-1])
    return made


@pytest.fixture
def times(monkeypatch):
    """Seconds that steps take: as they are, stacked, and compiled. The compiler leaves a step as it is."""
    seconds = {"plain": 0.05, "stacked": 0.1, "compiled": 0.01}

    def timed(_costs, replay, _directions):
        way = "compiled" if replay.ways.is_compiled else "stacked" if replay.ways.is_stacked else "plain"
        return seconds[way]

    monkeypatch.setattr(sweep_costs.Costs, "seconds", timed)
    monkeypatch.setattr(sweep_costs, "_WORTH_TRACING", 0.0)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    return seconds


@pytest.mark.parametrize("stacked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_steps_change_nothing_but_rounding(root, plans, times, stacked):
    times["stacked"] = 0.02 if stacked else 1.0
    plain, compiled = (attribution(root, compile=how).responses for how in (False, True))
    assert [(plan.stacked, plan.compiled) for plan in plans] == [(stacked, False), (stacked, True)]
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_announced_memory_covers_the_comparison_of_a_traced_step(fit, tmp_path, plans, times, monkeypatch):
    times["stacked"] = 0.02
    monkeypatch.setattr(responses, "_FREED", 0)  # a block that is never written to, and takes no memory

    def make():
        network = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        return WeightedRegressor(
            lambda module: torch.optim.SGD(module.parameters(), lr=0.1), dtype=torch.float32, network=lambda: network
        )

    data = TensorDataset(*weighted_data(64, dtype=torch.float32))
    pl.seed_everything(0, verbose=False)
    fit(make(), loader(*data.tensors, batch_size=64), TrajectoryRecorder(tmp_path), max_epochs=4)
    ensemble, query = Ensemble.open(tmp_path), Subset(QUERIES, [0])

    def attributed():
        attribute(ensemble, make(), data, queries=query, progress=False)

    attributed()  # plans outside of the measurement
    peak = peak_memory(attributed, torch.device("cpu"))
    assert plans[0].stacked
    assert plans[0].memory / 1.5 < peak < 1.5 * plans[0].memory


@pytest.mark.parametrize(
    ("together", "traced"),
    [(4, {torch.float32}), pytest.param(3, {torch.float32, torch.float64}, marks=pytest.mark.slow)],
)
def test_steps_are_traced_in_double_precision_only_to_diagnose_many_runs(root, times, monkeypatch, together, traced):
    times["stacked"] = 0.02
    monkeypatch.setattr(unrolled, "DIAGNOSED_TOGETHER", together)
    found, original = set(), Stacked._trace
    monkeypatch.setattr(Stacked, "_trace", lambda *a: found.add(a[4][0].dtype) or original(*a))
    assert attribution(root).ill_conditioned == ()
    assert found == traced


@pytest.mark.parametrize(("seconds", "compiled"), [(0.1, False), (11.0, False), (12.0, True)])
def test_steps_are_compiled_where_much_work_is_ahead(root, plans, times, seconds, compiled):
    times["plain"] = seconds  # of each of 36 steps
    attribution(root)
    assert plans[0].compiled == compiled


@pytest.mark.slow
def test_compiled_steps_that_are_slower_are_not_used(root, plans, times, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning_dtda"), "propagate", True)
    times |= {"stacked": 1.0, "compiled": 0.06}
    with caplog.at_level(logging.INFO, logger="lightning_dtda"):
        attribution(root, compile=True)
    assert not plans[0].compiled
    assert "Compiled steps take 1.20 times as long, so they are not used." in caplog.text


class Recurrent(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.last(self.layer(batch[0])[0][:, -1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_steps_of_recurrent_layers_are_not_compiled_and_that_is_said(tmp_path, plans, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning_dtda"), "propagate", True)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: compiled.append(graph) or graph)
    series = TensorDataset(torch.randn(4, 3, 1))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, callbacks=[TrajectoryRecorder(tmp_path)], enable_progress_bar=False, **options)
    trainer.fit(Recurrent(), DataLoader(series, 2))
    with caplog.at_level(logging.INFO, logger="lightning_dtda"):
        plain, asked = (
            attribute(
                Ensemble.open(tmp_path),
                Recurrent(),
                series,
                queries=series,
                estimator=UnrolledDifferentiation(compile=compile),
                progress=False,
            )
            for compile in (False, True)
        )
    assert not compiled
    assert not plans[1].compiled
    assert "Steps of Recurrent are not compiled: each time step of its recurrent layers" in caplog.text
    assert torch.equal(plain.responses, asked.responses)


def test_chunks_of_queries_are_alike(root, plans, take_100_mib):
    take_100_mib("reverse_costs")
    attribution(root, memory_budget=0.4)  # room for four of five
    assert plans[0].queries_per_chunk == 3


def test_double_precision_agrees_with_single_up_to_its_rounding(root):
    single, double = attribution(root), attribution(root, precision="float64")
    assert double.responses.dtype == torch.float64
    torch.testing.assert_close(single.responses.double(), double.responses, rtol=1e-3, atol=1e-5)


def test_drift_is_reported_for_every_run(root):
    drift = attribution(root, precision="float64").about["drift"]
    assert sorted(drift) == ["seed-0000", "seed-0001", "seed-0002"]
    for of_run in drift.values():
        # float32 training against a float64 replay: rounding, and not nothing
        assert 0 < of_run["parameters"] < 1e-5
        assert 0 < of_run["gradients"] < 1e-4
    assert len({of_run["parameters"] for of_run in drift.values()}) == 3  # each run's own


def test_an_unknown_choice_about_compiling_is_refused():
    with pytest.raises(AttributionError, match=r'compile=.never.; choose True, False or "auto"'):
        UnrolledDifferentiation(compile="never")


def test_what_does_not_fit_the_memory_is_refused_before_it_starts(root):
    with pytest.raises(AttributionError, match="Raise it"):
        attribution(root, memory_budget=1e-6)


def test_changed_data_are_refused(root):
    with pytest.raises(ReplayError, match=r"Example 0 \(and 11 others.* is not the one that"):
        attribution(root, inputs=INPUTS + 1e-3)


def test_data_that_changed_unseen_are_found_at_a_step(root, monkeypatch):
    monkeypatch.setattr("lightning_dtda.replay.examples.refuse_changed_data", lambda *arguments: None)
    changed = INPUTS.clone()
    changed[3] += 0.1
    with pytest.raises(ReplayError, match=r"gradient of step \d+ is not the recorded one"):
        attribution(root, inputs=changed)


@pytest.mark.parametrize(
    "arguments", [{"runs_per_batch": 0}, {"precision": "float16"}, {"memory_budget": 0}, {"tolerance": -1}], ids=str
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(AttributionError):
        UnrolledDifferentiation(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["float32", "none"])
def test_mixed_precision_is_replayed_as_it_was_and_the_distance_of_double_stated(fit, tmp_path, gradients):
    answers = {}
    for precision in ("32-true", "bf16-mixed"):
        pl.seed_everything(0, verbose=False)
        data = TensorDataset(*weighted_data(24, dtype=torch.float32))
        recorder = TrajectoryRecorder(tmp_path / precision, "run", gradients=gradients)
        module = WeightedRegressor(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), dtype=torch.float32)
        fit(module, loader(*data.tensors), recorder, max_epochs=6, precision=precision)
        for replayed in ("recorded", "float64"):
            answers[precision, replayed] = attribute(
                Ensemble.open(tmp_path / precision),
                module,
                data,
                queries=data,
                estimator=UnrolledDifferentiation(precision=replayed),
                progress=False,
            )
    mixed, double = answers["bf16-mixed", "recorded"], answers["bf16-mixed", "float64"]
    single = answers["32-true", "recorded"].responses
    assert (mixed.responses - single).norm() < 0.2 * single.norm()
    assert (double.responses - single).norm() < 0.2 * single.norm()
    # the same operations in the same precision, on the same machine
    assert mixed.about["drift"]["run"]["parameters"] == 0
    assert mixed.about["drift"]["run"]["gradients"] in (0, None)
    drift = double.about["drift"]["run"]
    assert 1e-5 < drift["parameters"] < 0.1
    if gradients != "none":
        assert 1e-4 < drift["gradients"] < 0.13  # of bfloat16's rounding, 0.008 a step
