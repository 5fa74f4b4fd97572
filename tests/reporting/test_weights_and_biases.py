"""What a colleague sees in Weights & Biases, read back from the files of offline runs."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from PIL import Image

from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import log_to_wandb
from lightning_dtda.reporting.findings import find
from lightning_dtda.reporting.weights_and_biases.summary_run import MOST_SETTINGS, use
from lightning_dtda.trajectory import Ensemble, RunWriter
from tests.reporting.attributions import GROUPS, QUERIES, make_attribution
from tests.reporting.wandb_log import Logged
from tests.trajectory.runs import manifest

pytestmark = pytest.mark.usefixtures("offline")


def test_the_table_holds_the_top_examples_of_every_query_and_difference(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=6))
    table = logged.content(logged.history["top_examples"])
    columns = table["columns"]
    assert columns[:2] == ["query", "difference"]
    assert len(table["data"]) == len(QUERIES) * 3 * 6
    for difference in ("mean", "spread", "wasserstein"):
        top = attribution.top(6, difference)
        rows = [row for row in table["data"] if row[1] == difference]
        top["spread_influence"] = 100 * np.expm1(top["spread_influence"])
        if difference == "spread":  # in percent
            top["standard_error"] *= 100 * np.exp(top["influence"])
            top["influence"] = top["spread_influence"]
        for column in top.columns:
            np.testing.assert_allclose([row[columns.index(column)] for row in rows], top[column], rtol=1e-12)


def test_a_top_that_was_kept_is_logged(attribution, tmp_path):
    kept = attribution.keep_top(4)
    kept.save(tmp_path / "kept")
    logged = Logged(tmp_path, log_to_wandb(kept, tmp_path / "kept"))
    rows = logged.content(logged.history["top_examples"])["data"]
    assert [row[3] for row in rows if row[1] == "spread"] == attribution.top(4, "spread")["example"].tolist()
    assert logged.summary["agreement"] == pytest.approx(float(attribution.reliability().median()))


def test_the_table_and_the_notes_say_how_sure_it_is(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=6))
    table = logged.content(logged.history["top_examples"])
    columns = table["columns"]
    for difference in ("mean", "spread", "wasserstein"):
        rows = [row for row in table["data"] if row[1] == difference]
        at = [(QUERIES.index(row[0]), row[columns.index("example")]) for row in rows]
        shown = (lambda ends: 100 * ends.expm1()) if difference == "spread" else (lambda ends: ends)
        expected = {
            "interval_low": shown(attribution.interval(difference)[0]),
            "interval_high": shown(attribution.interval(difference)[1]),
            "p_value": attribution.p_values(difference),
            "significant": attribution.significant(difference),
        }
        for column, values in expected.items():
            np.testing.assert_allclose(
                [row[columns.index(column)] for row in rows], [values[place] for place in at], rtol=1e-9
            )
        significant = attribution.significant(difference).sum(1)
        assert logged.summary[f"significant/{difference}"] == significant.median().item()
    assert "1 of 40 examples has a significant spread influence (12 runs, " in logged.run.notes


def of_queries(logged):
    """The steps of the run that show a query, by its position."""
    steps = [step for step in logged.steps if "queries/query" in step]
    return {QUERIES.index(step["queries/query"]): step for step in steps}


def test_each_query_is_a_step_and_the_most_affected_one_is_the_last(attribution, saved, tmp_path):
    steps = of_queries(Logged(tmp_path, log_to_wandb(attribution, saved)))
    assert [*steps] == find(attribution).most_interesting[::-1]
    largest = (100 * attribution.influence("spread").expm1()).abs().amax(1)
    for position, step in steps.items():
        baseline = attribution.baseline[:, position].double()
        assert step["queries/mean"] == pytest.approx(baseline.mean().item())
        assert step["queries/standard_deviation"] == pytest.approx(baseline.std().item())
        assert abs(step["queries/largest_spread"]) == pytest.approx(largest[position].item())
        assert step["queries/significant_mean"] == attribution.significant("mean")[position].sum()


def test_histograms_count_the_runs_as_trained_and_without_the_top_example(attribution, saved, tmp_path):
    for position, step in of_queries(Logged(tmp_path, log_to_wandb(attribution, saved))).items():
        example = attribution.top(1, "wasserstein", query=position).example[0]
        samples = {
            "as_trained": attribution.baseline[:, position],
            "without_top_example": attribution.predict([example])[:, position],
        }
        bins = []
        for name, expected in samples.items():
            histogram = step[f"queries/{name}"]
            counts, _ = np.histogram(expected, histogram["bins"])
            assert histogram["values"] == counts.tolist()
            assert sum(counts) == len(attribution.runs)
            bins.append(histogram["bins"])
        assert bins[0] == bins[1], "two histograms are compared on the same bins"


def points_against(expected, points):
    # half a unit of the last of the six digits that a figure holds
    np.testing.assert_allclose(sorted(map(tuple, points)), sorted(expected), rtol=5e-6, atol=1e-12)


def test_figure_and_chart_have_every_example(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    mean, spread = attribution.influence("mean"), 100 * attribution.influence("spread").expm1()
    expected = [list(zip(*pair, strict=True)) for pair in zip(mean.tolist(), spread.tolist(), strict=True)]
    for position, step in of_queries(logged).items():
        figure = logged.content(step["queries/influence"])
        traces = [trace for trace in figure["data"] if trace.get("name")]
        points_against(expected[position], [xy for trace in traces for xy in zip(trace["x"], trace["y"], strict=True)])
    chart = logged.content(logged.history["top_query/mean_against_spread_table"])
    points_against(expected[position], [row[1:] for row in chart["data"]])  # of the last query, the most affected
    assert chart["columns"][1:] == ["change of the mean", "change of the standard deviation in percent"]


def test_native_charts_say_what_they_show(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=4))
    last = [*of_queries(logged)][-1]
    kinds = {
        "top_query/top_mean": "bar",
        "top_query/top_spread": "bar",
        "top_query/top_wasserstein": "bar",
        "top_query/mean_against_spread": "scatter",
        "top_query/distribution": "lineseries",
    }
    assert logged.charts.keys() == kinds.keys()
    for key, kind in kinds.items():
        chart, table = logged.charts[key]["panel_config"], logged.content(logged.history[f"{key}_table"])
        assert chart["panelDefId"] == f"wandb/{kind}/v0"
        assert chart["stringSettings"]["title"].startswith(f"Query {QUERIES[last]}: ")
        assert set(chart["fieldSettings"].values()) <= {*table["columns"]}
    bars = logged.content(logged.history["top_query/top_mean_table"])["data"]
    top = attribution.top(4, "mean", query=last)
    assert [label for label, _ in bars] == [f"example {example}" for example in top["example"]]
    np.testing.assert_allclose([value for _, value in bars], top["influence"])
    lines = logged.content(logged.history["top_query/distribution_table"])["data"]
    trained = [value for _, line, value in lines if line == "as trained"]
    np.testing.assert_allclose(trained, attribution.baseline[:, last].sort().values)


def test_keys_hold_no_index_so_that_two_attributions_line_up(saved, tmp_path):
    one, other = make_attribution(), make_attribution(ensemble="other")
    other = replace(other, queries=tuple(query + 100 for query in other.queries), responses=other.responses.flip(2))
    keys = []
    for attribution in (one, other):
        logged = Logged(tmp_path, log_to_wandb(attribution, saved))
        keys.append({*logged.history, *logged.summary, *logged.charts})
    assert keys[0] == keys[1]
    assert not [key for key in keys[0] if any(character.isdigit() for character in key)]


def picture(shade):
    content = io.BytesIO()
    Image.new("L", (3, 2), shade).save(content, "png")
    return content.getvalue()


def test_the_examples_are_shown_as_they_look(attribution, saved, tmp_path):
    examples = {index: Shown(label=f"class {index % 2}", image=picture(index)) for index in range(40)}
    queries = {query: Shown(text="a query", image=picture(100 + query)) for query in QUERIES}
    logged = Logged(tmp_path, log_to_wandb(replace(attribution, gallery=Gallery(examples, queries)), saved, k=6))
    for position, step in of_queries(logged).items():
        pictures = step["queries/pictures"]
        top = attribution.top(5, "spread", query=position)["example"].tolist()
        shades = [Image.open(logged.files / path).getpixel((0, 0)) for path in pictures["filenames"]]
        assert shades == [100 + QUERIES[position], *top]
        assert pictures["captions"][0].startswith(f"query {QUERIES[position]}: loss ")
        expected = f"example {top[0]}, class {top[0] % 2}: Without it, the loss's standard deviation over runs "
        assert pictures["captions"][1].startswith(expected)
    [files] = [artifact.manifest.contents for artifact in logged.outputs.values() if "top_examples" in artifact.name]
    files = {entry.path: entry.local_path for entry in files}  # a table with pictures is an artifact of its own
    table = json.loads(Path(files["top_examples.table.json"]).read_text())
    for row in table["data"]:
        row = dict(zip(table["columns"], row, strict=True))
        assert (row["query_content"], row["example_content"]) == ("a query", f"class {row['example'] % 2}")
        for side, shade in {"example": row["example"], "query": 100 + row["query"]}.items():
            assert Image.open(files[row[f"{side}_picture"]["path"]]).getpixel((0, 0)) == shade


def test_the_report_is_a_page_of_the_run(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    assert logged.history["report"]["_type"] == "html-file"
    page = (logged.files / logged.history["report"]["path"]).read_text()
    assert "How does the loss on 3 queries change if one of 40 training examples is removed?" in page


def test_the_run_is_named_after_the_question(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    assert logged.run.display_name == "concrete: loss without one of 40 examples (UnrolledDifferentiation)"
    assert [*logged.run.tags] == ["attribution", "loss", "UnrolledDifferentiation", "examples"]
    assert (logged.run.project, logged.run.run_group, logged.run.job_type) == (
        "lightning-dtda",
        "concrete",
        "attribution",
    )
    assert logged.exit_code == 0


def test_notes_and_summary_say_what_was_found_the_verdict_first(attribution, saved, tmp_path):
    logged, found = Logged(tmp_path, log_to_wandb(attribution, saved)), find(attribution)
    summary = logged.summary
    assert (summary["verdict"], summary["usable"]) == (found.verdict.sentence, found.verdict.level)
    assert logged.run.notes.splitlines()[0] == f"{found.verdict.sign} {found.verdict.sentence}"
    for text in (found.question, found.answer, *found.said, *(step.title for step in found.next_steps)):
        assert text in logged.run.notes
    assert all(command in logged.run.notes for step in found.next_steps for command in step.commands)
    assert summary["agreement"] == pytest.approx(attribution.reliability().median().item())
    assert (summary["chaotic_runs"], summary["largest_drift/gradients"]) == (0, 2e-6)
    assert summary["largest_drift/parameters"] == pytest.approx(1.2e-6)
    assert summary["largest_error/finite_differences"] == pytest.approx(2e-5)
    assert summary["largest_error/precision"] == pytest.approx(1.1e-5)


def test_the_configuration_has_few_values_that_say_what_was_asked(tmp_path):
    hyperparameters = {f"width of layer {number}": number for number in range(100)}
    trained = {
        "module": {"class": "mine.Net", "hyperparameters": hyperparameters},
        "hyperparameters": {"lr": [0.1], "momentum": [0.9, 0.8]},
        "training": {"batch_size": 32, "gradient_clip_val": None},
    }
    attribution = make_attribution(configuration=trained)
    attribution.save(tmp_path / "attribution")
    config = Logged(tmp_path, log_to_wandb(attribution, tmp_path / "attribution")).config
    assert len(config) == MOST_SETTINGS
    expected = {
        "measurement": "loss",
        "estimator": "UnrolledDifferentiation",
        "estimator/precision": "float64",
        "removal": "reweight",
        "ensemble": "concrete",
        "runs": 12,
        "queries": 3,
        "examples": 40,
        "module": "mine.Net",
        "optimizer/lr": 0.1,
        "optimizer/momentum": [0.9, 0.8],
        "training/batch_size": 32,
    }
    assert {key: config[key] for key in expected} == expected
    assert "training/gradient_clip_val" not in config  # not set


def test_runs_that_are_left_out_are_named_with_the_size_of_their_responses(saved, tmp_path):
    norms = {f"seed-{run:04d}": 1.0 for run in range(12)} | {"seed-0003": 8.0, "seed-0007": 40.0}
    chaotic = make_attribution(chaotic=["seed-0003", "seed-0007"], response_norm=norms)
    logged = Logged(tmp_path, log_to_wandb(chaotic, saved))
    for text in (logged.run.notes, logged.summary["cautions"]):
        assert "2 runs are left out of 12 as chaotic (seed-0003, seed-0007)" in text
        assert "responses are 8 to 40 times as large as those of a typical run" in text


@pytest.fixture
def ensemble(tmp_path):
    """Three runs that logged a metric, of which one lacks another."""
    for seed, metrics in enumerate(
        [{"val_loss": 1.0, "val_acc": 0.5}, {"val_loss": 2.0}, {"val_loss": 6.0, "val_acc": 0.7}]
    ):
        directory = tmp_path / "concrete" / f"seed-{seed:04d}"
        directory.mkdir(parents=True)
        RunWriter(directory, replace(manifest(), seed=seed, metrics=metrics)).close("complete")
    return Ensemble.open(tmp_path / "concrete")


def test_the_summary_has_the_spread_over_seeds_of_what_the_trainings_logged(attribution, saved, ensemble, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, ensemble=ensemble))
    expected = {"val_loss/mean": 3.0, "val_loss/standard_deviation": 7**0.5, "val_loss/n": 3, "val_acc/n": 2}
    assert {key: logged.summary[f"seeds/{key}"] for key in expected} == pytest.approx(expected)
    table = logged.content(logged.history["seeds"])
    assert table["columns"] == ["run", "seed", "val_loss", "val_acc"]
    assert table["data"][1] == ["seed-0001", 1, 2.0, None]


def test_the_lineage_goes_from_the_recorded_runs_to_the_attribution(attribution, saved, ensemble, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, ensemble=ensemble))
    recording, found = logged.inputs["recording-concrete"], logged.outputs["attribution-concrete"]
    assert (recording.type, found.type) == ("recording", "attribution")
    assert {entry.path for entry in recording.manifest.contents} == {f"{run.name}/manifest.json" for run in ensemble}
    assert {entry.path for entry in found.manifest.contents} == {path.name for path in saved.iterdir()}


def test_an_online_run_takes_its_input_from_the_server():
    used = []
    use(SimpleNamespace(offline=False, disabled=False, use_artifact=used.append), "the artifact")
    assert used == ["the artifact"]


def test_an_attribution_that_was_loaded_is_logged_from_its_directory(saved, tmp_path):
    loaded = type(make_attribution()).load(saved)
    logged = Logged(tmp_path, log_to_wandb(loaded))
    found = logged.outputs["attribution-concrete"]
    assert {entry.path for entry in found.manifest.contents} == {path.name for path in saved.iterdir()}


def test_where_it_goes_is_said_as_for_any_run_of_wandb(attribution, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    monkeypatch.setenv("WANDB_RUN_GROUP", "a-group")
    monkeypatch.setenv("WANDB_TAGS", "paper,draft")
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, group="mine", entity="team", name="a name"))
    assert (logged.run.project, logged.run.run_group) == ("from-the-environment", "mine")
    assert (logged.run.entity, logged.run.display_name) == ("team", "a name")
    assert {"paper", "draft", "attribution"} <= {*logged.run.tags}
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, project="given"))
    assert (logged.run.project, logged.run.run_group) == ("given", "a-group")


def test_a_run_that_is_active_goes_on_untouched(attribution, saved, tmp_path):
    active = wandb.init(project="training")
    summary = log_to_wandb(attribution, saved)
    assert wandb.run is active
    active.log({"loss": 1.0})
    active.finish()
    assert summary != active.id
    history = Logged(tmp_path, active.id).history
    assert history["loss"] == 1.0
    assert "top_examples" not in history


def test_nothing_is_written_where_wandb_is_disabled(attribution, saved, ensemble, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_to_wandb(attribution, saved, ensemble=ensemble)
    assert not [*tmp_path.glob("wandb/*run-*")]


def test_a_single_run_is_logged_without_variance(tmp_path, recwarn):
    attribution = make_attribution(runs=1, ensemble="odd name / 1")
    attribution.save(tmp_path / "attribution")
    logged = Logged(tmp_path, log_to_wandb(attribution, tmp_path / "attribution", k=2))
    table = logged.content(logged.history["top_examples"])
    assert {row[1] for row in table["data"]} == {"mean", "wasserstein"}
    assert "attribution-odd-name-1" in logged.outputs
    assert not [warning for warning in recwarn if "Influences of" in str(warning.message)]


def test_no_example_at_all_is_refused_before_a_run_is_made(attribution, saved, tmp_path):
    with pytest.raises(AttributionError, match="removals to show, at least 1"):
        log_to_wandb(attribution, saved, k=0)
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def test_an_attribution_that_is_not_saved_is_refused(attribution, tmp_path):
    with pytest.raises(AttributionError, match="Save it, and give the directory"):
        log_to_wandb(attribution)
    with pytest.raises(AttributionError, match="nowhere does not exist"):
        log_to_wandb(attribution, tmp_path / "nowhere")
    attribution.save(tmp_path / "nowhere")
    log_to_wandb(attribution, tmp_path / "nowhere")


def test_groups_are_logged_by_name_and_size(grouped, tmp_path):
    grouped.save(tmp_path / "attribution")
    logged = Logged(tmp_path, log_to_wandb(grouped, tmp_path / "attribution", k=2))
    table = logged.content(logged.history["top_examples"])
    assert table["columns"][2:5] == ["rank", "removal", "size"]
    top = grouped.top(2, "mean", query=0)
    assert [row[3:5] for row in table["data"][:2]] == top[["removal", "size"]].to_numpy().tolist()
    assert logged.config["groups"] == len(GROUPS)
    assert logged.run.display_name == "concrete: loss without one of 40 groups (UnrolledDifferentiation)"
    labels = [row[0] for row in logged.content(logged.history["top_query/top_mean_table"])["data"]]
    assert all(label.removeprefix("group ") in GROUPS for label in labels)
