"""Predictions that the measurement cannot take: counted, marked and drawn wherever influences are shown."""

import io
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from rich.console import Console

from lightning_dtda import export
from lightning_dtda.reporting import log_to_wandb, print_summary, report
from lightning_dtda.reporting.figures import removal_figure
from lightning_dtda.reporting.wording import answer, cautions
from tests.reporting.attributions import make_attribution
from tests.reporting.page import data_of, rows_of, text_of
from tests.reporting.wandb_log import Logged

CAUTION = "predictions are below 0 in some run, where the loss cannot be"


@pytest.fixture
def attribution():
    """Losses, of which that of the second run is predicted below zero on the first query without example 23."""
    found = make_attribution(range=[0.0, None])
    baseline = found.baseline.abs() + 0.5
    responses = found.responses.clamp(-0.4, 0.4)
    responses[1, 0, 23] = -2 * baseline[1, 0]
    responses[2, 0, 23] = 2 * baseline[1, 0]
    return replace(found, baseline=baseline, responses=responses)


def test_the_count_is_a_caution_with_a_remedy_that_works(attribution):
    [caution] = [each for each in cautions(attribution) if CAUTION in each]
    assert caution.startswith("On 1 of 3 queries, 1 of 120 predictions")
    assert 'Attribute again with scale="sqrt"' in caution
    assert not any(CAUTION in each for each in cautions(attribution.on_scale("sqrt")))
    assert 'on the scale "sqrt"' in answer(attribution.on_scale("sqrt"))
    probabilities = torch.sigmoid(attribution.baseline)
    bounded = replace(attribution, baseline=probabilities, about=attribution.about | {"range": [0.0, 1.0]})
    assert any("below 0 or above 1" in each and 'scale="logit"' in each for each in cautions(bounded))
    assert not any("above 1" in each for each in cautions(bounded.on_scale("logit")))
    unknown = make_attribution()
    assert not any("cannot be" in each for each in cautions(unknown))


def test_tables_and_files_have_the_share_of_runs(attribution, tmp_path):
    shares = {23: 1 / 12}
    top = attribution.top(3, "variance", query=0)
    assert [shares.get(row.example, 0.0) for row in top.itertuples()] == pytest.approx(top["out_of_range"].tolist())
    data = attribution.to_xarray()["out_of_range"]
    assert float(data[0, 23]) == pytest.approx(1 / 12)
    assert float(data.sum()) == pytest.approx(1 / 12)
    exported = pd.read_parquet(export(attribution, tmp_path / "influences.parquet"))
    assert exported["out_of_range"].sum() == pytest.approx(1 / 12)
    assert "out_of_range" not in pd.read_parquet(export(make_attribution(), tmp_path / "other.parquet"))


def test_the_terminal_and_the_page_mark_the_row(attribution, tmp_path):
    console = Console(file=io.StringIO(), width=140, record=True)
    print_summary(attribution, 3, ["variance"], console=console)
    out = console.export_text()
    assert CAUTION in " ".join(out.split())
    assert "\N{DAGGER}23" in out
    path = report(attribution, tmp_path / "report.html", differences=["variance"])
    assert CAUTION in " ".join(re.sub("<[^>]*>", " ", text_of(path)).split())
    outside = {
        row["position"]: row["outside"]
        for query in range(3)
        for row in rows_of(data_of(path), query, 0)
        if row["outside"]
    }
    assert outside == {23: pytest.approx(1 / 12, rel=1e-3)}


@pytest.mark.usefixtures("offline")
def test_wandb_has_a_column_and_a_count(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    run = Logged(tmp_path, log_to_wandb(attribution, tmp_path / "saved", k=3, differences=["variance"]))
    assert run.summary["queries_predicted_out_of_range"] == 1
    table = json.loads((run.files / run.history["top_examples"]["path"]).read_text())
    column = table["columns"].index("out_of_range")
    assert max(row[column] for row in table["data"]) == pytest.approx(1 / 12)


def test_the_figure_of_the_runs_shows_the_limit(attribution):
    [line] = removal_figure(attribution, 0, [23]).layout.shapes
    assert line.y0 == line.y1 == 0.0
    [text] = [each.text for each in removal_figure(attribution, 0, [23]).layout.annotations]
    assert text == "the loss is never below 0"
    assert not removal_figure(attribution, 0, [11]).layout.shapes
    about = attribution.about | {"range": [0.0, 1.0]}
    upper = replace(attribution, baseline=torch.full_like(attribution.baseline, 0.9), about=about)
    assert [line.y0 for line in removal_figure(upper, 0, [23]).layout.shapes] == [0.0, 1.0]
