"""One attribution, shown everywhere: the numbers are the same, and so is their sign."""

import io
import json
import math
from itertools import product

import pytest
from rich.console import Console

from lightning_dtda.cli import main
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import log_to_wandb, print_summary, report
from lightning_dtda.reporting.figures import influence_figure, top_figure
from lightning_dtda.reporting.formatting import common_exponent, number
from lightning_dtda.statistics import DIFFERENCES, Difference, SlicedWasserstein, resolve_difference
from tests.reporting.attributions import QUERIES
from tests.reporting.page import data_of, rows_of
from tests.reporting.wandb_log import Logged

pytestmark = pytest.mark.usefixtures("offline")
K = 3


class Range(Difference):
    """A difference that the package knows nothing of."""

    name, formula = "range", "range Y less range X"
    meaning = "change of the distance between the best and the worst {measurement}"
    unit = "the {measurement}'s unit"

    def __call__(self, baseline, predicted):
        return (predicted.amax(0) - predicted.amin(0)) - (baseline.amax(0) - baseline.amin(0))


def printed(attribution, differences=None):
    console = Console(file=io.StringIO(), width=140, record=True)
    print_summary(attribution, K, differences, verbose=True, console=console)
    return console.export_text()


def logged(attribution, saved, tmp_path, differences=None):
    """Return the rows of the table in W&B, and what was logged."""
    found = Logged(tmp_path, log_to_wandb(attribution, saved, k=K, differences=differences))
    table = json.loads((found.files / found.history["top_examples"]["path"]).read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]], found


def change(attribution, difference, query, example):
    """What removing an example changes, from its samples alone."""
    x = attribution.baseline[:, query].double()
    y = x + attribution.responses[:, query, example].double()
    return float(y.mean() - x.mean() if difference == "mean" else (y.std() / x.std()).log())


@pytest.mark.slow
def test_the_change_by_removal_is_the_same_number_everywhere(attribution, saved, tmp_path):
    text, (rows, _) = printed(attribution), logged(attribution, saved, tmp_path)
    data = data_of(report(attribution, tmp_path / "report.html", k=K))
    frame = attribution.to_dataframe().set_index(["query", "example"])
    for query, difference in product(range(len(QUERIES)), ("mean", "spread")):
        top = attribution.top(K, difference, query=query)
        example = int(top["example"][0])
        expected = change(attribution, difference, query, example)
        shown = expected if difference == "mean" else 100 * math.expm1(expected)  # in percent
        # half a unit of the last of the six digits that a figure holds
        close, close_shown = (pytest.approx(value, rel=5e-6) for value in (expected, shown))
        assert float(attribution.influence(difference)[query, example]) == close
        assert float(attribution.influence(difference, removed=[example])[query]) == close
        assert (top["influence"][0], top[f"{difference}_influence"][0]) == (close, close)
        assert frame[f"{difference}_influence"][QUERIES[query], example] == close
        [row] = [r for r in rows if (r["query"], r["difference"], r["rank"]) == (QUERIES[query], difference, 1)]
        assert (row["example"], row["influence"], row[f"{difference}_influence"]) == (example, close_shown, close_shown)
        shown_on_page = rows_of(data, query, difference == "spread")[0]
        assert (shown_on_page["position"], shown_on_page["influence"]) == (example, close_shown)
        ends = attribution.interval(difference)[:, query, top["example"].tolist()].flatten().tolist()
        scale = common_exponent(map(DIFFERENCES[difference].shown, [*top["influence"], *ends]))
        assert f"{number(shown, scale)} [" in text
        assert top_figure(attribution, query, difference, K).data[0].x[0] == close_shown
        points = [trace for trace in influence_figure(attribution, query).data if trace.mode == "markers"]
        drawn = {n: (x, y) for t in points for x, y, (n, *_) in zip(t.x, t.y, t.customdata, strict=True)}
        assert drawn[example][difference == "spread"] == close_shown


def test_a_new_difference_is_one_class_and_is_shown_everywhere(attribution, saved, tmp_path):
    path = f"{__name__}.Range"
    top = attribution.top(K, path, query=0)
    largest = top["influence"][0]
    # of float64 samples, by hand
    x = attribution.baseline[:, 0].double()
    y = x + attribution.responses[:, 0, int(top["example"][0])].double()
    assert largest == pytest.approx(float(y.max() - y.min() - x.max() + x.min()), rel=1e-12)
    head = "change of the distance between the best and the worst loss"

    text = " ".join(printed(attribution, [path]).split())
    ends = attribution.interval(path)[:, 0, top["example"].tolist()].flatten().tolist()
    assert f"{number(largest, common_exponent([*top['influence'], *ends]))} [" in text
    assert "significant range influence" in text
    rows, found = logged(attribution, saved, tmp_path, [path])
    assert [row["influence"] for row in rows[:K]] == pytest.approx(top["influence"].tolist())
    assert {row["difference"] for row in rows} == {"range"}
    assert "significant/range" in found.summary

    main(["report", "--attribution", str(saved), "--output", str(tmp_path / "new.html"), "--differences", path, "mean"])
    new, mean = data_of(tmp_path / "new.html")["differences"]
    assert (new["title"], new["formula"], mean["title"]) == (
        "range influence",
        "range Y less range X",
        "mean influence",
    )
    assert new["meaning"] == f"{head} on this query if the example is removed"
    assert new["unit"] == "the loss's unit"
    assert new["question"] == f"Which examples make the largest {head}?"
    assert new["reading"].startswith("Positive: removing the example raises it.")
    assert rows_of(data_of(tmp_path / "new.html"), 0, 0)[0]["influence"] == pytest.approx(largest, rel=5e-6)


def test_a_class_that_does_not_say_what_it_is_is_refused():
    with pytest.raises(TypeError, match=r"Silent is a Difference without formula, meaning, unit"):
        type("Silent", (Difference,), {"name": "silent"})
    with pytest.raises(AttributionError, match=r"'tests.reporting.attributions.make_attribution' is not a Difference"):
        resolve_difference("tests.reporting.attributions.make_attribution")
    with pytest.raises(AttributionError, match=r"joint distributions over several queries\. Call .*joint_influence"):
        resolve_difference(SlicedWasserstein())
