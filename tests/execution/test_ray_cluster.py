"""Trainings on a Ray cluster: the same numbers, whatever is lost on the way."""

import os
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from lightning_dtda import retrain
from lightning_dtda.errors import ExecutionError
from lightning_dtda.execution import RayCluster
from lightning_dtda.retraining import Task
from tests.retraining.tasks import Regressor, by_hand, make_trainer, queries, training_loader

SUBSETS = [[2, 11], [5]]


def retrained(module=Regressor, **arguments):
    defaults = {"subsets": SUBSETS, "seeds": [3, 4], "queries": queries(), "trainer": make_trainer, "stacked": False}
    return retrain(module, training_loader(), **(defaults | arguments), progress=False)


def test_without_ray_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutionError, match=r'needs Ray.*pip install "lightning-dtda\[ray\]"'):
        RayCluster()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cpus": 1.5}, r"cpus=1\.5; give a fraction up to 1, or a whole number"),
        ({"gpus": -1}, "gpus=-1; give a fraction"),
        ({"cpus": 0}, "all tasks would run at once"),
        ({"retries": -1}, "0 or more"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ExecutionError, match=message):
        RayCluster(**arguments)


@pytest.fixture
def ray():
    """Ray, not connected to the cluster that other tests of this process may have."""
    found = pytest.importorskip("ray")
    address = found.get_runtime_context().gcs_address if found.is_initialized() else None
    found.shutdown()
    yield found
    if address is not None:
        found.init(address=address, logging_level="warning")


def test_what_has_no_pickle_is_refused_before_ray_is_started(ray):
    lock = threading.Lock()
    with pytest.raises(ExecutionError, match=r"cannot be pickled.*lock.*inside functions"):
        retrained(lambda: lock and Regressor(), workers=RayCluster(address="local"))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_ray_is_started_for_the_trainings_and_stopped_again(ray):
    truth = retrained(workers=RayCluster(address="local"), subsets=[[2, 11]], seeds=[3])
    torch.testing.assert_close(truth.measurements[0, 0], by_hand(3, [2, 11]), rtol=1e-12, atol=1e-12)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_cluster_measures_what_this_process_does(ray_cluster):
    # functions that plain pickle refuses
    rate = 0.1
    truth = retrained(lambda: Regressor(rate), trainer=lambda: make_trainer(), workers=RayCluster())
    expected = retrained()
    # the same operations with one thread on the same kind of processor: to the bit
    assert torch.equal(truth.measurements, expected.measurements)
    assert torch.equal(truth.baseline, expected.baseline)


def rough(module, batch):
    return module(batch[0]).bfloat16()


@pytest.mark.slow
def test_a_measurement_keeps_its_precision_on_the_way(ray_cluster):
    # numpy has no bfloat16
    truth = retrained(measurement=rough, workers=RayCluster())
    assert truth.measurements.dtype == torch.bfloat16
    assert torch.equal(truth.measurements, retrained(measurement=rough).measurements)


class Unlucky(Regressor):
    """Raises for a seed, takes its process along for another."""

    def on_train_start(self):
        seed = int(os.environ["PL_GLOBAL_SEED"])
        if seed == 4:
            raise ValueError("no luck today")
        if seed == 5:
            os._exit(1)


@pytest.mark.slow
def test_trainings_that_fail_or_kill_their_worker_are_named_and_the_others_go_on(ray_cluster):
    with pytest.warns(UserWarning, match="2 of 3 trainings failed"):
        truth = retrained(Unlucky, workers=RayCluster(retries=1), subsets=[[2, 11]], seeds=[6], baseline_seeds=[4, 5])
    assert truth.unfinished == (Task(None, 4), Task(None, 5))
    torch.testing.assert_close(truth.measurements[0, 0], by_hand(6, [2, 11]), rtol=1e-12, atol=1e-12)
    reasons = {entry["seed"]: entry["reason"] for entry in truth.about["failures"]}
    assert reasons[4] == "ValueError: no luck today"
    assert reasons[5].startswith("its worker was lost (attempts: 2; WorkerCrashedError: ")


@pytest.mark.slow
def test_no_more_is_handed_out_than_a_few_for_each_cpu(ray_cluster):
    drawn = 0

    def items():
        nonlocal drawn
        while drawn < 10**5:
            drawn += 1
            yield drawn

    results = RayCluster().run(abs, items())
    done = [next(results) for _ in range(20)]
    assert all(item == result for item, result in done)
    # two CPUs, and two for each
    assert len(done) <= drawn <= len(done) + 4
    results.close()


@pytest.mark.slow
def test_what_a_worker_cannot_load_is_refused_with_the_way_out(ray_cluster):
    class Here:
        def __reduce__(self):
            return __import__, ("a_package_that_only_the_driver_has",)

    here = Here()
    with pytest.raises(ExecutionError, match=r"ModuleNotFoundError.*a_package.*runtime_env"):
        next(RayCluster().run(lambda item: here, [1]))


@pytest.mark.slow
def test_a_task_of_ray_starts_no_others(ray_cluster):
    import ray

    def nested():
        try:
            next(RayCluster().run(abs, [1]))
        except ExecutionError as error:
            return str(error)

    assert "use no RayCluster here" in ray.get(ray.remote(nested).remote())


def wait_for_a_file_in(directory):
    deadline = time.monotonic() + 300
    while not any(directory.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)


class Waiting(Regressor):
    """Never finishes on one node, which reports its start; on the others, it starts after that."""

    def __init__(self, node, directory):
        super().__init__()
        self.node, self.directory = node, directory

    def on_train_start(self):
        import ray

        if ray.get_runtime_context().get_node_id() == self.node:
            (self.directory / os.environ["PL_GLOBAL_SEED"]).touch()
            time.sleep(600)
        wait_for_a_file_in(self.directory)


@pytest.mark.slow
def test_what_a_lost_node_had_under_way_is_done_on_another_and_stored_once(ray_cluster, tmp_path):
    doomed = ray_cluster.add_node(num_cpus=1)
    started = tmp_path / "started"
    started.mkdir()
    killed = threading.Event()

    def kill():
        wait_for_a_file_in(started)
        if any(started.iterdir()):
            ray_cluster.remove_node(doomed, allow_graceful=False)
            killed.set()

    killer = threading.Thread(target=kill)
    killer.start()
    node, output = doomed.node_id, tmp_path / "truth"
    truth = retrained(lambda: Waiting(node, started), output=output, workers=RayCluster())
    killer.join()
    # what began there never ended there
    assert killed.is_set()
    assert not truth.unfinished
    assert torch.equal(truth.measurements, retrained().measurements)
    stored = Counter()
    for file in output.glob("trainings-*"):
        content = load_file(file)
        stored.update(zip(content["subsets"].tolist(), content["seeds"].tolist(), strict=True))
    assert stored == Counter({(subset, seed): 1 for subset in (-1, 0, 1) for seed in (3, 4)})
