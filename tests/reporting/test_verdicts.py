"""What is said about seed noise, where it is different from the usual."""

import torch

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.certainty import POWER
from lightning_dtda.reporting.findings import significance_on, top_examples
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict, verdict_on_all
from lightning_dtda.statistics.differences import Tail
from tests.reporting.attributions import make_attribution


def said(attribution, difference, query=0):
    return verdict(attribution, significance_on(attribution, query, difference)).replace("\xa0", " ")


def noise(runs, examples, queries=1, **about):
    generator = torch.Generator().manual_seed(1)
    baseline = torch.randn(runs, queries, generator=generator)
    responses = torch.randn(runs, queries, examples, generator=generator)
    return Attribution(
        baseline, responses, tuple(f"seed-{run:04d}" for run in range(runs)), tuple(range(queries)), about
    )


def test_groups_are_named(grouped):
    text = said(grouped, "mean")
    assert text == "1 of 40 groups has a significant mean influence (12 runs, false discovery rate 5 %)."


def test_a_single_removal_is_spoken_of_alone():
    about = {"removals": [{"name": "source a", "examples": [0, 3]}]}
    assert said(noise(10, 1, **about), "mean").startswith(
        "The group has no significant mean influence with 10 runs (false discovery rate 5 %). Its p-value is 0."
    )
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
    assert "With fewer than 16 runs, none of 1000 examples can be significant." in said(noise(8, 1000), "spread")
    assert "fewer than" not in said(noise(16, 1000), "spread")
    assert "More runs do not help: among 1000, no p-value of this test is small enough." in said(
        noise(9, 1000), Tail(0.5)
    )


def test_of_several_queries_the_clearest_example_is_named():
    several = noise(12, 200, queries=3)
    p = several.p_values("mean")
    query, example = divmod(int(p.argmin()), 200)
    text = verdict_on_all(several, [significance_on(several, each, "mean") for each in range(3)])
    assert "No example has a significant mean influence on any of 3 queries with 12 runs" in text
    assert f"The clearest is example {example} (p = {p.min():.2g})" in text
    more = int(several.runs_for_significance("mean", power=POWER)[query, example]) - 12
    assert f"about {more} more runs would make it significant" in text


def test_without_any_effect_nothing_is_promised():
    none = Attribution(torch.randn(9, 1), torch.zeros(9, 1, 4), tuple("abcdefghi"), (0,))
    assert said(none, "mean").endswith("More runs may show one.")
    [row] = top_examples(none, 0, "mean", 1)
    assert retraining_verdict(none, [row]) == ""


def test_retrainings_are_those_of_the_attribution(attribution):
    [row] = top_examples(attribution, 1, "variance", 1)
    needed = attribution.retrainings_needed([row.position], "variance")[1].item()
    assert f"To confirm example 23: retrain {needed:,.0f} times without it" in retraining_verdict(attribution, [row])
    [distance] = top_examples(attribution, 1, "wasserstein", 1)
    assert distance.retrainings is None
