"""How many seeds and runs are needed: by retraining, simulated, with that many."""

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Energy
from lightning_dtda.statistics.reliability import reliability, top_agreement
from tests.simulated import attribution_of

SCORES = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]
"""Quantiles of a Gaussian: its moments to a percent."""

SIMULATED = 4000


def samples(runs, shift=0.0, scale=1.0, seed=0):
    return shift + scale * np.random.default_rng(seed).standard_normal((SIMULATED, runs))


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5])
def test_as_many_seeds_as_needed_show_a_shift_as_often_as_asked(shift):
    # half as wide without the example: the variances need not be equal
    attribution = attribution_of(SCORES, (shift - 0.5 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], "mean", power=0.8).item())

    def power(seeds):
        y = samples(seeds, shift, 0.5, seed=1)
        return (stats.ttest_ind(samples(seeds), y, axis=1, equal_var=False).pvalue < 0.05).mean()

    # 0.8 to three standard errors of 4,000; rounding up may give more power where seeds are few
    assert power(seeds) > 0.78
    assert power(seeds - 1) < 0.82


def test_as_many_seeds_as_needed_show_a_change_of_the_variance_as_often_as_asked():
    attribution = attribution_of(SCORES, (0.6 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], "variance", power=0.8).item())
    ratio = samples(seeds, scale=1.6).var(1, ddof=1) / samples(seeds, seed=1).var(1, ddof=1)
    p = 2 * np.minimum(stats.f.sf(ratio, seeds - 1, seeds - 1), stats.f.cdf(ratio, seeds - 1, seeds - 1))
    # the logarithm of a sample variance is Gaussian nearly
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_as_many_seeds_as_needed_show_an_energy_distance_as_often_as_asked():
    attribution = attribution_of(SCORES, (0.9 + 0.0 * SCORES)[..., None])
    seeds = int(attribution.retrainings_needed([0], "energy", power=0.8).item())
    x, y = (torch.from_numpy(each[:300].T.copy()) for each in (samples(seeds), samples(seeds, 0.9, seed=1)))
    observed, both = Energy()(x, y), torch.cat([x, y])
    # the permutation test that one would do
    orders = [torch.randperm(2 * seeds, generator=torch.Generator().manual_seed(i)) for i in range(300)]
    permuted = torch.stack([Energy()(both[order[:seeds]], both[order[seeds:]]) for order in orders])
    power = (permuted.quantile(0.95, dim=0) < observed).double().mean().item()
    # 300 retrainings: a standard error of 0.023; and the limit itself is simulated
    assert power == pytest.approx(0.8, abs=0.08)


def test_all_removals_at_once_are_each_on_its_own():
    generator = torch.Generator().manual_seed(0)
    attribution = attribution_of(torch.randn(20, 2, generator=generator), torch.randn(20, 2, 3, generator=generator))
    for difference in ("mean", "variance", "wasserstein"):
        found = attribution.retrainings_needed(difference=difference)
        assert found.shape == (2, 3)
        torch.testing.assert_close(attribution.retrainings_needed([2], difference), found[:, 2])


def test_what_has_no_effect_is_never_shown():
    attribution = attribution_of(SCORES, torch.zeros(400, 1, 1, dtype=torch.float64))
    for difference in ("mean", "variance", "energy"):
        assert attribution.retrainings_needed([0], difference).item() == torch.inf


def test_with_as_many_runs_as_needed_a_shift_is_significant_as_often_as_asked():
    # one removal among 50, of a shift of 0.3 standard deviations that 400 runs know well
    responses = torch.zeros(400, 1, 50, dtype=torch.float64)
    responses[..., 0] = 0.3 + SCORES
    attribution = attribution_of(SCORES, responses)
    runs = int(attribution.runs_for_significance("mean", fdr=0.05, power=0.8)[0, 0])
    limit = stats.t.isf(0.05 / 50 / 2, runs - 1)
    # the spread over 400 quantiles is not quite one; Student's t has slightly more spread than a Gaussian
    assert stats.nct.sf(limit, runs - 1, 0.3 * runs**0.5) == pytest.approx(0.8, abs=0.03)


def test_with_as_many_runs_as_needed_a_change_of_the_variance_is_significant_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)

    def simulated(runs, examples):
        x, noise = torch.randn(2, runs, examples, generator=generator, dtype=torch.float64)
        return attribution_of(x, (0.05 * x + 0.15 * noise)[..., None])

    # what few runs estimate spreads; the middle one of many small ensembles is right
    needed = simulated(40, 2000).runs_for_significance("variance", fdr=0.001, power=0.8)
    p = simulated(int(needed.median()), 4000).p_values("variance")
    # or more often: far out, p-values fall faster than the number of runs says
    assert 0.77 < (p < 0.001).double().mean().item() < 0.92


def test_fewer_runs_than_there_are_would_do_exactly_where_a_removal_is_significant_on_its_own():
    attribution = simulated_runs(16, 300, 3.0, 0)
    alone = attribution.p_values("mean") <= 0.05 / 300
    assert 0 < alone.sum() < 300
    # as likely as not: at a power of one half
    assert torch.equal(attribution.runs_for_significance("mean", power=0.5) <= 16, alone)


def test_a_test_that_cannot_have_so_small_a_p_value_asks_for_runs_that_let_it():
    x = torch.tensor([-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    responses = torch.zeros(8, 1, 1000, dtype=torch.float64)
    responses[..., 0] = x  # all choices of signs but one make less of it
    attribution = attribution_of(x, responses)
    assert attribution.p_values("variance")[0, 0].item() == pytest.approx(2**-7)
    # 2^-15 is the first p-value below 0.05 / 1000, however lucky the runs are
    assert attribution.runs_for_significance("variance", power=0.1)[0, 0].item() == 16
    # two thousand exchanges have no p-value below 1 / 2000
    assert attribution.runs_for_significance("tail")[0, 0].item() == torch.inf


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
    ],
)
def test_senseless_questions_are_refused(call, match):
    with pytest.raises(AttributionError, match=match):
        call(simulated_runs(16, 100, 1.0, 0))
