"""How many seeds and runs are needed: by retraining, simulated, with that many."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics import Mean, Quantile, Spread
from lightning_dtda.statistics.power import (
    detectable,
    detectable_spread,
    retrainings_needed,
    runs_for_significance,
    runs_to_detect,
)
from lightning_dtda.statistics.reliability import reliability, top_agreement
from tests.simulated import attribution_of

SCORES = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]
"""Quantiles of a Gaussian: its moments to a percent."""

SIMULATED = 4000


def samples(runs, shift=0.0, scale=1.0, seed=0):
    return shift + scale * np.random.default_rng(seed).standard_normal((SIMULATED, runs))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power_of_t(effect, runs, alpha):
    return stats.nct.sf(stats.t.isf(alpha / 2, runs - 1), runs - 1, effect * runs**0.5)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 1000])
@pytest.mark.parametrize("effect", [0.1, 0.5, 2.0])
def test_the_number_of_runs_is_the_first_with_the_power_of_students_t(effect, alpha):
    runs = int(runs_to_detect(torch.tensor([effect], dtype=torch.float64), alpha, 0.8))
    # to the interpolation of noncentralities between degrees of freedom
    assert power_of_t(effect, runs, alpha) > 0.8 - 1e-4
    assert power_of_t(effect, runs - 1, alpha) < 0.8 + 1e-4
    assert power_of_t(detectable(runs - 1, alpha, 0.8) / runs**0.5, runs, alpha) == pytest.approx(0.8, abs=1e-4)


def test_a_rise_of_the_spread_that_is_said_to_be_found_is():
    rise = detectable_spread(0.1, runs=20, alpha=0.05, power=0.8)
    x, noise = normal(2, 20, SIMULATED, seed=1)
    independent = 0.1**2 * 19
    y = np.exp(rise) * ((1 - independent) ** 0.5 * x + independent**0.5 * noise)
    # 400 simulated ensembles found it: a standard error of 0.02
    assert (Spread().p_values(x, y) <= 0.05).double().mean().item() == pytest.approx(0.8, abs=0.06)
    assert detectable_spread(0.1, runs=8, alpha=1e-6, power=0.8) == torch.inf


@pytest.mark.parametrize("runs", [8, 20, 64])
@pytest.mark.parametrize("effect", [0.6, 1.2])
def test_ranges_of_runs_hold_the_right_number_as_often_as_they_say(effect, runs):
    alpha = 0.05 / 200
    p = Mean().p_values(torch.zeros(runs, 1, dtype=torch.float64), effect + normal(runs, SIMULATED))
    low, estimate, high = runs_for_significance(Mean(), p, runs, alpha, power=0.8, level=0.8)
    right = runs_to_detect(torch.tensor(effect, dtype=torch.float64), alpha, 0.8)
    held = ((low <= right) & (right <= high)).double().mean().item()
    # three standard errors of 4,000; more where numbers are few, since they are whole
    assert 0.78 < held < 0.9
    assert power_of_t(effect, int(estimate.median()), alpha) == pytest.approx(0.8, abs=0.06)


def with_few_effects(runs, seed, examples=200):
    """Runs of examples of which a tenth have effects, and their sizes."""
    effects = torch.zeros(examples, dtype=torch.float64)
    effects[: examples // 10] = 0.6 * normal(examples // 10, seed=1000 + seed)
    responses = effects + normal(runs, examples, seed=seed)
    return attribution_of(normal(runs, 1, seed=2000 + seed), responses[:, None]), effects


def test_ranges_hold_for_the_example_that_looks_clearest():
    held = too_low = 0
    for seed in range(100):
        attribution, effects = with_few_effects(20, seed)
        clearest = int(attribution.p_values("mean")[0].argmin())
        right = float(runs_to_detect(effects[clearest], 0.05 / 200, 0.8))
        low, estimate, high = (each[0, clearest].item() for each in attribution.runs_for_significance("mean"))
        held += low <= right <= high
        too_low += estimate < right
    assert held >= 80 - 12  # three standard errors
    assert too_low > 65  # what is selected because it looks clear is overestimated


def test_ranges_of_retrainings_hold_for_the_largest_significant_effect():
    held = too_low = number = 0
    for seed in range(100):
        attribution, effects = with_few_effects(20, seed)
        largest = attribution.influence("mean")[0].abs().where(attribution.significant("mean")[0], 0.0)
        if not largest.any():
            continue
        shown = int(largest.argmax())
        # Var X = 1 and Var Y = 2
        right = (power_of_welch(effects[shown].item(), n) >= 0.8 for n in range(2, 4000))
        right = next((n for n, enough in enumerate(right, 2) if enough), np.inf)
        low, estimate, high = (each[0, shown].item() for each in attribution.retrainings_needed())
        held, too_low, number = held + (low <= right <= high), too_low + (estimate < right), number + 1
    assert number > 50
    assert held >= 0.8 * number - 3 * (0.16 * number) ** 0.5
    assert too_low > 0.6 * number


def power_of_welch(shift, seeds, of_x=1.0, of_y=2.0):
    """Power of Welch's test at 0.05, with the degrees of freedom of the true variances."""
    freedom = (seeds - 1) * (of_x + of_y) ** 2 / (of_x**2 + of_y**2)
    return stats.nct.sf(stats.t.isf(0.025, freedom), freedom, abs(shift) * (seeds / (of_x + of_y)) ** 0.5)


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5])
def test_the_estimated_number_of_retrainings_shows_a_shift_as_often_as_asked(shift):
    # half as wide without the example: the variances need not be equal
    attribution = attribution_of(SCORES, (shift - 0.5 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], "mean", power=0.8).estimate)

    def power(seeds):
        y = samples(seeds, shift, 0.5, seed=1)
        return (stats.ttest_ind(samples(seeds), y, axis=1, equal_var=False).pvalue < 0.05).mean()

    # 0.8 to three standard errors of 4,000; rounding up may give more power where seeds are few
    assert power(seeds) > 0.78
    assert power(seeds - 1) < 0.82


@pytest.mark.parametrize("difference", ["variance", "spread"])
def test_the_estimated_number_of_retrainings_shows_a_change_of_the_variance_as_often_as_asked(difference):
    attribution = attribution_of(SCORES, (0.6 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], difference, power=0.8).estimate)
    ratio = samples(seeds, scale=1.6).var(1, ddof=1) / samples(seeds, seed=1).var(1, ddof=1)
    p = 2 * np.minimum(stats.f.sf(ratio, seeds - 1, seeds - 1), stats.f.cdf(ratio, seeds - 1, seeds - 1))
    # by another test: that of Gaussian samples
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.05)


def test_distances_are_planned_by_mean_and_spread_with_half_of_the_level_each():
    attribution = attribution_of(SCORES, (0.9 + 0.0 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], "energy", power=0.8).estimate)
    p = stats.ttest_ind(samples(seeds), samples(seeds, 0.9, seed=1), axis=1, equal_var=False).pvalue
    assert (p < 0.025).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("runs", [8, 20])
def test_ranges_of_retrainings_hold_the_right_number_as_often_as_they_say(runs):
    x, noise = normal(2, runs, SIMULATED)
    y = 0.6 * x + 0.3 * noise + 0.8
    right = {
        "mean": next(n for n in range(2, 100) if power_of_welch(0.8, n, 1.0, 0.45) >= 0.8),
        # by the F-test: the logarithm of a sample variance has a variance of nearly 2 / (n - 1)
        "spread": 1 + (stats.norm.isf([0.025, 0.2]).sum() / (np.log(0.45) / 2)) ** 2,
    }
    for difference in (Mean(), Spread()):
        low, _, high = retrainings_needed(difference, x, y, power=0.8, alpha=0.05, level=0.8)
        held = ((low <= right[difference.name]) & (right[difference.name] <= high)).double().mean().item()
        assert held > 0.78, difference.name


def test_a_removal_made_alone_has_a_narrower_range_than_among_all():
    attribution = attribution_of(normal(20, 2), normal(20, 2, 3, seed=1) + 1)
    for difference in ("mean", "variance", "wasserstein"):
        low, estimate, high = attribution.retrainings_needed(difference=difference)
        alone = attribution.retrainings_needed([2], difference)
        assert low.shape == (2, 3)
        torch.testing.assert_close(alone.estimate, estimate[:, 2])
        assert (alone.low >= low[:, 2]).all()
        assert (alone.high <= high[:, 2]).all()


def test_what_has_no_effect_is_never_shown():
    attribution = attribution_of(SCORES, torch.zeros(400, 1, 1, dtype=torch.float64))
    for difference in ("mean", "variance", "energy"):
        assert [each.item() for each in attribution.retrainings_needed([0], difference)] == 3 * [torch.inf]


def test_differences_without_a_plan_are_refused_and_the_advice_works():
    attribution = simulated_runs(16, 3, 1.0, 0)
    for difference in (Quantile(0.5), Mean("median"), Mean("trimmed")):
        with pytest.raises(AttributionError, match='Give difference="mean" or "spread"'):
            attribution.retrainings_needed([0], difference)
    attribution.retrainings_needed([0], difference="mean")
    attribution_of(normal(16, 1), normal(16, 1, 3, seed=1)).retrainings_needed([0], difference="spread")


def test_ranges_of_runs_hold_the_right_number_for_a_change_of_the_spread():
    def p_values(runs, seed):
        x, noise = normal(2, runs, SIMULATED, seed=seed)
        return Spread().p_values(x, 0.6 * x + 0.3 * noise)

    right = 20
    assert (p_values(right, 1) <= 0.05).double().mean().item() == pytest.approx(0.8, abs=0.03)
    for runs in (8, 20):
        low, _, high = runs_for_significance(Spread(), p_values(runs, 2), runs, 0.05, power=0.8, level=0.8)
        assert ((low <= right) & (right <= high)).double().mean().item() > 0.78


def test_fewer_runs_than_there_are_would_do_exactly_where_a_removal_is_significant_on_its_own():
    attribution = simulated_runs(16, 300, 3.0, 0)
    alone = attribution.p_values("mean") <= 0.05 / 300
    assert 0 < alone.sum() < 300
    # as likely as not: at a power of one half
    assert torch.equal(attribution.runs_for_significance("mean", power=0.5).estimate <= 16, alone)


def test_a_test_that_cannot_have_so_small_a_p_value_asks_for_runs_that_let_it():
    x = torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    responses = torch.zeros(8, 1, 1000, dtype=torch.float64)
    responses[..., 0] = x  # all choices of signs but one make less of it
    attribution = attribution_of(x, responses)
    assert attribution.p_values("variance")[0, 0].item() == pytest.approx(2**-7)
    # 2^-15 is the first p-value below 0.05 / 1000, however lucky the runs are
    assert attribution.runs_for_significance("variance", power=0.1).low[0, 0].item() == 16
    # two thousand exchanges have no p-value below 1 / 2000
    assert attribution.runs_for_significance("tail").low[0, 0].item() == torch.inf


def simulated_runs(runs, examples, noise, seed):
    """Runs of which each adds noise to the effects of the examples."""
    generator = torch.Generator().manual_seed(seed)
    effects = torch.randn(examples, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    responses = effects + noise * torch.randn(runs, 1, examples, generator=generator, dtype=torch.float64)
    return attribution_of(torch.zeros(runs, 1, dtype=torch.float64), responses)


@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_with_as_many_runs_as_needed_the_top_is_as_stable_as_asked(noise):
    # from 16 runs; 12 ensembles, for what one estimates depends on its runs
    few = [simulated_runs(16, 2000, noise, seed).runs_for_stable_top(k=40, agreement=0.8).item() for seed in range(12)]
    needed = round(float(np.median(few)))
    two = [simulated_runs(needed, 2000, noise, seed).influence("mean")[0].abs().topk(40).indices for seed in (50, 51)]
    shared = len(set(two[0].tolist()) & set(two[1].tolist())) / 40
    # a share of 40 is known to 0.06 in one pair of ensembles, and the estimates spread by a fifth
    assert shared == pytest.approx(0.8, abs=0.12)


def test_the_number_of_runs_is_that_of_the_noise():
    # four times the variance of the noise takes four times the runs
    quiet, loud = (
        np.median(
            [
                simulated_runs(24, 2000, noise, seed).runs_for_stable_top(k=40, agreement=0.8).item()
                for seed in range(12)
            ]
        )
        for noise in (2.0, 4.0)
    )
    assert loud / quiet == pytest.approx(4, rel=0.3)


def test_stable_tops_need_no_more_runs_and_noise_never_enough():
    attribution = simulated_runs(16, 100, 1e-6, 0)
    assert attribution.runs_for_stable_top(k=5).item() <= 8
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 1, 2000, generator=generator, dtype=torch.float64)
    assert attribution_of(torch.zeros(16, 1), noise).runs_for_stable_top(k=5).item() > 1000


def test_agreement_of_the_top_and_reliability_go_together():
    attribution = simulated_runs(16, 500, 3.0, 0)

    def influence(half):
        return attribution.responses[half].mean(0)

    assert 0 < top_agreement(influence, 16, 20).item() < reliability(influence, 16).item()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a: a.runs_for_stable_top(k=100), "k=100; give a number from 1 to 99"),
        (lambda a: a.runs_for_stable_top(k=0), "k=0"),
        (lambda a: a.runs_for_stable_top(agreement=1.0), "agreement=1.0"),
        (lambda a: a.retrainings_needed([0], power=0.0), "power=0.0"),
        (lambda a: a.retrainings_needed([0], alpha=2.0), "alpha=2.0"),
        (lambda a: a.runs_for_significance("mean", fdr=0.0), "fdr=0.0"),
        (lambda a: a.runs_for_significance("mean", power=1.0), "power=1.0"),
        (lambda a: a.runs_for_significance("mean", level=1.0), "level=1.0"),
        (lambda a: a.retrainings_needed([0], level=0.0), "level=0.0"),
    ],
)
def test_senseless_questions_are_refused(call, match):
    with pytest.raises(AttributionError, match=match):
        call(simulated_runs(16, 100, 1.0, 0))
