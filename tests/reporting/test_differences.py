"""Each difference in words: sign, unit, and what its parameters are."""

import pytest
import torch

from lightning_dtda.reporting.differences import describe
from lightning_dtda.statistics.differences import DIFFERENCES, GaussianKL, Mean, Quantile, SlicedWasserstein, Tail


@pytest.mark.parametrize("name", [*DIFFERENCES, "sliced_wasserstein"])
def test_every_difference_that_is_built_in_has_words_of_its_own(name):
    words = describe(name, "margin", "group")
    assert name not in (words.formula, words.title), "the words for an unknown difference are its name"
    for text in (words.question, words.meaning, words.short):
        assert "margin" in text
    assert "group" in words.question
    assert "if the group is removed" in words.meaning


def test_parameters_are_put_into_words():
    assert "that 25 % of the runs do not exceed" in describe(Quantile(0.25), "loss").meaning
    assert "over the highest 10 % of the runs" in describe(Tail(0.9), "loss").meaning
    assert "over the lowest 20 % of the runs" in describe(Tail(0.8, "lower"), "loss").meaning
    assert describe(Mean("median"), "loss").title == "Median influence"
    assert "without the fifths that change most and least" in describe(Mean("trimmed"), "loss").meaning


def test_the_sign_in_words_is_that_of_the_numbers():
    x, higher = torch.arange(10.0), torch.arange(10.0) + 1
    for difference in (Mean(), Mean("median"), Mean("trimmed"), Quantile(0.3), Tail(0.5)):
        assert describe(difference, "loss").meaning.startswith("change of the")
        assert difference(x, higher) > 0


def test_units_are_how_the_numbers_scale():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 1, generator=generator, dtype=torch.float64)
    powers = {"the loss's unit": 1, "the square of the loss's unit": 2, "the square root of the loss's unit": 0.5}
    for difference in (*DIFFERENCES.values(), SlicedWasserstein()):
        x2, y2 = (x[..., None], y[..., None]) if difference.name == "sliced_wasserstein" else (x, y)
        power = powers.get(describe(difference, "loss").unit, 0)
        torch.testing.assert_close(difference(9 * x2, 9 * y2), 9**power * difference(x2, y2))


def test_a_divergence_of_a_half_is_a_shift_by_one_standard_deviation():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert describe(GaussianKL(), "loss").unit == "nats; a shift by one standard deviation is 0.5"
    assert GaussianKL()(x, x + x.std()).item() == pytest.approx(0.5, abs=1e-5)


def test_a_difference_of_ones_own_is_introduced_by_its_name():
    class Range:
        name, least_runs = "range", 2

        def __call__(self, baseline, predicted):
            return predicted.amax(0) - predicted.amin(0) - baseline.amax(0) + baseline.amin(0)

    words = describe(Range(), "loss")
    assert words.title == "range influence"
    assert words.unit == "the unit of range"
