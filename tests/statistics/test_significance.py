"""Tests of no effect: against SciPy, false discoveries and power on simulated seeds."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import (
    Difference,
    Energy,
    Quantile,
    Spread,
    Tail,
    Variance,
    Wasserstein,
)
from lightning_dtda.statistics.significance import equivalence_p_values, exchange_test
from lightning_dtda.statistics.signs import sign_test
from tests.simulated import KINDS, attribution_of, without_effect

ENSEMBLES, EXAMPLES = 400, 200
"""Ensembles are the queries of one attribution: they are independent, and each is tested on its own."""


@pytest.fixture
def attribution():
    return without_effect("gaussian", runs=12, queries=3, examples=5)


def test_p_values_of_the_mean_are_those_of_the_t_test(attribution):
    expected = stats.ttest_1samp(attribution.responses.numpy(), 0).pvalue
    np.testing.assert_allclose(attribution.p_values("mean"), expected, rtol=1e-8)


def of_all_signs(terms):
    """Share of all choices of signs that make a sum as large, by counting."""
    runs = len(terms)
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=runs)), dtype=torch.float64)
    return ((signs @ terms).abs() >= terms.sum(0).abs() * (1 - 1e-9)).double().mean(0)


def test_the_p_values_of_the_variance_are_those_of_the_spread(attribution):
    assert torch.equal(attribution.p_values("variance"), attribution.p_values("spread"))


def test_p_values_of_the_spread_are_the_larger_of_students_t_and_of_exchanged_pairs():
    attribution = without_effect("heteroscedastic", runs=9, queries=1, examples=50)
    x, noise = attribution.baseline, attribution.responses[:, 0]
    y = x + noise + 0.2 * x + 3
    squares = ((x + y) / 2 - ((x + y) / 2).mean(0)).square()
    weights = (1 + squares / squares.mean(0)) ** -2
    moved = y - (weights * (y - x)).sum(0) / weights.sum(0)
    # differences of variances themselves, of all exchanges, in place of the sums they come down to
    counted = torch.zeros(50, dtype=torch.float64)
    observed = Variance()(x, y).abs()
    for pattern in product([False, True], repeat=9):
        exchanged = torch.tensor(pattern)[:, None]
        difference = Variance()(torch.where(exchanged, moved, x), torch.where(exchanged, x, moved))
        counted += difference.abs() >= observed * (1 - 1e-9)
    t = (Spread()(x, y) / Spread().standard_error(x, y)).abs().numpy()
    expected = torch.as_tensor(2 * stats.t.sf(t, 8)).maximum(counted / 2**9)
    # sums of 9 terms move in jumps: the smooth approximation is between the shares before and after one
    assert ((Spread().p_values(x, y) / expected).log().abs() < 1).all()


def test_the_standard_error_of_the_spread_takes_each_run_relative_to_the_others():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64).numpy()
    terms = np.stack(
        [
            (y.var(0) / np.delete(y, s, 0).var(0, ddof=1) - x.var(0) / np.delete(x, s, 0).var(0, ddof=1)) * 7 / 12
            for s in range(7)
        ]
    )
    expected = (6 / 7 * ((terms - terms.mean(0)) ** 2).sum(0)) ** 0.5
    np.testing.assert_allclose(Spread().standard_error(torch.tensor(x), torch.tensor(y)), expected, rtol=1e-10)


@pytest.mark.parametrize("runs", [12, 15])
def test_shares_of_signs_are_those_that_one_counts(runs):
    generator = torch.Generator().manual_seed(0)
    x, e = torch.randn(2, runs, 400, generator=generator, dtype=torch.float64)
    terms = x * (e + 0.7 * x)
    ratio = sign_test(terms) / of_all_signs(terms)
    # down to the smallest that there are, 2^(1 - runs), where a jump of the count is a factor of two
    assert of_all_signs(terms).amin() < 1e-3
    assert ratio.median() == pytest.approx(1, abs=0.05)
    assert ratio.amin() > 0.4
    assert ratio.amax() < 2.5


def test_a_sum_of_one_sign_has_the_smallest_share_there_is():
    terms = torch.rand(30, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms[0] *= 1e-7  # hardly there, but it has that sign, too
    torch.testing.assert_close(sign_test(-terms), torch.full((1000,), 2.0**-29, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.1, 0.5, 2.0])
def test_shares_of_signs_are_those_of_the_saddlepoint_that_scipy_finds(shift):
    generator = torch.Generator().manual_seed(0)
    terms = (shift + torch.randn(10, 60, generator=generator, dtype=torch.float64)).numpy()
    expected = []
    for w in terms.T:
        total, of_one_sign = abs(w.sum()), abs(w).sum()
        if total > of_one_sign * (1 - 1e-12):
            expected.append(2.0**-9)
            continue
        t = optimize.brentq(lambda t, w=w, total=total: (w * np.tanh(t * w)).sum() - total, 0, 1e6, xtol=1e-14)
        generating = (np.logaddexp(t * w, -t * w) - np.log(2)).sum()
        r, u = (2 * (t * total - generating)) ** 0.5, t * (w**2 * (1 - np.tanh(t * w) ** 2)).sum() ** 0.5
        p = 2 * stats.norm.sf(r + np.log(u / r) / r)
        expected.append(max(min(p, 2 * np.exp(-(r**2) / 2), 1), 2.0**-9))
    np.testing.assert_allclose(sign_test(torch.as_tensor(terms)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["wasserstein", "energy", "gaussian_kl"])
def test_distances_have_an_effect_if_mean_or_variance_has(attribution, name):
    smaller = torch.minimum(attribution.p_values("mean"), attribution.p_values("spread"))
    torch.testing.assert_close(attribution.p_values(name), (2 * smaller).clamp_max(1))


def test_a_removal_without_any_response_is_sure_to_have_no_effect():
    attribution = attribution_of(torch.randn(9, 1), torch.zeros(9, 1, 2))
    for difference in ("mean", "spread", "wasserstein", Tail()):
        assert attribution.p_values(difference).tolist() == [[1.0, 1.0]]
        assert not attribution.significant(difference).any()


def test_the_same_response_in_every_run_is_sure_to_have_one():
    attribution = attribution_of(torch.arange(9.0)[:, None], torch.full((9, 1, 1), 0.5))
    assert attribution.p_values("mean").item() == 0
    assert attribution.p_values("wasserstein").item() == 0
    assert attribution.p_values("spread").item() == 1


def test_a_set_is_tested_together(attribution):
    together = attribution.responses[..., [1, 3]].sum(-1).numpy()
    expected = stats.ttest_1samp(together, 0).pvalue
    np.testing.assert_allclose(attribution.p_values("mean", removed=[1, 3]), expected, rtol=1e-8)


def test_exchange_is_that_of_scipy():
    attribution = without_effect("gaussian", runs=7, queries=1, examples=1, seed=3)
    x = attribution.baseline[:, 0].numpy()
    y = x + attribution.responses[:, 0, 0].numpy()

    def statistic(x, y, axis=-1):
        return np.abs(np.sort(x)[..., -4:].mean(-1) - np.sort(y)[..., -4:].mean(-1))

    expected = stats.permutation_test(
        (x, y), statistic, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    # the largest four of seven
    found = exchange_test(Tail(3 / 7), attribution.baseline, attribution.predict([0])).item()
    assert found == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [8, 20, 64])
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "bounded"])
@pytest.mark.parametrize("difference", ["mean", "spread", "wasserstein"])
def test_false_discoveries_are_as_rare_as_promised_where_nothing_has_an_effect(difference, kind, runs):
    attribution = without_effect(kind, runs, ENSEMBLES, EXAMPLES)
    # all discoveries are false: their expected share is the probability of having one
    rate = attribution.significant(difference, fdr=0.05).any(1).double().mean().item()
    # three standard errors of a share of 0.05 in so many ensembles
    assert rate <= 0.05 + 3 * (0.05 * 0.95 / ENSEMBLES) ** 0.5


@pytest.mark.parametrize("runs", [20, 64])
def test_false_discoveries_of_a_spread_are_few_even_where_responses_grow_with_the_measurement(runs):
    attribution = without_effect("heteroscedastic", runs, ENSEMBLES, EXAMPLES)
    # Student's t alone has them in 0.7 to 0.8 of all ensembles; 0.1 and three standard errors
    assert attribution.significant("spread", fdr=0.05).any(1).double().mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_false_discoveries_are_as_rare_as_promised_among_true_ones(kind):
    attribution = without_effect(kind, 20, ENSEMBLES, EXAMPLES)
    true = torch.arange(EXAMPLES) < 20
    spread = attribution.responses.std(0)
    attribution = attribution_of(attribution.baseline, attribution.responses + 2 * spread * true)
    found = attribution.significant("mean", fdr=0.1)
    share = (found & ~true).sum(1) / found.sum(1).clamp_min(1)
    # three standard errors over ensembles
    assert share.mean() <= 0.1 + 3 * share.std() / ENSEMBLES**0.5
    assert found[:, true].double().mean() > 0.95


def test_exchange_rejects_no_more_often_than_its_level():
    attribution = without_effect("heteroscedastic", 8, 40, 50)
    for difference in (Quantile(0.95), Tail(0.5)):
        p = attribution.p_values(difference)
        for level in (0.05, 0.2):
            rejected = (p <= level).double().mean(1)  # of independent ensembles
            assert rejected.mean() <= level + 3 * rejected.std() / 40**0.5


def test_power_for_the_mean_is_that_of_students_t():
    generator = torch.Generator().manual_seed(0)
    responses = 0.8 + torch.randn(12, 1, 20000, generator=generator, dtype=torch.float64)
    attribution = attribution_of(torch.randn(12, 1, generator=generator, dtype=torch.float64), responses)
    expected = stats.nct.sf(stats.t.isf(0.025, 11), 11, 0.8 * 12**0.5)
    found = (attribution.p_values("mean") < 0.05).double().mean().item()
    assert found == pytest.approx(expected, abs=0.01)  # three standard errors of 20,000, and the other tail


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "slope"), [(20, 0.1), (64, 0.05)])
def test_power_for_the_variance_is_near_that_of_the_best_test_of_gaussians(runs, slope):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(runs, 4000, generator=generator, dtype=torch.float64)
    y = x + slope * x + 0.1 * torch.randn(runs, 4000, generator=generator, dtype=torch.float64)
    attribution = attribution_of(x, (y - x)[..., None])
    best = stats.pearsonr((y - x).numpy(), (x + y).numpy(), axis=0).pvalue  # Pitman's and Morgan's
    found = (attribution.p_values("spread")[:, 0] < 0.05).double().mean()
    assert (best < 0.05).mean() > 0.9
    # a tenth is what it costs to hold the level of samples that are not Gaussian, too
    assert (best < 0.05).mean() - 0.1 < found < 1


def test_distances_find_a_shift_and_a_change_of_spread():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 200, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(30, 200, 3, generator=generator, dtype=torch.float64)
    noise[..., 0] += 0.15
    noise[..., 1] += 0.25 * x
    attribution = attribution_of(x, noise)
    for difference in (Wasserstein(), Energy()):
        found = (attribution.p_values(difference) < 0.01).double().mean(0)
        assert (found[:2] > 0.95).all()
        # a response of random sign: Var Y = Var X + 0.01, far below what 30 runs show
        assert found[2] < 0.05


class Ratio(Difference):
    """A difference of one's own that does not know what to say without a baseline."""

    name, formula, meaning, unit = "ratio", "log E Y / X", "change of the logarithm of the {measurement}", "nats"

    def __call__(self, baseline, predicted):
        return (predicted / baseline).mean(0).log()


def test_an_effect_that_is_not_a_number_is_not_significant():
    responses = torch.ones(9, 1, 3)
    responses[..., 1] = -9.0  # no logarithm of a negative ratio
    attribution = attribution_of(torch.ones(9, 1), responses)
    p = attribution.p_values(Ratio())
    assert p.isnan().tolist() == [[False, True, False]]
    assert not attribution.significant(Ratio())[0, 1]


def test_too_few_runs_and_senseless_rates_are_refused(attribution):
    few = attribution_of(attribution.baseline[:2], attribution.responses[:2])
    assert few.p_values("mean").isfinite().all()
    with pytest.raises(AttributionError, match=r"spread influence needs 3 runs; there are 2"):
        few.p_values("spread")
    for rate in (0, 1, 5, float("nan")):
        with pytest.raises(AttributionError, match="share between 0 and 1"):
            attribution.significant("mean", fdr=rate)


def test_effects_as_large_as_the_bound_are_seldom_called_smaller_one_or_many_at_once():
    generator = torch.Generator().manual_seed(0)
    responses = 1 + torch.randn(20, 4000, 10, generator=generator, dtype=torch.float64)
    p = equivalence_p_values(responses.mean(0), responses.std(0) / 20**0.5, freedom=19, bound=1.0)
    # exact on one side; the other is far away
    assert (p <= 0.05).double().mean().item() == pytest.approx(0.05, abs=0.004)
    # that all are smaller is hardly ever said
    assert (p <= 0.05).all(1).double().mean().item() < 0.005
    one = responses.mul(0.1)
    one[..., 0] += 0.9  # the others are close to zero
    p = equivalence_p_values(one.mean(0), one.std(0) / 20**0.5, freedom=19, bound=1.0)
    assert (p <= 0.05).all(1).double().mean().item() == pytest.approx(0.05, abs=0.011)


def test_equivalence_without_noise_is_certain_and_with_an_unknown_bound_unknown():
    p = equivalence_p_values(torch.tensor([0.5, 1.0, 2.0]), torch.zeros(3), freedom=7, bound=1.0)
    assert p.tolist() == [0.0, 0.0, 1.0]
    assert equivalence_p_values(torch.ones(2), torch.tensor([0.0, 1.0]), freedom=7, bound=float("nan")).isnan().all()
