"""Variance on MNIST: the small version of the example."""

import lightning.pytorch as pl
import pytest
import torch

from examples.mnist_variance.digits import Classifier, Digits
from examples.mnist_variance.mnist_variance import (
    COLOURS,
    answer,
    choose,
    compare,
    confirm,
    figure,
    holm,
    make_trainer,
    undecided,
)
from lightning_dtda import Attribution, Ensemble, GroundTruth, TrajectoryRecorder, record

RUNS = tuple(f"seed-{seed:04d}" for seed in range(64))


def test_groups_for_the_variance_leave_the_mean_alone():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(64, 1, generator=generator)
    responses = 1e-3 * torch.randn(64, 1, 50, generator=generator)
    centred = baseline - baseline.mean()
    responses[:, :, 3] += 0.1 * centred - 0.01  # without it, the deviation is larger
    responses[:, :, 7] -= 0.1 * centred - 0.01
    responses[:, :, 8] -= 0.1 * centred + 0.01
    responses[:, :, 9] += 0.2 * centred + 0.5  # the largest change of the variance, but also of the mean
    responses[:, :, 10] += 0.15 * centred + 0.5
    responses[:, :, 11] += 0.7  # the mean alone
    (groups,) = choose(Attribution(baseline, responses, RUNS, (0,)), number=2)
    assert groups["variance up"] == [9, 3]  # and not 10, which moves the mean in the same direction
    assert sorted(groups["variance down"]) == [7, 8]
    assert 11 in groups["mean"]


def test_a_change_of_the_variance_is_told_from_one_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(64, 1, generator=generator)
    attribution = Attribution(baseline, torch.zeros(64, 1, 4), RUNS, (0,))
    real = torch.stack([2 * baseline - baseline.mean(), baseline + baseline.std(), baseline.flip(0), baseline])
    seeds, groups = tuple(range(64)), [{name: [k] for k, name in enumerate(COLOURS)}]
    truth = GroundTruth(real, baseline, tuple((k,) for k in range(4)), (0,), seeds, seeds)
    wider, shifted, other, same = compare(attribution, truth, groups)
    assert wider["ratio"] == pytest.approx([4, 4, 4], rel=0.01)
    assert wider["shift"][1] < 0 < wider["shift"][2]
    assert shifted["shift"] == pytest.approx([1, 1, 1], rel=0.01)
    assert shifted["ratio"] == pytest.approx([1, 1, 1], rel=0.01)
    assert other["ratio"][1] < 1 < other["ratio"][2]
    assert same["p of ratio"] == same["p of shift"] == 1
    assert wider["p of ratio"] < 0.05 < other["p of ratio"]


def test_p_values_are_adjusted_by_holm():
    assert holm(torch.tensor([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])


@pytest.mark.slow
def test_everything_on_few_images(tmp_path):
    def trainer() -> pl.Trainer:
        return make_trainer(max_steps=60)

    data = Digits(size=200)
    data.setup("fit")
    recorder = TrajectoryRecorder(tmp_path / "runs", gradients="none")
    record(lambda: (trainer(), Classifier(), Digits(size=200)), recorder, 8, stacked=True, progress=False)
    ensemble = Ensemble.open(tmp_path / "runs")
    queries = undecided(ensemble, data, number=2)
    attribution = answer(ensemble, data, queries, None)
    assert attribution.responses.shape == (8, 2, 200)
    share = (attribution.baseline > 0).double().mean(0)
    assert ((share > 0) & (share < 1)).all()  # the seed decides
    groups = choose(attribution, number=6)
    truth = confirm(data, queries, groups, 4, None, trainer)
    rows = compare(attribution, truth, groups)
    assert len(rows) == 2 * len(COLOURS)
    by_mean = [row for row in rows if row["group"] == "mean"]
    assert all(row["predicted shift"] * row["shift"][0] > 0 for row in by_mean)
    assert figure(data, queries, groups, rows).data
