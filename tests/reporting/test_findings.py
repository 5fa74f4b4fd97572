"""One account of what was found: the verdict, the cards, and what to do now."""

import math
import shlex

import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.evaluation.self_checks import CheckResult, keep_results
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.commands import Command, keep_command
from lightning_dtda.reporting.findings import MOST_MEMBERS, find
from lightning_dtda.reporting.rows import TopExample
from lightning_dtda.statistics import DIFFERENCES
from tests.reporting.attributions import make_attribution


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


ASKED = ("--ensemble", "runs/my runs", "--output", "found", "--queries.indices=[4, 7, 9]", "--scale", "sqrt")
ASKED += ("--measurement", "loss", "--measurement_seed", "-1", "--model.width=4", "--estimator", "InfluenceFunctions")


def commands_of(attribution, path, *more, runs="runs/my runs"):
    """Return the commands for an attribution that a command made, by the first word of their step."""
    attribution.save(path)
    keep_command(path, Command((*ASKED, *more), runs))
    found = find(Attribution.load(path))
    return {
        step.title.split()[0].rstrip(":"): [shlex.split(each) for each in step.commands] for step in found.next_steps
    }


def test_commands_repeat_the_question_that_was_asked(attribution, tmp_path):
    kept = tmp_path / "kept it"
    commands = commands_of(attribution, kept)
    retrain, report = commands["Verify"]
    assert retrain[:4] == ["lightning-dtda", "retrain", "--ensemble", "runs/my runs"]
    shared = ["--queries.indices=[4, 7, 9]", "--measurement", "loss", "--measurement_seed", "-1", "--model.width=4"]
    assert retrain[4 : 4 + len(shared)] == shared
    assert not {"--scale", "--estimator"} & set(retrain)
    removed = [row.position for row in find(attribution).queries[0].ranked[0].rows if row.significant]
    assert f"--removed=[[{removed[0]}]]" in retrain
    assert retrain[-1] == report[report.index("--truth") + 1]
    (check,) = commands["Check"]
    assert check[-2:] == ["--attribution", str(kept)]
    assert "--measurement_seed" not in check  # which check does not have
    (suggest,) = commands["Remove"]
    assert suggest[2:4] == ["--attribution", str(kept)]


def test_more_runs_are_recorded_with_the_ensembles_configuration(tmp_path):
    noise = simulated(9, 0.1)
    record, again = commands_of(noise, tmp_path / "kept")["Record"]
    assert record[2:4] == ["--config", "runs/my runs/config.yaml"]
    assert record[record.index("--ensemble") + 1] == "runs/my runs"
    assert int(record[-1].removeprefix("--seeds=")) > 9
    assert again == ["lightning-dtda", "attribute", *ASKED]
    record, _ = commands_of(noise, tmp_path / "other", "--config", "own.yaml")["Record"]
    assert [*record[2:4], *record[4:6]] == ["--model.width=4", "--config", "own.yaml", "--ensemble"]
    names = tuple(f"seed-{number:04d}" for number in (*range(1, 9), 103))
    named = Attribution(noise.baseline, noise.responses, names, noise.queries, noise.about)
    record, _ = commands_of(named, tmp_path / "named")["Record"]
    assert record[-1].startswith("--seeds=[1, 2, 3, 4, 5, 6, 7, 8, 103, 104, ")


def test_commands_that_would_fail_are_not_given(attribution, tmp_path):
    assert "Remove" not in commands_of(simulated(5, 2.0), tmp_path / "few")
    kept = commands_of(attribution.keep_top(4), tmp_path / "top")
    assert not {"Verify", "Remove"} & kept.keys()
    other_step = Attribution(
        attribution.baseline, attribution.responses, attribution.runs, attribution.queries,
        attribution.about | {"step": 7},
    )  # fmt: skip
    assert "Verify" not in commands_of(other_step, tmp_path / "step")
    by_influence = attribution.about | {"estimator": {"class": "lightning_dtda.InfluenceFunctions"}}
    influence = Attribution(
        attribution.baseline, attribution.responses, attribution.runs, attribution.queries, by_influence
    )
    assert "Check" not in commands_of(influence, tmp_path / "influence")


def test_other_settings_do_not_keep_what_was_said_of_the_first(attribution, tmp_path):
    commands_of(attribution, tmp_path / "kept")
    keep_results([CheckResult("finite differences", False, "0.3", "Report it.")], tmp_path / "kept")
    make_attribution(ensemble="other").save(tmp_path / "kept", overwrite=True)
    assert find(Attribution.load(tmp_path / "kept")).verdict == find(attribution).verdict
    assert not (tmp_path / "kept" / "command.json").exists()


def test_the_effect_of_one_group_needs_no_ranking(attribution):
    about = attribution.about | {"removals": [{"name": "all", "examples": [1, 4, 5]}]}
    single = Attribution(
        attribution.baseline, attribution.responses[..., 11:12], attribution.runs, attribution.queries, about
    )
    verdict = find(single).verdict
    assert (verdict.level, verdict.headline) == ("good", "Usable")
    assert "ranking" not in verdict.sentence


def test_effects_that_are_no_numbers_are_said_to_be_unknown():
    spread = TopExample(1, 3, "3", 1, math.inf, math.nan, 0.1, math.inf, 0.0, math.nan, math.nan, 0.0, 0.0, True, 9, 40)
    text = wording.effect(DIFFERENCES["spread"], "loss", spread)
    assert text == "Without it, the loss's standard deviation over runs is not known; as trained, there is none."


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
