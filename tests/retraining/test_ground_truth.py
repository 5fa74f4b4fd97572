"""The result: influences, what is missing, and what is on disk."""

import warnings
from multiprocessing import get_context

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_dtda import GroundTruth
from lightning_dtda.errors import RetrainingError, TrajectoryError
from lightning_dtda.retraining import Task
from lightning_dtda.retraining.truth_store import TruthStore
from lightning_dtda.statistics.differences import Mean, Wasserstein
from lightning_dtda.trajectory.storage import read_json, write_json

SUBSETS, SEEDS, BASELINE_SEEDS, QUERIES = 4, 6, 9, 3
REMOVED = ((0, 5), (3,), (1, 2, 7), (6,))
ABOUT = {"measurement": "loss", "removal": "drop", "data": {"length": 10}}


@pytest.fixture
def truth():
    generator = torch.Generator().manual_seed(0)
    measurements = torch.randn(SUBSETS, SEEDS, QUERIES, generator=generator)
    baseline = torch.randn(BASELINE_SEEDS, QUERIES, generator=generator)
    return GroundTruth(measurements, baseline, REMOVED, (4, 8, 15), tuple(range(6)), tuple(range(20, 29)), ABOUT)


def test_influences_are_those_of_samples_of_different_sizes(truth):
    x, y = truth.baseline.double().numpy(), truth.measurements.double().numpy()
    mean, variance, wasserstein = (truth.influence(name) for name in ("mean", "variance", "wasserstein"))
    for q in range(QUERIES):
        for k in range(SUBSETS):
            of_x, of_y = x[:, q], y[k, :, q]
            assert mean[q, k] == pytest.approx(of_y.mean() - of_x.mean(), abs=1e-12)
            assert variance[q, k] == pytest.approx(of_y.var(ddof=1) - of_x.var(ddof=1), abs=1e-12)
            # every sample as often as it takes for both to have the same number
            each = np.sort(np.repeat(of_x, SEEDS)), np.sort(np.repeat(of_y, BASELINE_SEEDS))
            assert wasserstein[q, k] == pytest.approx(np.sqrt(np.mean((each[0] - each[1]) ** 2)), abs=1e-12)


def test_the_distance_of_unequal_samples_is_that_of_scipy_where_it_has_one():
    # scipy has the distance of first order: of two points and one, both orders are known from it
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0], [1.0]])
    assert Wasserstein()(x, y).item() == pytest.approx(scipy.stats.wasserstein_distance([0, 2], [1]))


def test_a_difference_of_pairs_needs_as_many_of_both(truth):
    with pytest.raises(RetrainingError, match=r"9 baseline seeds for 6 seeds"):
        truth.influence(Mean("median"))


def test_missing_trainings_are_reported_and_never_used(truth):
    truth.measurements[2, 1:] = torch.nan  # only one of its seeds is there
    truth.measurements[0, 3, 1] = torch.nan
    truth.baseline[4] = torch.nan
    assert truth.unfinished == (Task(None, 24), Task(0, 3), *(Task(2, seed) for seed in range(1, 6)))
    with pytest.raises(
        RetrainingError, match=r"7 trainings are missing \(all data seed 24, subset 0 seed 3,.*finished"
    ):
        truth.influence("mean")
    part = truth.finished()
    assert part.removed == (REMOVED[0], REMOVED[1], REMOVED[3])
    assert part.seeds == (0, 1, 2, 4, 5)
    assert 24 not in part.baseline_seeds
    assert torch.equal(part.measurements, truth.measurements[[0, 1, 3]][:, [0, 1, 2, 4, 5]])
    assert part.influence("mean").isfinite().all()


def test_pairs_of_reweighted_trainings_are_finished_together(truth):
    paired = GroundTruth(
        truth.measurements,
        truth.baseline[:6],
        REMOVED,
        truth.queries,
        truth.seeds,
        truth.seeds,
        {"removal": "reweight"},
    )
    paired.baseline[2] = torch.nan
    part = paired.finished()
    assert part.seeds == part.baseline_seeds == (0, 1, 3, 4, 5)


def test_a_saved_truth_is_the_one_that_is_loaded(truth, tmp_path):
    truth.save(tmp_path / "truth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = GroundTruth.load(tmp_path / "truth")
    assert torch.equal(loaded.measurements, truth.measurements)
    assert torch.equal(loaded.baseline, truth.baseline)
    for name in ("removed", "queries", "seeds", "baseline_seeds"):
        assert getattr(loaded, name) == getattr(truth, name)
    assert loaded.about.items() >= ABOUT.items()
    with pytest.raises(RetrainingError, match=r"holds a ground truth.*overwrite=True"):
        truth.save(tmp_path / "truth")


def test_an_unfinished_truth_is_loaded_with_a_warning(truth, tmp_path):
    truth.measurements[1, 2] = torch.nan
    truth.save(tmp_path / "truth")
    with pytest.warns(UserWarning, match=r"unfinished: 1 trainings are missing \(subset 1 seed 2\)"):
        loaded = GroundTruth.load(tmp_path / "truth")
    assert loaded.unfinished == (Task(1, 2),)


def test_more_subsets_and_seeds_extend_a_store_and_another_question_is_refused(tmp_path):
    first = TruthStore.create(tmp_path, ABOUT, [0], [[1], [2]], [0, 1], [0, 1])
    first.add([Task(1, 0)], torch.tensor([[5.0]]))
    more = TruthStore.create(tmp_path, ABOUT, [0], [[3], [2]], [1, 2], [7])
    assert more.removed == ((1,), (2,), (3,))
    assert (more.seeds, more.baseline_seeds) == ((0, 1, 2), (0, 1, 7))
    measurements, baseline = more.read([[2], [3]], [0, 2], [7])
    assert measurements[0, 0].item() == 5.0
    assert int(measurements.isnan().sum()) == 3
    assert baseline.isnan().all()
    with pytest.raises(RetrainingError, match=r"another question \(different measurement, queries\).*overwrite"):
        TruthStore.create(tmp_path, ABOUT | {"measurement": "margin"}, [1], [[1]], [0], [0])
    replaced = TruthStore.create(tmp_path, ABOUT | {"measurement": "margin"}, [1], [[1]], [0], [0], overwrite=True)
    assert not replaced.finished()


def test_a_store_can_be_made_where_a_process_was_killed_while_it_made_it(tmp_path):
    # the lock, and an index that was not renamed into place; so it looks to others while it is under way, too
    (tmp_path / ".truth.lock").touch()
    (tmp_path / ".truth.json.partial").write_text('{\n "format_ver')
    TruthStore.create(tmp_path, ABOUT, [1], [[1]], [0], [0])
    assert TruthStore.open(tmp_path).seeds == (0,)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RetrainingError, match="not empty and holds no ground truth"):
        TruthStore.create(tmp_path, ABOUT, [0], [[1]], [0], [0], overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_file_is_named(truth, tmp_path):
    truth.save(tmp_path)
    damaged = sorted(tmp_path.glob("trainings-*"))[1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(TrajectoryError, match=f"{damaged.name} was altered or damaged.*retrain again"):
        GroundTruth.load(tmp_path)


def _write_many(path, own):
    store = TruthStore.create(path, ABOUT, [0], [[own], [100]], [own, 50], [own])
    position = store.positions([[own]])[0]
    for seed in range(20):
        store.add([Task(position, seed)], torch.tensor([[float(100 * own + seed)]]))
    store.note([f"engine-{own}"], {Task(position, 99): "lost"})


@pytest.mark.slow
def test_processes_write_to_one_directory_at_the_same_time(tmp_path):
    processes = [get_context("spawn").Process(target=_write_many, args=(tmp_path, own)) for own in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = TruthStore.open(tmp_path)
    assert set(store.removed) == {(1,), (2,), (100,)}
    assert set(store.seeds) == {1, 2, 50}
    assert set(store.about["engine"].split(", ")) == {"engine-1", "engine-2"}
    assert len(store.about["failures"]) == 2
    for own in (1, 2):
        measurements, _ = store.read([[own]], range(20), [])
        assert measurements[0, :, 0].tolist() == [100.0 * own + seed for seed in range(20)]


def test_an_unknown_format_is_refused_until_the_truth_is_made_again(truth, tmp_path):
    truth.save(tmp_path)
    index = tmp_path / "truth.json"
    write_json(index, read_json(index) | {"format_version": 99})
    with pytest.raises(TrajectoryError, match=r"format version 99.* Retrain again"):
        GroundTruth.load(tmp_path)
    with pytest.raises(RetrainingError, match=r"different format_version.*overwrite=True"):
        TruthStore.create(tmp_path, ABOUT, truth.queries, truth.removed, truth.seeds, truth.baseline_seeds)
    truth.save(tmp_path, overwrite=True)
    assert torch.equal(GroundTruth.load(tmp_path).measurements, truth.measurements)


def test_named_dimensions(truth):
    dataset = truth.to_xarray()
    assert dict(dataset.sizes) == {"subset": 4, "seed": 6, "query": 3, "baseline_seed": 9}
    assert dataset["size"].values.tolist() == [2, 1, 3, 1]
    np.testing.assert_array_equal(dataset["measurements"].sel(subset=2, seed=1, query=8), truth.measurements[2, 1, 1])
