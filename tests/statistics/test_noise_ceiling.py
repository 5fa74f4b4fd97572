"""Noise ceiling and confidence intervals against worlds in which the right answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, pearsonr

from lightning_dtda.evaluation.functional import leave_one_out_correlation, linear_datamodeling_score
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.crossed_bootstrap import Resamples, confidence_interval, replicate
from lightning_dtda.statistics.differences import Mean
from lightning_dtda.statistics.noise_ceiling import noise_ceiling
from lightning_dtda.statistics.samples import arrange, collect
from tests.simulated import experiment, normal

WORLDS = 200


def of_queries(samples, correlation="spearman"):
    return correlations(samples.predicted_influence(Mean()), samples.real_influence(Mean()), correlation)


def replicated(samples, correlation="spearman", number=200):
    draws = Resamples.of(samples, number, seed=0)
    return replicate(samples, Mean(), of_queries(samples, correlation), correlation, draws).scores()


@pytest.mark.slow
@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
@pytest.mark.parametrize("seeds", [8, 9])
def test_ceiling_is_what_the_true_influences_score(correlation, seeds):
    generator = torch.Generator().manual_seed(0)
    ceilings, scores, again = [], [], []
    for _ in range(WORLDS):
        samples, truth = experiment(generator, subsets=40, seeds=seeds)
        found = collect(arrange(*samples))
        noise = noise_ceiling(found, Mean(), correlation)
        real = found.real_influence(Mean())
        ceilings.append(noise.ceiling)
        scores.append(correlations(truth.T, real, correlation).mean())
        other = truth.T + normal(generator, *real.shape) * 3 / seeds**0.5
        again.append((noise.reliability, correlations(other, real, correlation).mean()))
    # standard errors over 200 worlds are 0.002; the bend of the root costs some 0.005
    assert abs(torch.stack(ceilings).mean() - torch.stack(scores).mean()) < 0.012
    reliability, expected = torch.tensor(again, dtype=torch.float64).mean(0)
    assert abs(reliability - expected) < 0.015


def test_truth_without_noise_has_a_ceiling_of_one_and_pure_noise_has_none():
    generator = torch.Generator().manual_seed(0)
    clean, _ = experiment(generator, noise=0)
    assert linear_datamodeling_score(*clean, replicates=0)["ceiling"] == pytest.approx(1, abs=1e-12)
    predicted, baseline, real, real_baseline = experiment(generator, subsets=300, queries=20)[0]
    noise = linear_datamodeling_score(predicted, baseline, normal(generator, *real.shape), real_baseline, replicates=0)
    # split halves of 300 subsets and 20 queries have a standard error of 0.013
    assert abs(noise["split_half"]) < 0.04


def test_with_fewer_than_four_seeds_there_is_no_ceiling():
    predicted, baseline, real, real_baseline = experiment(torch.Generator().manual_seed(0))[0]
    for few in ((real[:, :3], real_baseline), (real, real_baseline[:3])):
        found = linear_datamodeling_score(predicted, baseline, *few, replicates=0)
        assert all(found[name].isnan() for name in ("ceiling", "reliability", "split_half"))
        assert not found["score"].isnan()
    enough = linear_datamodeling_score(predicted, baseline, real[:, :4], real_baseline[:4], replicates=0)
    assert not enough["ceiling"].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0.2, 1.0])
def test_intervals_cover_the_expected_score_at_least_as_often_as_they_say(wrong):
    generator = torch.Generator().manual_seed(0)
    settings = {"subsets": 25, "wrong": wrong, "queries": 8}

    def world():
        return collect(arrange(*experiment(generator, **settings)[0]))

    scores = torch.stack([of_queries(world()).mean() for _ in range(2000)])
    expected = scores.mean()
    covered, widths = [], []
    for _ in range(WORLDS):
        samples = world()
        low, high = confidence_interval(of_queries(samples).mean(), replicated(samples))
        covered.append(bool(low <= expected <= high))
        widths.append(high - low)
    # of 95 %, less two standard errors of 200 worlds
    assert np.mean(covered) > 0.92
    # crossed draws count twice what belongs to single cells: intervals are wider than needed, by up to a third here
    needed = scores.quantile(0.975) - scores.quantile(0.025)
    assert torch.stack(widths).mean() / needed < 1.4


@pytest.mark.slow
def test_plain_percentiles_would_not_cover():
    # why intervals are centred: draws with replacement have noise twice, and lie below the score
    generator = torch.Generator().manual_seed(0)
    below = []
    for _ in range(20):
        samples = collect(arrange(*experiment(generator, subsets=25, noise=2.0)[0]))
        below.append(of_queries(samples).mean() - replicated(samples).mean())
    assert torch.stack(below).mean() > 0.03


def test_spread_over_removals_is_that_of_scipys_bootstrap():
    # a single query, run and seed: only removals are drawn
    generator = torch.Generator().manual_seed(0)
    predicted = normal(generator, 60, 1, 1)
    real = predicted + normal(generator, 60, 1, 1)
    samples = collect(arrange(predicted, torch.zeros(1, 1), real, torch.zeros(1, 1)))
    ours = replicated(samples, "pearson", 4000)
    scipys = bootstrap(
        (predicted.flatten().numpy(), real.flatten().numpy()),
        lambda x, y: pearsonr(x, y).statistic,
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=0,
    )
    # the spread of 4000 draws is known to 1.1 % on either side
    assert ours.std().item() == pytest.approx(scipys.standard_error, rel=0.05)


def test_replicates_are_scores_of_what_is_drawn():
    # of samples without noise and with one query, any draw of runs and seeds gives the same order
    clean, _ = experiment(torch.Generator().manual_seed(0), noise=0, wrong=0)
    drawn = replicated(collect(arrange(*clean)), number=50)
    torch.testing.assert_close(drawn, torch.ones_like(drawn), rtol=0, atol=1e-12)
    found = linear_datamodeling_score(*clean)
    assert found["low"] > 1 - 1e-6
    assert found["high"] <= 1


def test_paired_seeds_are_drawn_together():
    # models with removals are those without, moved by the effect: in pairs, the Wasserstein distance has no noise
    generator = torch.Generator().manual_seed(0)
    effects = normal(generator, 15, 1, 1).abs()
    before = normal(generator, 6, 1)
    settings = {"difference": "wasserstein", "replicates": 100}
    together = leave_one_out_correlation(before + effects, before, before + effects, before, paired=True, **settings)
    apart = leave_one_out_correlation(before + effects, before, before + effects, before, **settings)
    assert together["split_half"] == pytest.approx(1, abs=1e-12)
    assert apart["split_half"] < 0.99
    assert together["low"] > apart["low"]


def test_the_same_seed_draws_the_same():
    samples, _ = experiment(torch.Generator().manual_seed(0))
    one, again, other = (linear_datamodeling_score(*samples, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one["low"], again["low"])
    assert not torch.equal(one["low"], other["low"])


def test_higher_confidence_is_wider():
    samples, _ = experiment(torch.Generator().manual_seed(0))
    wide = linear_datamodeling_score(*samples, confidence=0.99)
    narrow = linear_datamodeling_score(*samples, confidence=0.5)
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]
