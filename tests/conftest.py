"""Settings that every test needs."""

import os
import warnings

import lightning.pytorch as pl
import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # sums round alike whatever the machine, and two threads on busy cores are many times slower than one
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_lightning():
    with warnings.catch_warnings():
        for module in ("lightning.pytorch", "lightning.fabric"):
            warnings.filterwarnings("ignore", module=module)
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Found .* module.*in eval mode.*")
        yield


@pytest.fixture
def fit():
    """Train a module on the CPU with nothing but the given callbacks and Trainer arguments."""

    def _fit(module, data, *callbacks, **arguments):
        trainer = pl.Trainer(
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
        trainer.fit(module, data)
        return trainer

    return _fit


def pytest_configure():
    # said before Ray is ever started: a cluster that it starts by itself turns its tokens on for the whole process, and
    # nodes that join an older cluster after that refuse what the others send, for ever
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # as nice as Ray makes them, its workers do not come to work on a busy machine
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster on this machine, its head a node of two CPUs, to which this process is connected."""
    ray = pytest.importorskip("ray", reason="clusters need the extra [ray]")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, logging_level="warning")
    yield cluster
    ray.shutdown()
    cluster.shutdown()
