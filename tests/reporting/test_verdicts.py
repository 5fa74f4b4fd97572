"""What is said about seed noise, where it is different from the usual."""

import math
import re

import torch
from scipy.optimize import brentq
from scipy.stats import nct, t

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import POWER
from lightning_dtda.reporting.formatting import count, counts
from lightning_dtda.reporting.rows import significance_on, top_examples
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict, verdict_on_all
from lightning_dtda.statistics.differences import Mean, Tail
from tests.reporting.attributions import make_attribution


def said(attribution, difference, query=0):
    return verdict(attribution, significance_on(attribution, query, difference).outcome).replace("\xa0", " ")


def noise(runs, examples, queries=1, **about):
    generator = torch.Generator().manual_seed(1)
    baseline = torch.randn(runs, queries, generator=generator)
    responses = torch.randn(runs, queries, examples, generator=generator)
    return Attribution(
        baseline, responses, tuple(f"seed-{run:04d}" for run in range(runs)), tuple(range(queries)), about
    )


def test_groups_are_named(grouped):
    text = said(grouped, "mean")
    assert text.startswith(
        "1 of 40 groups has a significant mean influence (12 runs, false discovery rate 5 %). 38 of 40 groups have no "
        "effect larger than 10 % of the loss's standard deviation over seeds. Cannot tell for 1 of 40 groups: with 12 "
        "runs, an effect is found with a probability of 80 % only from 0."
    )


def test_a_single_removal_is_spoken_of_alone():
    about = {"removals": [{"name": "source a", "examples": [0, 3]}]}
    assert said(noise(10, 1, **about), "mean").startswith(
        "The group has no significant mean influence with 10 runs (false discovery rate 5 %). Cannot tell: with 10 "
        "runs, an effect is found"
    )
    assert "Its p-value is 0.064: up to " in said(noise(10, 1, **about), "mean")
    clear = noise(10, 1, **about)
    clear.responses.fill_(3.0)
    assert said(clear, "mean") == ("The group has a significant mean influence (10 runs, false discovery rate 5 %).")


def test_too_few_runs_for_the_test_are_reported():
    assert said(make_attribution(2), "spread") == (
        "2 runs cannot show whether the spread influence is significant: the test needs at least 3."
    )
    assert said(make_attribution(1), "mean") == (
        "1 run cannot show whether the mean influence is significant: the test needs at least 2."
    )


def test_a_test_that_cannot_find_any_says_how_many_runs_it_needs():
    for difference in ("variance", "spread"):
        few = "ith fewer than 16 runs, nothing can be significant among 1000 examples."
        assert few in said(noise(8, 1000), difference)
        assert few not in said(noise(16, 1000), difference)
    assert "Cannot tell for all 1000 examples: with 16 runs, even a large effect is seldom" in said(
        noise(16, 1000), "spread"
    )
    assert "More runs do not help: among 1000, no p-value of this test is small enough." in said(
        noise(9, 1000), Tail(0.5)
    )


def test_of_several_queries_the_clearest_example_is_named():
    several = noise(12, 200, queries=3)
    p = several.p_values("mean")
    query, example = divmod(int(p.argmin()), 200)
    text = verdict_on_all(several, [significance_on(several, each, "mean").outcome for each in range(3)])
    assert "No example has a significant mean influence on any of 3 queries with 12 runs" in text
    assert f"The clearest is example {example} (p = {p.min():.2g})" in text
    low, _, high = (int(each[query, example]) for each in several.runs_for_significance("mean", power=POWER))
    assert low <= 12
    assert f"up to {count(high - 12)} more runs would make it significant" in text


def test_runs_that_show_that_effects_are_small_say_so():
    small = noise(20, 100)
    small.responses.mul_(0.03)
    assert said(small, "mean") == (
        "No example has a significant mean influence with 20 runs (false discovery rate 5 %). All 100 examples have no "
        "effect larger than 10 % of the measurement's standard deviation over seeds."
    )
    assert "All 100 examples have no effect larger than 10 %" in said(small, "spread")
    assert "Mean and spread influence show whether" in said(small, "wasserstein")


def test_runs_that_are_too_few_say_what_they_would_have_found():
    few = noise(20, 50)
    text = said(few, "mean")
    error = few.responses[:, 0].double().std(0).max().item() / 20**0.5
    alpha = 0.05 / 50
    # by SciPy: the effect that Student's t finds four times in five
    found = brentq(lambda d: nct.sf(t.isf(alpha / 2, 19), 19, d) - 0.8, 1, 20) * error
    share = found / few.baseline[:, 0].double().std().item()
    assert f"only from {found:.3g}, {100 * share:.0f} % of the measurement's standard deviation over seeds" in text
    assert "Cannot tell for all 50 examples: with 20 runs, an effect is found with a probability of 80 %" in text
    # the runs that would find a tenth of the standard deviation, for which 20 were too few
    [most] = re.findall(r"At most ([\d,]+) runs would find one of 10 %", text)
    most = int(most.replace(",", ""))
    negligible = found / share / 10 / error * (most / 20) ** 0.5
    assert nct.sf(t.isf(alpha / 2, most - 1), most - 1, negligible) > 0.8


def test_a_measurement_that_never_changes_has_no_effect():
    names = tuple(f"seed-{run:04d}" for run in range(9))
    same = Attribution(torch.ones(9, 1), torch.zeros(9, 1, 4), names, (0,))
    assert "All 4 examples have no effect larger than" in said(same, "mean")


def test_no_effect_is_hardly_ever_said_of_one_that_has_one():
    wrong = said_none = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 1, generator=generator, dtype=torch.float64)
        responses = 0.1 + 0.2 * torch.randn(20, 1, 1, generator=generator, dtype=torch.float64)
        silence = significance_on(Attribution(x, responses, tuple(map(str, range(20))), (0,)), 0, "mean").silence
        said_none += silence is not None
        wrong += silence is not None and silence.none
    assert said_none > 50
    assert wrong <= 10 + 3 * 3  # a twentieth, and three standard errors


def test_without_any_effect_nothing_is_promised():
    none = Attribution(torch.randn(9, 1), torch.zeros(9, 1, 4), tuple("abcdefghi"), (0,))
    assert said(none, "mean").endswith(
        "have no effect larger than 10 % of the measurement's standard deviation over seeds."
    )
    [row] = top_examples(none, 0, "mean", 1)
    assert retraining_verdict(none, [row]) == ""


def test_retrainings_are_those_of_the_attribution(attribution):
    [row] = top_examples(attribution, 1, "mean", 1)
    low, _, high = (each[1, row.position].item() for each in attribution.retrainings_needed(difference="mean"))
    text = f"Trainings needed to confirm example 11: {counts(low, high)} without it, and the same number with all data"
    assert text in retraining_verdict(attribution, [row])
    [median] = top_examples(attribution, 1, Mean("median"), 1)
    assert math.isnan(median.retrainings_low)
