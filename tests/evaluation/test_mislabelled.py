"""Detection of wrong labels against SciPy and counting."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from lightning_dtda import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import MislabelDetection
from lightning_dtda.evaluation.functional import mislabel_detection


def suspicions(scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(200, generator=generator) < 0.1
    return scale * (torch.randn(200, generator=generator) + 1.5 * wrong), wrong


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_area_is_the_probability_to_rank_a_wrong_one_first_at_any_scale(scale):
    suspicion, wrong = suspicions(scale)
    pairs = int(wrong.sum()) * int((~wrong).sum())
    expected = mannwhitneyu(suspicion[wrong].numpy(), suspicion[~wrong].numpy()).statistic / pairs
    # torchmetrics integrates in single precision
    assert mislabel_detection(suspicion, wrong)["auroc"].item() == pytest.approx(expected, abs=1e-6)


def test_curve_counts_the_wrong_ones_among_the_most_suspicious():
    suspicion, wrong = suspicions(1.0)
    found = mislabel_detection(suspicion, wrong, inspected=[0.1, 0.5, 1.0])
    order = np.argsort(-suspicion.numpy())
    for share, counted in zip([0.1, 0.5, 1.0], found["found"].tolist(), strict=True):
        expected = wrong.numpy()[order[: round(share * 200)]].sum() / int(wrong.sum())
        assert counted == pytest.approx(expected, rel=1e-12)
    assert found["curve"].shape == (200,)
    assert (found["mislabelled"], found["examples"]) == (wrong.sum(), 200)


def test_equal_suspicion_finds_what_looking_at_random_does():
    wrong = torch.tensor([True, True, False, False])
    found = mislabel_detection(torch.ones(4), wrong, inspected=[0.25, 0.5])
    assert found["auroc"] == 0.5
    assert found["found"].tolist() == [0.25, 0.5]


def test_batches_and_half_precision_give_the_same():
    suspicion, wrong = suspicions(1.0)
    metric = MislabelDetection()
    for rows in (slice(0, 70), slice(70, 200)):
        metric.update(suspicion[rows].half(), wrong[rows])
    expected = mislabel_detection(suspicion.half().double(), wrong)
    for name, value in metric.compute().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("suspicion", "wrong", "inspected", "message"),
    [
        (torch.ones(3), torch.tensor([True, False]), [0.1], "a number and a bool"),
        (torch.ones(2), torch.tensor([1, 0]), [0.1], "a number and a bool"),
        (torch.tensor([torch.nan, 1]), torch.tensor([True, False]), [0.1], "contains NaN"),
        (torch.ones(2), torch.tensor([True, True]), [0.1], "both wrong and correct"),
        (torch.ones(2), torch.tensor([True, False]), [10], "above 0 and at most 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(suspicion, wrong, inspected, message):
    with pytest.raises(AttributionError, match=message):
        mislabel_detection(suspicion, wrong, inspected)


def test_examples_whose_removal_lowers_the_loss_are_suspicious():
    wrong = torch.arange(20) < 3
    responses = torch.where(wrong, -0.5, 0.1).expand(8, 2, 20)  # the loss on two queries falls without the wrong ones
    attribution = Attribution(torch.ones(8, 2), responses, tuple("abcdefgh"), (0, 1))
    found = mislabel_detection(-attribution.influence("mean").mean(0), wrong, inspected=[0.15])
    assert (found["auroc"], found["found"]) == (1, 1)


def test_the_curve_of_inspection_is_plotted():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = MislabelDetection()
    metric.update(*suspicions(1.0))
    _, axes = metric.plot()
    inspected, found = axes.lines[0].get_xdata(), axes.lines[0].get_ydata()
    np.testing.assert_allclose(found[1:], metric.compute()["curve"])
    np.testing.assert_allclose(inspected, np.arange(201) / 200, atol=1e-6)
    assert (found[0], axes.get_ylabel()) == (0, "share of the wrong labels found")
    pyplot.close("all")
