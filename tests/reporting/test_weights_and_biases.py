import json

import numpy as np
import pytest
import wandb

from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import log_to_wandb
from tests.reporting.attributions import GROUPS, QUERIES, make_attribution
from tests.reporting.wandb_log import Logged

pytestmark = pytest.mark.usefixtures("offline")


def test_the_table_holds_the_top_examples_of_every_query_and_difference(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=6))
    table = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())
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
    rows = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())["data"]
    assert [row[3] for row in rows if row[1] == "spread"] == attribution.top(4, "spread")["example"].tolist()
    assert logged.summary["reliability"] == pytest.approx(float(attribution.reliability().median()))
    example = attribution.top(1, "spread", query=0)["example"][0]
    assert f"distribution/query {QUERIES[0]}, without example {example}" in logged.history


def test_the_table_and_the_notes_say_how_sure_it_is(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=6))
    table = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())
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


def test_histograms_count_the_runs_as_trained_and_without_the_top_example(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    for position, query in enumerate(QUERIES):
        example = attribution.top(1, "wasserstein", query=position).example[0]
        samples = {
            "as trained": attribution.baseline[:, position],
            f"without example {example}": attribution.predict([example])[:, position],
        }
        bins = []
        for name, expected in samples.items():
            histogram = logged.history[f"distribution/query {query}, {name}"]
            counts, _ = np.histogram(expected, histogram["bins"])
            assert histogram["values"] == counts.tolist()
            assert sum(counts) == len(attribution.runs)
            bins.append(histogram["bins"])
        assert bins[0] == bins[1], "two histograms are compared on the same bins"


def test_each_query_has_its_figure_with_every_example(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    for position, query in enumerate(QUERIES):
        entry = logged.history[f"influence/query {query}"]
        assert entry["_type"] == "plotly-file"
        figure = json.loads((logged.files / entry["path"]).read_text())
        traces = [trace for trace in figure["data"] if trace.get("name")]
        points = [(x, y) for trace in traces for x, y in zip(trace["x"], trace["y"], strict=True)]
        shift, change = attribution.influence("mean")[position], 100 * attribution.influence("spread")[position].expm1()
        expected = sorted(zip(shift.tolist(), change.tolist(), strict=True))
        # half a unit of the last of the six digits that a figure holds
        np.testing.assert_allclose(sorted(points), expected, rtol=5e-6, atol=1e-12)


def test_the_run_says_what_was_asked(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    assert (logged.run.project, logged.run.run_group, logged.run.job_type) == (
        "lightning-dtda",
        "concrete",
        "attribution",
    )
    assert {key: logged.config[key] for key in attribution.about} == attribution.about
    facts = {"runs": 12, "chaotic_runs": 0, "queries": 3, "examples": 40, "largest_drift/gradients": 2e-6}
    assert logged.summary["reliability"] == pytest.approx(attribution.reliability().median().item())
    assert {key: logged.summary[key] for key in facts} == facts
    assert logged.summary["largest_drift/parameters"] == pytest.approx(1.2e-6)
    assert logged.summary["largest_error/finite_differences"] == pytest.approx(2e-5)
    assert logged.summary["largest_error/precision"] == pytest.approx(1.1e-5)
    assert logged.exit_code == 0


def test_runs_that_are_left_out_are_named_with_the_size_of_their_responses(saved, tmp_path):
    norms = {f"seed-{run:04d}": 1.0 for run in range(12)} | {"seed-0003": 8.0, "seed-0007": 40.0}
    chaotic = make_attribution(chaotic=["seed-0003", "seed-0007"], response_norm=norms)
    notes = Logged(tmp_path, log_to_wandb(chaotic, saved)).run.notes
    assert "2 runs are left out of 12 as chaotic (seed-0003, seed-0007)" in notes
    assert "responses are 8 to 40 times as large as those of a typical run" in notes


def test_the_attribution_itself_is_an_artifact(attribution, saved, tmp_path):
    logged = Logged(tmp_path, log_to_wandb(attribution, saved))
    [artifact] = [artifact for artifact in logged.artifacts if artifact.type == "attribution"]
    assert artifact.name == "attribution-concrete"
    assert {entry.path for entry in artifact.manifest.contents} == {path.name for path in saved.iterdir()}


def test_project_and_group_can_be_chosen(attribution, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "from-the-environment")
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, group="mine"))
    assert (logged.run.project, logged.run.run_group) == ("from-the-environment", "mine")
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, project="given"))
    assert logged.run.project == "given"


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


def test_a_single_run_is_logged_without_variance(tmp_path, recwarn):
    attribution = make_attribution(runs=1, ensemble="odd name / 1")
    attribution.save(tmp_path / "attribution")
    logged = Logged(tmp_path, log_to_wandb(attribution, tmp_path / "attribution", k=2))
    table = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())
    assert {row[1] for row in table["data"]} == {"mean", "wasserstein"}
    assert [artifact.name for artifact in logged.artifacts if artifact.type == "attribution"] == [
        "attribution-odd-name-1"
    ]
    assert not [warning for warning in recwarn if "Influences of" in str(warning.message)]


def test_no_example_at_all_is_refused_before_a_run_is_made(attribution, saved, tmp_path):
    with pytest.raises(AttributionError, match="removals to show, at least 1"):
        log_to_wandb(attribution, saved, k=0)
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def test_an_attribution_that_is_not_saved_is_refused(attribution, tmp_path):
    with pytest.raises(AttributionError, match="Save the attribution there first"):
        log_to_wandb(attribution, tmp_path / "nowhere")


def test_groups_are_logged_by_name_and_size(grouped, tmp_path):
    grouped.save(tmp_path / "attribution")
    logged = Logged(tmp_path, log_to_wandb(grouped, tmp_path / "attribution", k=2))
    table = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())
    assert table["columns"][2:5] == ["rank", "removal", "size"]
    top = grouped.top(2, "mean", query=0)
    assert [row[3:5] for row in table["data"][:2]] == top[["removal", "size"]].to_numpy().tolist()
    largest = grouped.top(1, "wasserstein", query=0)["removal"][0]
    assert f"distribution/query 4, without group {largest}" in logged.history
    assert logged.summary["groups"] == len(GROUPS)
    assert logged.config["removals"] == {name: 1 + n % 3 for n, name in enumerate(GROUPS)}
