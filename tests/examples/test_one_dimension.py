"""One dimension: the small version of the example."""

import pytest
import torch

from examples.one_dimension.curve import ISOLATED, Curve, Points, data
from examples.one_dimension.one_dimension import (
    QUERY,
    answer,
    bootstrap,
    correlate,
    figure,
    interval,
    leave_one_out,
    make_trainer,
)
from lightning_dtda import Ensemble, TrajectoryRecorder, record


def covered(scale, shift, simulations=40, seeds=256):
    """Return how often the interval of W_2 holds the distance of N(shift, scale²) from N(0, 1), and the median."""
    generator, held, estimates = torch.Generator().manual_seed(0), 0, []
    truth = (shift**2 + (scale - 1) ** 2) ** 0.5
    for _ in range(simulations):
        x, y = torch.randn(2, seeds, generator=generator)
        estimate, draws = bootstrap(x, scale * y[None] + shift, draws=150)["wasserstein"]
        low, high = interval(draws[:, 0])
        held += low <= truth <= high
        estimates.append(estimate)
    return held / simulations, float(torch.cat(estimates).median()), truth


@pytest.mark.parametrize(("scale", "shift"), [(1.5, 0.0), (1.0, 0.5), (2.0, 1.0)])
def test_the_distance_is_neither_biased_nor_too_sure(scale, shift):
    share, middle, truth = covered(scale, shift)
    assert share >= 0.87  # 0.95 is expected, and known to 0.034
    assert middle == pytest.approx(truth, rel=0.1)


def test_no_distance_is_found_where_there_is_none():
    share, middle, _ = covered(1.0, 0.0)
    assert share >= 0.87
    assert middle < 0.05  # the plain estimate is 0.11


@pytest.mark.slow
def test_the_isolated_point_holds_the_functions_together(tmp_path):
    def trainer():
        return make_trainer(max_steps=400)

    recorder = TrajectoryRecorder(tmp_path / "runs", gradients="none")
    record(lambda: (trainer(), Curve(), Points()), recorder, 12, stacked=True, progress=False)
    attribution = answer(Ensemble.open(tmp_path / "runs"))
    truth = leave_one_out(None, seeds=range(10_000, 10_012), trainer=trainer)
    assert truth.measurements.shape[:2] == (len(data()[0]), 12)
    found = bootstrap(truth.baseline[:, QUERY], truth.measurements[..., QUERY], draws=100)
    ratios = truth.measurements[..., QUERY].std(1) / truth.baseline[:, QUERY].std()
    assert ratios[ISOLATED] > 1.5
    edge = int(attribution.influence("mean")[0].abs().argmax())
    assert edge == 17
    assert truth.influence("mean")[QUERY, edge] * attribution.influence("mean")[0, edge] > 0
    assert -1 <= correlate(attribution, truth, "mean", "pearson", replicates=0)["score"] <= 1
    assert figure(attribution, truth, {"mean": 17, "wasserstein": ISOLATED}, found).data
