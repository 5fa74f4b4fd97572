import pytest

from lightning_dtda import Run, TrajectoryRecorder


@pytest.fixture(autouse=True)
def _no_seed_left_behind(monkeypatch):
    # seed_everything writes to the environment; setting the variable first lets monkeypatch take it away again
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def record(fit, root):
    """Train with a recorder, ``recorder`` being its further arguments, and return the run."""

    def _record(module, data, *callbacks, recorder=None, **arguments):
        fit(module, data, *callbacks, TrajectoryRecorder(root, "run", **(recorder or {})), **arguments)
        return Run(root / "run")

    return _record
