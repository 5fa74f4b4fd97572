"""Attributing block of queries by block: the top of all responses, whatever is interrupted or turns out late."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_dtda import (
    Attribution,
    Ensemble,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
)
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.estimators import Estimate, Estimator, Plan
from lightning_dtda.replay import Drift
from lightning_dtda.units import GIB
from tests.regression import WeightedRegressor, loader, weighted_data

EXAMPLES, QUERIES, RUNS, K = 20, 5, 8, 2
DATA = TensorDataset(*weighted_data(EXAMPLES, dtype=torch.float32))
ASKED = TensorDataset(*weighted_data(QUERIES, seed=1, dtype=torch.float32))


def module():
    return WeightedRegressor(lambda module: torch.optim.SGD(module.parameters(), lr=0.1), dtype=torch.float32)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for seed in range(RUNS):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[TrajectoryRecorder(root)], **quiet)
        trainer.fit(module(), loader(*DATA.tensors))
    return Ensemble.open(root)


def budget(queries, runs=RUNS):
    """So many queries' responses, and figures, in GiB."""
    return (queries + 0.5) * (runs + 5) * EXAMPLES * 4 / GIB


def ask(ensemble, **arguments):
    return attribute(ensemble, module(), DATA, **({"queries": ASKED, "progress": False} | arguments))


def in_blocks(ensemble, at_once=2, **arguments):
    return ask(ensemble, **({"keep_top": K, "scratch_budget": budget(at_once, len(ensemble))} | arguments))


def assert_same(found, full):
    """What was kept block by block is the top of all responses, but for rounding: queries are grouped otherwise."""
    expected = full.keep_top(K)
    assert (found.runs, found.queries, found.chaotic) == (expected.runs, expected.queries, expected.chaotic)
    torch.testing.assert_close(found.baseline, expected.baseline)
    for query, (kept, wanted) in enumerate(zip(found.responses.kept, expected.responses.kept, strict=True)):
        assert torch.equal(kept, wanted)
        torch.testing.assert_close(found.responses[:, query, kept], full.responses[:, query, kept])
    for difference in ("mean", "variance"):
        torch.testing.assert_close(found.influence(difference), expected.influence(difference), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            found.standard_error(difference), expected.standard_error(difference), rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(found.p_values(difference), expected.p_values(difference), rtol=1e-2, atol=1e-4)
    assert found.about["response_norm"] == pytest.approx(full.about["response_norm"])
    assert found.about["largest_response"] == pytest.approx(full.about["largest_response"])
    assert found.about["diagnosis"].keys() == full.about["diagnosis"].keys()


class CrashError(Exception):
    """What stands for a crash."""


class Estimates(list):
    """What each estimate is of, runs and queries, and how many there may be before the process dies."""

    allowed = -1


@pytest.fixture
def estimates(monkeypatch):
    original, made = UnrolledDifferentiation.estimate, Estimates()

    def estimate(self, runs, question, *arguments):
        if len(made) == made.allowed:
            raise CrashError
        first = question.queries.first
        made.append((len(runs), range(first, first + len(question.queries))))
        return original(self, runs, question, *arguments)

    monkeypatch.setattr(UnrolledDifferentiation, "estimate", estimate)
    return made


@pytest.mark.parametrize("estimator", [UnrolledDifferentiation(), InfluenceFunctions()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", [pytest.param("memory", marks=pytest.mark.slow), "disk"])
def test_blocks_of_queries_answer_what_all_at_once_do(ensemble, tmp_path, estimator, where):
    full = ask(ensemble, estimator=estimator)
    output = {} if where == "memory" else {"output": tmp_path / "kept"}
    assert_same(in_blocks(ensemble, estimator=estimator, **output), full)
    if output:
        assert_same(Attribution.load(tmp_path / "kept"), full)
        names = sorted(file.name for file in (tmp_path / "kept").iterdir())
        assert names == ["attribution.json", "gallery.json", *(f"queries-{n:06d}.safetensors" for n in (0, 2, 4))]


@pytest.mark.slow
def test_other_processes_answer_blocks(ensemble):
    asked = Subset(ASKED, [4, 0, 2])
    assert_same(in_blocks(ensemble, queries=asked, workers=2), ask(ensemble, queries=asked))


@pytest.mark.slow
def test_groups_are_kept(ensemble):
    groups = {f"from {n}": [n, n + 1] for n in range(EXAMPLES - 1)}
    found = in_blocks(ensemble, removals=groups)
    assert_same(found, ask(ensemble, removals=groups))
    assert found.top(1)["removal"][0] in groups


def noisy(module, batch):
    return (module(batch[0] + 0.1 * torch.randn_like(batch[0])) - batch[1]) ** 2


@pytest.mark.slow
def test_each_query_has_its_own_random_numbers_in_any_block(ensemble):
    full = ask(ensemble, measurement=noisy, measurement_draws=3)
    found = in_blocks(ensemble, at_once=1, measurement=noisy, measurement_draws=3)
    torch.testing.assert_close(found.baseline, full.baseline)


@pytest.mark.slow
def test_blocks_hold_whole_chunks_of_the_estimator(ensemble, estimates, monkeypatch):
    original = UnrolledDifferentiation.plan
    monkeypatch.setattr(
        UnrolledDifferentiation,
        "plan",
        lambda self, runs, question: Plan(original(self, runs, question).batches, 2, 0, 0.0),
    )
    in_blocks(ensemble, at_once=3)
    assert sorted({(block.start, block.stop) for _, block in estimates}) == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.slow
def test_a_crash_loses_only_the_batch_of_runs_under_way(ensemble, tmp_path, estimates):
    arguments = {"output": tmp_path / "kept", "estimator": UnrolledDifferentiation(runs_per_batch=3)}
    full = ask(ensemble, estimator=arguments["estimator"])
    estimates.clear()
    estimates.allowed = 5  # three of the first block, of 3, 3 and 2 runs, and two of the second
    with pytest.raises(CrashError):
        in_blocks(ensemble, **arguments)
    with pytest.warns(UserWarning, match=r"3 queries are missing \(2, 3, 4\)\. Call attribute again"):
        assert Attribution.load(tmp_path / "kept").queries == (0, 1)
    estimates.clear()
    estimates.allowed = -1
    assert_same(in_blocks(ensemble, **arguments), full)
    assert estimates == [(2, range(2, 4)), (3, range(4, 5)), (3, range(4, 5)), (2, range(4, 5))]
    estimates.clear()
    assert_same(in_blocks(ensemble, **arguments), full)
    assert estimates == []


@pytest.mark.slow
def test_blocks_of_another_size_go_on_where_the_last_ones_ended(ensemble, tmp_path, estimates):
    estimates.allowed = 1
    arguments = {"output": tmp_path / "kept", "estimator": UnrolledDifferentiation(runs_per_batch=RUNS)}
    with pytest.raises(CrashError):
        in_blocks(ensemble, **arguments)
    estimates.clear()
    estimates.allowed = -1
    found = in_blocks(ensemble, at_once=1, **arguments)
    assert [block for _, block in estimates] == [range(2, 3), range(3, 4), range(4, 5)]
    assert_same(found, ask(ensemble))
    assert not list((tmp_path / "kept").glob("scratch-*"))


@pytest.mark.slow
def test_the_answer_to_another_question_is_not_mixed_in(ensemble, tmp_path):
    in_blocks(ensemble[:4], output=tmp_path / "kept")
    for another, message in (
        ({"keep_top": K + 1}, "different keep_top"),
        ({"keep_top": None}, "different keep_top"),
        ({"step": 3}, "different step"),
    ):
        with pytest.raises(AttributionError, match=message):
            in_blocks(ensemble[:4], output=tmp_path / "kept", **another)
    with pytest.raises(AttributionError, match=r"different runs.*overwrite"):
        in_blocks(ensemble, output=tmp_path / "kept")  # figures are over all runs: none can be added
    assert in_blocks(ensemble, output=tmp_path / "kept", overwrite=True).runs == tuple(run.name for run in ensemble)
    full = ask(ensemble, output=tmp_path / "kept", overwrite=True)
    assert not list((tmp_path / "kept").glob("queries-*"))
    with pytest.raises(AttributionError, match="different keep_top"):
        in_blocks(ensemble, output=tmp_path / "kept")
    assert Attribution.load(tmp_path / "kept").responses.shape == full.responses.shape


def test_nothing_finished_is_said(ensemble, tmp_path, estimates):
    estimates.allowed = 0
    with pytest.raises(CrashError):
        in_blocks(ensemble, output=tmp_path / "kept")
    with pytest.warns(UserWarning, match="5 queries are missing"), pytest.raises(TrajectoryError, match="no finished"):
        Attribution.load(tmp_path / "kept")


class Made(Estimator):
    """Responses of random numbers; those of the last run to some queries are a hundred times as large."""

    def __init__(self, wild):
        self.wild = wild

    def settings(self):
        return {"wild": list(self.wild)}

    def plan(self, runs, question):
        return Plan((tuple(runs),), len(question.queries), 0, 0.0)

    def estimate(self, runs, question, plan, advance):
        responses = torch.empty(len(runs), len(question.queries), EXAMPLES)
        for row, run in zip(responses, runs, strict=True):
            for place, of_query in enumerate(row):
                query = question.queries.first + place
                of_query.normal_(generator=torch.Generator().manual_seed(1000 * query + int(run.name[-4:])))
                of_query *= 100 if query in self.wild and run.name == f"seed-{RUNS - 1:04d}" else 1
        return Estimate(responses[..., 0].clone(), responses, [Drift(0.0, None)] * len(runs))


@pytest.mark.filterwarnings("ignore:Influences of 7 runs")
@pytest.mark.parametrize("wild", [[0, 1], [4], [2]], ids=["first", "last", "middle"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_run_that_turns_out_chaotic_late_is_left_out_of_every_query(ensemble, tmp_path, wild, where):
    estimator = Made(wild)
    full = ask(ensemble, estimator=estimator)
    assert full.chaotic == (f"seed-{RUNS - 1:04d}",)
    output = {} if where == "memory" else {"output": tmp_path / "kept"}
    assert_same(in_blocks(ensemble, estimator=estimator, **output), full)
    if output:
        assert_same(Attribution.load(tmp_path / "kept"), full)


@pytest.mark.filterwarnings("ignore:Influences of 7 runs")
def test_blocks_that_are_to_be_done_again_are_missing_until_they_are(ensemble, tmp_path, monkeypatch):
    original, estimator, done = Made.estimate, Made([4]), []

    def estimate(self, runs, question, *arguments):
        if len(done) == 3:
            raise CrashError
        done.append(question.queries.first)
        return original(self, runs, question, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Made, "estimate", estimate)
        with pytest.raises(CrashError):
            in_blocks(ensemble, estimator=estimator, output=tmp_path / "kept")
    with pytest.warns(UserWarning, match=r"4 queries are missing \(0, 1, 2, 3\)"):
        assert Attribution.load(tmp_path / "kept").queries == (4,)
    found = in_blocks(ensemble, estimator=estimator, output=tmp_path / "kept")
    assert_same(found, ask(ensemble, estimator=estimator))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_top": 0}, "keep_top=0; give the number"),
        ({"keep_top": True}, "keep_top=True"),
        ({"scratch_budget": 0}, "scratch_budget=0; give a positive number"),
    ],
    ids=str,
)
def test_nonsense_is_refused(ensemble, arguments, message):
    with pytest.raises(AttributionError, match=message):
        in_blocks(ensemble, **arguments)


def test_too_little_memory_is_said_before_the_work(ensemble, monkeypatch):
    monkeypatch.setattr("lightning_dtda.attribution.resources.available_memory", lambda device: 100)
    with pytest.raises(AttributionError, match=r"takes .* of memory, but 0\.1 KiB is available\. Give an output"):
        in_blocks(ensemble)
