"""Each difference in words: sign, unit, and what its parameters are."""

import pytest
import torch

from lightning_dtda.reporting.wording import describe
from lightning_dtda.statistics.differences import (
    DIFFERENCES,
    GaussianKL,
    Mean,
    Quantile,
    SlicedWasserstein,
    Spread,
    Tail,
    Variance,
)

ALL = [*DIFFERENCES.values(), SlicedWasserstein(), Mean("median"), Mean("trimmed"), Quantile(0.25), Tail(0.8, "lower")]


@pytest.mark.parametrize("difference", ALL, ids=lambda difference: difference.name)
def test_every_difference_speaks_of_the_measurement_and_of_what_is_removed(difference):
    words = describe(difference, "margin {of} a class", "group")
    for text in (words.question, words.meaning, words.short):
        assert "margin {of} a class" in text
    assert "group" in words.question
    assert "if the group is removed" in words.meaning
    assert "group" in words.reading or "Never negative" in words.reading
    assert not {"{measurement}", "{removed}"} & set(" ".join(vars(words).values()).split())


def test_parameters_are_put_into_words_and_names():
    assert "that 25 % of the runs do not exceed" in describe(Quantile(0.25), "loss").meaning
    assert "over the highest 10 % of the runs" in describe(Tail(0.9), "loss").meaning
    assert "over the lowest 20 % of the runs" in describe(Tail(0.8, "lower"), "loss").meaning
    assert describe(Mean("median"), "loss").title == "median influence"
    assert "without the fifths that change most and least" in describe(Mean("trimmed"), "loss").meaning
    assert len({difference.name for difference in ALL}) == len(ALL)


def test_the_sign_in_words_is_that_of_the_numbers():
    x, higher, apart = torch.arange(10.0), torch.arange(10.0) + 1, 2 * torch.arange(10.0)
    for difference in (each for each in ALL if not each.joint):
        y = apart if isinstance(difference, Spread | Variance) else higher
        assert describe(difference, "loss").meaning.startswith("change of") == difference.signed
        assert difference(x, y) > 0
        assert (difference(y, x) < 0) == difference.signed


def test_units_are_how_the_numbers_scale():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, 1, generator=generator, dtype=torch.float64)
    powers = {"the loss's unit": 1, "the square of the loss's unit": 2, "the square root of the loss's unit": 0.5}
    for difference in ALL:
        x2, y2 = (x[..., None], y[..., None]) if difference.joint else (x, y)
        power = powers.get(describe(difference, "loss").unit, 0)
        torch.testing.assert_close(difference(9 * x2, 9 * y2), 9**power * difference(x2, y2))


def test_a_divergence_of_a_half_is_a_shift_by_one_standard_deviation():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert describe(GaussianKL(), "loss").unit == "nats; a shift by one standard deviation is 0.5"
    assert GaussianKL()(x, x + x.std()).item() == pytest.approx(0.5, abs=1e-5)
