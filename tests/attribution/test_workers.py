"""Attributing in other processes and on a Ray cluster: the same numbers, stored as they come."""

import os
import threading

import pytest
import torch

from lightning_dtda import (
    Attribution,
    InfluenceFunctions,
    UnrolledDifferentiation,
)
from lightning_dtda.errors import AttributionError, ExecutionError
from lightning_dtda.execution import RayCluster
from tests.attribution.regressors import ask, recorded


@pytest.fixture
def ensemble(fit, tmp_path):
    return recorded(fit, tmp_path / "runs", seeds=5)


def assert_same(found, expected):
    assert found.runs == expected.runs
    assert torch.equal(found.baseline, expected.baseline)
    assert torch.equal(found.responses, expected.responses)
    for key in ("drift", "adjoint_norms", "diagnosis", "response_norm"):
        assert found.about[key] == expected.about[key]


# batches of two: none is parted for two places, so that the operations are the same, to the bit
ESTIMATORS = [UnrolledDifferentiation(runs_per_batch=2), InfluenceFunctions()]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["unrolled", "influence functions"])
def test_processes_answer_what_this_one_does(ensemble, estimator):
    assert_same(ask(ensemble, estimator=estimator, workers=2), ask(ensemble, estimator=estimator))


@pytest.mark.slow
def test_batches_are_parted_so_that_no_process_is_idle(ensemble):
    together = UnrolledDifferentiation(runs_per_batch=5)
    found, expected = ask(ensemble, estimator=together, workers=2), ask(ensemble, estimator=together)
    # other batches are other matrix products: rounding of single precision over twelve steps
    torch.testing.assert_close(found.responses, expected.responses, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["unrolled", "influence functions"])
def test_a_cluster_answers_what_this_process_does(ray_cluster, ensemble, estimator, tmp_path):
    found = ask(ensemble, estimator=estimator, workers=RayCluster(), output=tmp_path / "answer")
    assert_same(found, ask(ensemble, estimator=estimator))
    assert_same(Attribution.load(tmp_path / "answer"), found)


class Unlucky:
    """A measurement that takes its process along in a worker, once there is a file that says so."""

    def __init__(self, path, here):
        self.path, self.here = path, here

    def __call__(self, module, batch):
        if os.getpid() != self.here and self.path.exists():
            os._exit(1)
        return (module(batch[0]) - batch[1]).abs()


class UnluckyOnce(Unlucky):
    """The same, but only the first time."""

    def __call__(self, module, batch):
        if os.getpid() != self.here and self.path.exists():
            self.path.unlink()
            os._exit(1)
        return (module(batch[0]) - batch[1]).abs()


@pytest.mark.slow
def test_what_is_lost_with_a_worker_is_done_again(ray_cluster, ensemble, tmp_path):
    (tmp_path / "unlucky").touch()
    measurement = UnluckyOnce(tmp_path / "unlucky", os.getpid())
    found = ask(ensemble, workers=RayCluster(), measurement=measurement)
    assert not (tmp_path / "unlucky").exists()
    assert torch.equal(found.baseline, ask(ensemble, measurement=measurement).baseline)


@pytest.mark.slow
def test_runs_that_kill_every_worker_are_named(ray_cluster, ensemble, tmp_path):
    (tmp_path / "unlucky").touch()
    with pytest.raises(AttributionError, match=r"batches of runs were not attributed: seed-000\d.*its worker was lost"):
        ask(ensemble, workers=RayCluster(retries=0), measurement=Unlucky(tmp_path / "unlucky", os.getpid()))


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported(ensemble, tmp_path):
    (tmp_path / "unlucky").touch()
    with pytest.raises(ExecutionError, match=r"A process was killed.*\d tasks were finished.*run the call again"):
        ask(ensemble, workers=2, measurement=Unlucky(tmp_path / "unlucky", os.getpid()))


@pytest.mark.slow
def test_what_is_finished_is_stored_and_not_done_again(ensemble, tmp_path):
    estimator = UnrolledDifferentiation(runs_per_batch=1)
    first = ask(ensemble[:3], estimator=estimator, workers=2, output=tmp_path / "answer")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "answer").glob("seed-*.safetensors")}
    assert len(written) == 3
    found = ask(ensemble, estimator=estimator, workers=2, output=tmp_path / "answer")
    assert found.runs[:3] == first.runs
    assert {name: (tmp_path / "answer" / name).stat().st_mtime_ns for name in written} == written
    assert_same(found, ask(ensemble, estimator=estimator))


def test_what_has_no_pickle_is_refused(ensemble):
    lock = threading.Lock()

    def measurement(module, batch):
        return (module(batch[0]) - batch[1]).abs() if lock else None

    with pytest.raises(ExecutionError, match=r"cannot be pickled for other processes .*lock.*set workers=1"):
        ask(ensemble, workers=2, measurement=measurement)


def test_the_memory_of_all_processes_is_counted(ensemble, monkeypatch):
    plan = UnrolledDifferentiation.plan
    needed = []

    def recorded(self, *arguments):
        needed.append(plan(self, *arguments))
        return needed[-1]

    monkeypatch.setattr(UnrolledDifferentiation, "plan", recorded)
    ask(ensemble)
    available = 3 * needed[0].memory // 2
    monkeypatch.setattr("lightning_dtda.attribution.resources.available_memory", lambda device: available)
    ask(ensemble)
    with pytest.raises(AttributionError, match="use fewer workers"):
        ask(ensemble, workers=2)
