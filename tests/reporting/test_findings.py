"""One account of what was found: the verdict, the cards, and what to do now."""

import shlex

import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.evaluation.self_checks import CheckResult, keep_results
from lightning_dtda.reporting.commands import keep_command
from lightning_dtda.reporting.findings import MOST_MEMBERS, find
from lightning_dtda.statistics import DIFFERENCES


def simulated(runs, signal, spread=0.0, **about):
    """Return an attribution of one query and 60 examples whose effects are ``signal`` standard errors of a run."""
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(runs, 1, 1, generator=generator)
    effects = torch.randn(1, 1, 60, generator=generator)
    responses = signal * effects + torch.randn(runs, 1, 60, generator=generator)
    responses[..., 0] += spread * (seed[..., 0] - seed.mean())
    names = tuple(f"seed-{number:04d}" for number in range(runs))
    return Attribution(5 + seed[..., 0], responses / 10, names, (4,), {"measurement": "loss", **about})


@pytest.mark.parametrize(
    ("attribution", "level", "headline"),
    [
        (simulated(20, 2.0, spread=-8.0), "good", "Usable"),
        (simulated(20, 2.0), "partial", "Only the means are usable"),
        (simulated(20, 0.2), "partial", "Only the ranking is usable"),
        (simulated(20, 0.0), "poor", "Not usable yet"),
        (simulated(1, 2.0), "poor", "Not usable yet"),
    ],
    ids=["everything", "means", "ranking", "noise", "single run"],
)
def test_the_verdict_says_what_can_be_used(attribution, level, headline):
    verdict = find(attribution).verdict
    assert (verdict.level, verdict.headline) == (level, headline), verdict.sentence


def test_effects_too_small_to_matter_do_not_call_for_more_runs():
    attribution = simulated(20, 0.0)
    attribution.responses.mul_(0.1)
    verdict = find(attribution).verdict
    assert (verdict.level, verdict.headline) == ("partial", "No single example matters")
    assert "none has an effect larger than 10\N{NO-BREAK SPACE}% of the loss's standard deviation" in verdict.sentence


def test_signs_of_verdicts_differ_without_colours():
    signs = [find(each).verdict.sign for each in (simulated(20, 2.0, -8.0), simulated(20, 2.0), simulated(20, 0.0))]
    assert len(set(signs)) == 3


def test_significant_examples_stay_usable_where_the_ranking_is_noise():
    attribution = simulated(20, 0.0)
    attribution.responses[..., 7] += 1
    verdict = find(attribution).verdict
    assert verdict.level == "partial"
    assert verdict.headline == "Only the significant examples are usable"


def test_the_number_of_runs_that_the_verdict_asks_for_makes_the_ranking_reliable():
    few = find(simulated(8, 0.15))
    assert few.verdict.level == "poor"
    (step,) = (step for step in few.next_steps if step.title.startswith("Record"))
    more = int(step.title.split()[1])
    agreements = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        responses = few.agreement * torch.zeros(8 + more, 1, 60) + torch.randn(8 + more, 1, 60, generator=generator)
        # as reliable as what was found: halves of 8 runs agree by the same correlation
        size = (few.agreement / (1 - few.agreement) / 8) ** 0.5
        responses += size * torch.randn(1, 1, 60, generator=generator)
        names = tuple(map(str, range(8 + more)))
        agreements.append(float(Attribution(torch.randn(8 + more, 1), responses, names, (0,)).reliability().median()))
    assert sum(agreements) / 20 == pytest.approx(0.5, abs=0.08)


def test_a_failed_check_decides(attribution, tmp_path):
    attribution.save(tmp_path / "kept")
    kept = Attribution.load(tmp_path / "kept")
    before = find(kept)
    assert before.verdict.level != "poor"
    assert any("check" in step.title.lower() for step in before.next_steps)
    passed = CheckResult("replay", True, "parameters 1e-07", "Fine.")
    keep_results([passed, CheckResult("finite differences", False, "relative error 3e-01", "Report it.")], kept.path)
    after = find(kept)
    assert after.verdict.sentence == "Not usable: finite differences failed (relative error 3e-01). Report it."
    assert not any("check" in step.title.lower() for step in after.next_steps)
    keep_results([passed], kept.path)
    assert find(kept).verdict == before.verdict


def test_cards_show_the_examples_with_the_largest_influence(attribution):
    gallery = Gallery({11: Shown(name="patient 11", text="a text")}, {4: Shown(name="the first", label="yes")})
    shown = Attribution(
        attribution.baseline, attribution.responses, attribution.runs, attribution.queries, attribution.about, gallery
    )
    query = find(shown, k=7).queries[0]
    assert (query.name, query.shown.label) == ("the first", "yes")
    means = query.ranked[0]
    assert [card.row for card in means.cards] == list(means.rows[:5])
    assert len(means.rows) == 7
    top = means.cards[0]
    assert (top.title, top.shown) == ("patient 11", (Shown(name="patient 11", text="a text"),))
    assert top.effect.startswith("Without it, the mean loss rises (0.30")
    assert means.cards[1].title.startswith("example ")


def test_effects_are_said_with_the_direction_of_the_influence(attribution):
    for query in find(attribution, differences=tuple(DIFFERENCES)).queries:
        for ranked in query.ranked:
            for card in ranked.cards:
                if ranked.difference.signed:
                    assert (" falls (" in card.effect) == (card.row.influence < 0)
                    assert (" rises (" in card.effect) == (card.row.influence >= 0)
                assert card.effect.startswith("Without it")


def test_cards_of_groups_show_some_of_their_members(grouped):
    gallery = Gallery({number: Shown(text=f"text {number}") for number in range(3)})
    shown = Attribution(grouped.baseline, grouped.responses, grouped.runs, grouped.queries, grouped.about, gallery)
    card = find(shown).queries[0].ranked[0].cards[0]
    assert card.title == f"{card.row.name} ({card.row.size} example{'s' * (card.row.size > 1)})"
    assert [each.text for each in card.shown] == [f"text {n}" for n in range(min(card.row.size, MOST_MEMBERS))]


def test_commands_repeat_the_question_that_was_asked(attribution, tmp_path):
    attribution.save(tmp_path / "kept it")
    kept = Attribution.load(tmp_path / "kept it")
    asked = ["--ensemble", "runs/my runs", "--output", str(kept.path), "--queries.indices=[4, 7, 9]", "--scale", "sqrt"]
    asked += ["--measurement", "loss", "--estimator", "InfluenceFunctions"]
    keep_command(kept.path, asked)
    by_title = {step.title.split()[0].rstrip(":"): step for step in find(kept).next_steps}
    retrain, report = (shlex.split(command) for command in by_title["Verify"].commands)
    assert retrain[:2] == ["lightning-dtda", "retrain"]
    assert retrain[2:7] == ["--ensemble", "runs/my runs", "--queries.indices=[4, 7, 9]", "--measurement", "loss"]
    assert "--scale" not in retrain
    assert "--estimator" not in retrain
    row = next(row for row in find(kept).queries[0].ranked[0].rows if row.significant)
    assert f"--removed=[[{row.position}]]" in retrain
    assert retrain[-1] == report[report.index("--truth") + 1]
    assert shlex.split(by_title["Check"].commands[0])[-2:] == ["--attribution", str(kept.path)]


def test_an_attribution_from_python_gets_calls_in_python(attribution):
    steps = find(attribution).next_steps
    assert steps
    assert not any("lightning-dtda" in command for step in steps for command in step.commands)


def test_nothing_is_verified_if_nothing_is_significant():
    steps = find(simulated(20, 0.0)).next_steps
    assert not any(step.title.startswith("Verify") for step in steps)


def test_the_findings_of_one_query_are_those_of_the_whole(attribution):
    whole, alone = find(attribution).queries[1], find(attribution.select([1])).queries[0]
    assert [ranked.verdict for ranked in whole.ranked] == [ranked.verdict for ranked in alone.ranked]
    rows = [[(row.name, row.influence) for ranked in query.ranked for row in ranked.rows] for query in (whole, alone)]
    assert [name for name, _ in rows[0]] == [name for name, _ in rows[1]]
    assert [value for _, value in rows[0]] == pytest.approx([value for _, value in rows[1]])
