import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lightning_dtda import Attribution
from lightning_dtda.reporting import find, print_summary
from lightning_dtda.reporting.formatting import common_exponent, number, supported
from lightning_dtda.statistics import DIFFERENCES
from tests.reporting.attributions import make_attribution


def _printed(attribution, width=140, **arguments):
    console = Console(file=io.StringIO(), width=width, record=True)
    print_summary(attribution, console=console, **arguments)
    return console.export_text()


def test_details_hold_the_top_examples_with_their_intervals(attribution):
    text = _printed(attribution, k=4, verbose=True)
    for difference in ("mean", "spread"):
        for query in range(3):
            top = attribution.top(4, difference, query=query)
            rows = zip(top.influence, *attribution.interval(difference)[:, query, top.example.tolist()], strict=True)
            shown = [[DIFFERENCES[difference].shown(float(part)) for part in row] for row in rows]
            exponent = common_exponent(part for row in shown for part in row)
            for row in shown:
                assert "{} [{}, {}]".format(*(number(part, exponent) for part in row)) in text


def test_details_say_whether_influences_are_more_than_seed_noise(attribution):
    text = " ".join(_printed(attribution, verbose=True).split())
    assert attribution.significant("spread").sum(1).tolist() == [0, 1, 1]
    sentence = "1 of 40 examples has a significant spread influence (12 runs, false discovery rate 5 %)."
    assert text.count(sentence) == 2
    few = " ".join(_printed(make_attribution(2), verbose=True).split())
    assert "2 runs cannot show whether the spread influence is significant: the test needs at least 3." in few


def test_details_say_how_the_question_was_answered(attribution):
    text = " ".join(_printed(attribution, verbose=True).split())
    assert "after 12 seeded runs of the ensemble concrete" in text
    assert "UnrolledDifferentiation (precision=float64)" in text
    assert "parameters 1.2e-06, gradients 2e-06" in text
    assert "Caution" not in text


def test_the_summary_is_verdict_table_and_next_steps(attribution):
    text = _printed(attribution)
    found = find(attribution)
    lines = text.splitlines()
    assert lines[0] == "How does the loss on 3 queries change if one of 40 training examples is removed?"
    assert lines[1].startswith(found.verdict.sign)
    assert found.verdict.sentence in " ".join(text.split())
    for query in found.queries:
        (line,) = (line for line in lines if line.startswith(query.name.removeprefix("query ")))
        for ranked in query.ranked[:2]:
            row = ranked.rows[0]
            cell = "{}: {} [{}, {}]".format(row.name, *supported(row.influence, row.interval_low, row.interval_high))
            assert f"{cell} n.s." in line if not row.significant else cell in line
    for step in found.next_steps:
        assert step.title in " ".join(text.split())
        assert all(f"   {command}" in lines for command in step.commands)  # in one piece


def test_the_summary_fits_eighty_columns(attribution, grouped):
    for each in (attribution, grouped):
        lines = _printed(each, width=80).splitlines()
        assert max(len(line.rstrip()) for line in lines if not line.startswith("   ")) <= 80


def test_the_table_has_the_queries_with_the_most_significant_influences():
    first = make_attribution()
    many = replace(
        first,
        baseline=first.baseline[:, :1].repeat(1, 30),
        responses=torch.stack([first.responses[:, 0] * (query % 3 == 2) for query in range(100, 130)], 1),
        queries=tuple(range(100, 130)),
    )
    text = _printed(many)
    assert all(f"\n{query} " in text for query in range(100, 130) if query % 3 == 2)
    assert "The 20 of 30 queries with the most significant influences." in text


def test_findings_are_shown_without_being_computed_again(attribution, monkeypatch):
    found = find(attribution, k=5, differences=["mean", "spread"])
    expected = _printed(attribution)
    monkeypatch.setattr(Attribution, "select", None)
    assert _printed(found) == expected


@pytest.mark.parametrize(("runs", "caution"), [(1, "There is a single run"), (4, "There are only 4 runs")])
def test_few_runs_are_cautioned_against_once(runs, caution, recwarn):
    assert _printed(make_attribution(runs)).count(caution) == 1
    assert not [warning for warning in recwarn if "Influences of" in str(warning.message)]


def test_names_are_not_taken_for_markup():
    assert "[red]m[/red]" in _printed(make_attribution(measurement="[red]m[/red]"))


def test_runs_that_are_left_out_are_named_and_do_not_enter(attribution):
    chaotic = make_attribution(chaotic=["seed-0002"])
    chaotic.responses[2] *= 1000
    text = " ".join(_printed(chaotic, verbose=True).split())
    assert "1 run is left out of 12 as chaotic (seed-0002)" in text
    expected = chaotic.trusted().top(1, query=0)
    mantissa = number(
        expected["mean_influence"][0], common_exponent(chaotic.trusted().top(5, query=0)["mean_influence"])
    )
    assert mantissa in text


def test_the_agreement_of_the_runs_is_shown(attribution):
    text = " ".join(_printed(attribution, verbose=True).split())
    of_queries = attribution.reliability()
    assert f"(split-half reliability): {of_queries.median():.2f} ({of_queries.min():.2f} to" in text
    assert "(split-half reliability): unknown (too few runs)" in " ".join(
        _printed(make_attribution(2), verbose=True).split()
    )


def test_groups_are_shown_by_name_and_size(grouped):
    text = " ".join(_printed(grouped, verbose=True).split())
    assert "How does the loss on 3 queries change if one of 40 groups of training examples is removed?" in text
    assert "The loss was measured after step 40 of 12 seeded runs of the ensemble concrete" in text
    assert "group (examples)" in text
    largest = grouped.top(1, "mean", query=0)
    assert f"{largest['removal'][0]} ({largest['size'][0]})" in text


def test_a_single_group_is_shown_with_its_size():
    whole = make_attribution()
    about = {**whole.about, "removals": [{"name": "all", "examples": [1, 4, 5]}]}
    single = replace(whole, responses=whole.responses[..., 11:12], about=about)
    assert "change if a group of 3 training examples is removed?" in " ".join(_printed(single).split())


def test_of_a_top_that_was_kept_the_same_is_said(attribution):
    kept = attribution.keep_top(4)
    said = _printed(attribution, k=4, verbose=True).partition("Next")[0]  # fewer steps are possible
    assert _printed(kept, k=4, verbose=True).partition("Next")[0] == said
    assert _printed(kept, k=10, verbose=True).partition("Next")[0] == said  # no more are listed
