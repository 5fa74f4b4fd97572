"""Influence functions as a transport map: the small version of the example."""

import lightning.pytorch as pl
import pytest

from examples.transport.double_well import DoubleWell, Wells
from examples.transport.transport import SCALES, by_quadrature, by_sampling, figure
from lightning_dtda import Ensemble, TrajectoryRecorder, record


@pytest.mark.slow
def test_the_divergence_is_least_for_the_map_of_influence_functions():
    rows = by_quadrature()
    shifts, between = rows["shifts the wells"]
    assert min(shifts) == shifts[SCALES.index(1.0)] < 0.01 * shifts[0]
    assert between < 0.2 * min(shifts)
    tilts, between = rows["tilts the wells"]
    # no map within the wells moves probability from one to the other
    assert between <= min(tilts) == pytest.approx(between, rel=0.01)


@pytest.mark.slow
def test_runs_without_the_example_are_predicted_in_distribution(tmp_path):
    def make():
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return pl.Trainer(max_steps=400, max_epochs=-1, accelerator="cpu", **quiet), DoubleWell(), Wells()

    record(make, TrajectoryRecorder(tmp_path / "runs"), 24, progress=False)
    samples, distances, exact = by_sampling(Ensemble.open(tmp_path / "runs"))
    for name in ("influence functions", "unrolled differentiation"):
        assert distances[name] < 1.5 * exact[2] < distances["as trained"]
    assert figure(by_quadrature(), samples).data
