"""Simultaneous intervals: coverage of all means at once, and the extremes that are known."""

import pytest
import torch
from scipy import stats

from lightning_dtda.statistics.simultaneous import simultaneous_intervals


def half_widths(sample, level=0.95):
    low, high = simultaneous_intervals(sample, level)
    assert torch.allclose((low + high) / 2, sample.mean(0))
    return (high - low) / 2 / (sample.std(0) / len(sample) ** 0.5)


def test_one_mean_has_students_interval_and_so_do_copies_of_it():
    sample = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = stats.t.ppf(0.975, 8)
    assert half_widths(sample).item() == pytest.approx(student, rel=1e-9)
    # by simulation: the quantile of 4,000 draws is known to 2 %
    assert half_widths(sample.expand(9, 5) * torch.arange(1, 6)).tolist() == pytest.approx([student] * 5, rel=0.05)


def test_independent_means_need_the_quantile_of_the_largest_of_them():
    # orthogonal columns: exactly uncorrelated in the sample
    columns = torch.linalg.qr(torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    columns = torch.linalg.qr(columns - columns.mean(0)).Q
    sidak = stats.t.ppf(1 - (1 - 0.95 ** (1 / 6)) / 2, 39)
    assert half_widths(columns)[0].item() == pytest.approx(sidak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_all_means_are_covered_at_once_also_with_more_means_than_draws(correlation):
    generator, covered, alone = torch.Generator().manual_seed(2), 0, 0
    for _ in range(400):
        shared, own = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (1, 10))
        sample = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
        low, high = simultaneous_intervals(sample, 0.9)
        covered += bool(((low <= 0) & (high >= 0)).all())
        alone += bool((sample.mean(0).abs() <= stats.t.ppf(0.95, 5) * sample.std(0) / 6**0.5).all())
    # 400 samples: a share of 0.9 is found to within 0.03
    assert covered / 400 > 0.86
    assert alone / 400 < 0.86


def test_a_mean_without_spread_has_an_interval_of_no_length():
    sample = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]], dtype=torch.float64)
    assert simultaneous_intervals(sample, 0.95)[:, 0].tolist() == [1.0, 1.0]
