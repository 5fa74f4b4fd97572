"""Ground truths, evaluations and suggestions in Weights & Biases, and the arrangement of all panels."""

import sys

import pytest
import torch

from lightning_dtda import Attribution, GroundTruth, evaluate, suggest_removals
from lightning_dtda.errors import AttributionError, DTDAError
from lightning_dtda.evaluation import compare, verify
from lightning_dtda.reporting import (
    log_evaluation_to_wandb,
    log_suggestion_to_wandb,
    log_to_wandb,
    log_truth_to_wandb,
    wandb_report,
    wandb_workspace,
)
from tests.reporting.attributions import QUERIES, RUNS, make_attribution
from tests.reporting.wandb_log import Logged

pytestmark = pytest.mark.usefixtures("offline")

SUBSETS = ((11,), (23,), (5, 11), (7, 8, 9))


@pytest.fixture
def truth(attribution, tmp_path):
    """What the predictions say, and a little noise."""
    noise = torch.Generator().manual_seed(1)
    made = torch.stack([attribution.predict(subset) for subset in SUBSETS])
    made = made + 0.01 * torch.randn(made.shape, generator=noise)
    about = {"measurement": "loss", "removal": "drop", "engine": "the Trainer"}
    seeds = tuple(range(100, 100 + RUNS))
    truth = GroundTruth(made, attribution.baseline, SUBSETS, QUERIES, seeds, seeds, about)
    truth.save(tmp_path / "truth")
    return truth


def test_a_ground_truth_has_a_step_and_a_row_for_each_subset(truth, tmp_path):
    logged = Logged(tmp_path, log_truth_to_wandb(truth, tmp_path / "truth"))
    assert logged.run.display_name == "loss retrained without 4 subsets (drop)"
    assert (logged.run.job_type, [*logged.run.tags]) == ("retraining", ["retraining", "loss", "drop"])
    mean, spread = truth.influence("mean").mean(0), 100 * truth.influence("spread").mean(0).expm1()
    steps = [step for step in logged.steps if "subsets/size" in step]
    assert [step["subsets/size"] for step in steps] == [1, 1, 2, 3]
    assert [step["subsets/mean"] for step in steps] == pytest.approx(mean.tolist())
    assert [step["subsets/spread_in_percent"] for step in steps] == pytest.approx(spread.tolist())
    table = logged.content(logged.history["subsets_without"])
    assert table["columns"] == ["subset", "size", "examples", "mean", "spread_in_percent", "wasserstein"]
    assert [row[:3] for row in table["data"]][2] == [2, 2, "5, 11"]
    assert logged.summary["seeds/loss/standard_deviation"] == pytest.approx(truth.baseline.std(0).mean().item())
    assert logged.outputs["truth-ensemble"].type == "truth"


def test_a_ground_truth_that_is_unfinished_says_so(truth, tmp_path):
    truth.measurements[1] = torch.nan
    logged = Logged(tmp_path, log_truth_to_wandb(truth, tmp_path / "truth"))
    assert logged.summary["unfinished"] == RUNS
    assert f"{RUNS} trainings missing" in logged.run.notes
    assert logged.content(logged.history["subsets_without"])["columns"] == ["subset", "size", "examples"]


def test_evaluations_line_up_and_come_from_attribution_and_truth(attribution, truth, saved, tmp_path):
    first, other = (evaluate(each, truth) for each in (attribution, make_attribution().select([0, 1, 2])))
    logged = []
    for name, each, gains in (("first", first, None), ("other", other, compare(other, first))):
        run = log_evaluation_to_wandb(
            each, name, attribution=saved, truth=tmp_path / "truth", gains=gains, ensemble="concrete"
        )
        logged.append(Logged(tmp_path, run))
    assert logged[0].run.display_name == "first: does it rank removals as retraining does?"
    assert {*logged[0].summary} < {*logged[1].summary}
    for name, score in first.scores.items():
        figures = {"score": score.score, "low": score.low, "high": score.high, "noise_ceiling": score.ceiling}
        assert {key: logged[0].summary[f"{key}/{name}"] for key in figures} == figures
    assert logged[1].summary["gain/mean"] == 0.0
    steps = [step["queries/score_mean"] for step in logged[0].steps if "queries/score_mean" in step]
    assert steps == pytest.approx(list(first.scores["mean"].per_query))
    assert {*logged[0].inputs} == {"attribution-concrete", "truth-concrete"}
    assert logged[0].charts["scores"]["panel_config"]["panelDefId"] == "wandb/bar/v0"


def test_a_suggestion_has_a_step_for_each_removal_and_what_retraining_says(attribution, truth, saved, tmp_path):
    loaded = Attribution.load(saved)
    suggestion = suggest_removals(loaded, "improve_mean", k=1, queries=[1])
    assert suggestion.removed == (11,)  # one of the subsets
    found = verify(suggestion, truth)
    run = log_suggestion_to_wandb(suggestion, loaded, verification=found, truth=tmp_path / "truth")
    logged = Logged(tmp_path, run)
    assert logged.run.display_name == "improve mean: loss"
    assert logged.run.notes == logged.summary["verdict"] == suggestion.verdict
    effect, (low, high) = suggestion.effects[0].item(), suggestion.intervals[:, 0].tolist()
    [step] = [step for step in logged.steps if "removals/examples" in step]
    expected = {"predicted_effect": effect, "predicted_low": low, "predicted_high": high}
    assert {key: step[f"removals/{key}"] for key in expected} == expected
    assert {key: logged.summary[key] for key in expected} == expected
    assert logged.summary["retrained_effect"] == found.effect
    assert logged.content(logged.history["suggested_removals"])["data"][0][0] == "11"
    assert {*logged.inputs} == {"attribution-concrete", "truth-concrete"}


def test_a_suggestion_to_remove_nothing_is_logged(tmp_path):
    attribution = make_attribution()
    attribution.responses.zero_()
    suggestion = suggest_removals(attribution)
    logged = Logged(tmp_path, log_suggestion_to_wandb(suggestion, attribution))
    assert logged.summary["verdict"] == suggestion.verdict
    assert (logged.summary["removals"], logged.summary["examples_removed"]) == (0, 0)
    assert "predicted_effect" not in logged.summary


def test_directories_that_are_not_there_are_refused(attribution, truth, tmp_path):
    with pytest.raises(AttributionError, match="nowhere does not exist"):
        log_truth_to_wandb(truth, tmp_path / "nowhere")
    with pytest.raises(AttributionError, match="nowhere does not exist"):
        log_evaluation_to_wandb(evaluate(attribution, truth), "name", attribution=tmp_path / "nowhere")
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def below(content):
    """Yield all objects in the JSON of a workspace or a report."""
    if isinstance(content, dict):
        yield content
    for item in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from below(item)


def keys_of_panels(content):
    for part in below(content):
        yield from part.get("mediaKeys") or []
        yield from part.get("metrics") or []
        if part.get("name") == "tableKey":
            yield part["value"]


@pytest.fixture
def arranged(monkeypatch):
    """The JSON of the workspace and of the report, which asks the server for nothing but the project's id."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *arguments: {"project": {"internalId": "1"}})
    made = [make("team", "concrete", metrics=["val_loss"]) for make in (wandb_workspace, wandb_report)]
    return [each._to_model().model_dump(by_alias=True) for each in made]


def test_every_panel_of_workspace_and_report_shows_something_that_is_logged(
    arranged, attribution, truth, saved, tmp_path
):
    loaded = Attribution.load(saved)
    runs = [
        log_to_wandb(attribution, saved),
        log_truth_to_wandb(truth, tmp_path / "truth"),
        log_evaluation_to_wandb(evaluate(attribution, truth), "first"),
        log_suggestion_to_wandb(suggest_removals(loaded), loaded),
    ]
    logged = [Logged(tmp_path, run) for run in runs]
    known = {key for each in logged for key in [*each.history, *each.summary]}
    known |= {"seeds/val_loss/mean", "seeds/val_loss/standard_deviation"}  # with an ensemble
    known |= {"queries/pictures"}  # with a gallery
    workspace, report = ({*keys_of_panels(content)} for content in arranged)
    assert workspace == report
    assert workspace <= known, workspace - known
    for kind in ("mediaKeys", "tableKey"):
        assert kind in str(arranged[0])


def test_the_workspace_draws_the_charts_as_the_runs_do(arranged, attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    panels = [panel for section in sections(arranged[0]) for panel in section["panels"] if panel["viewType"] == "Vega2"]
    assert len(panels) == 4
    for panel in panels:
        [key] = [key for key in keys_of_panels(panel) if key]
        own = logged.charts[key.removesuffix("_table")]["panel_config"]
        drawn = {name: panel["config"][name] for name in ("panelDefId", "fieldSettings", "transform")}
        assert drawn == {name: own[name] for name in drawn}


def sections(workspace):
    return workspace["spec"]["section"]["panelBankConfig"]["sections"]


def test_workspace_and_report_leave_out_the_trainings(arranged):
    for content in arranged:
        filters = [part for part in below(content) if part.get("op") == "!="]
        assert filters
        assert all((each["key"]["name"], each["value"]) == ("jobType", "training") for each in filters)


def test_the_workspace_has_a_section_for_each_question(arranged):
    titles = [section["name"] for section in sections(arranged[0])]
    assert titles == [
        "What was found",
        "The examples",
        "The most affected query",
        "Query by query",
        "Spread over seeds",
        "Does it predict retraining?",
        "Suggested removals",
    ]
    assert all(title in str(arranged[1]) for title in titles)


def test_without_wandb_workspaces_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(DTDAError, match=r'pip install "lightning-dtda\[wandb\]"'):
        wandb_workspace("team", "project")
