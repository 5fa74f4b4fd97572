"""One attribution, shown everywhere: the numbers are the same, and so is their sign."""

import io
import json
import re
from itertools import product

import pytest
from rich.console import Console

from lightning_dtda.reporting import log_to_wandb, print_summary, report
from lightning_dtda.reporting.figures import influence_figure, top_figure
from lightning_dtda.reporting.formatting import common_exponent, number
from tests.reporting.conftest import QUERIES
from tests.reporting.wandb_log import Logged

pytestmark = pytest.mark.usefixtures("offline")
K = 3


@pytest.fixture
def shown(attribution, saved, tmp_path):
    """What the terminal, the page and the table of W&B say."""
    console = Console(file=io.StringIO(), width=140, record=True)
    print_summary(attribution, k=K, console=console)
    page = report(attribution, tmp_path / "report.html", k=K).read_text()
    logged = Logged(tmp_path, log_to_wandb(attribution, saved, k=K))
    table = json.loads((logged.files / logged.history["top_examples"]["path"]).read_text())
    return console.export_text(), page, [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def change(attribution, difference, query, example):
    """What removing an example changes, from its samples alone."""
    x = attribution.baseline[:, query].double()
    y = x + attribution.responses[:, query, example].double()
    return float(y.mean() - x.mean() if difference == "mean" else y.var() - x.var())


def test_the_change_by_removal_is_the_same_number_everywhere(attribution, shown):
    printed, page, rows = shown
    frame = attribution.to_dataframe().set_index(["query", "example"])
    for query, difference in product(range(len(QUERIES)), ("mean", "variance")):
        top = attribution.top(K, difference, query=query)
        example = int(top["example"][0])
        expected = change(attribution, difference, query, example)
        close = pytest.approx(expected, rel=5e-6)  # half a unit of the last of the six digits that a figure holds
        assert float(attribution.influence(difference)[query, example]) == close
        assert float(attribution.influence(difference, removed=[example])[query]) == close
        assert (top["influence"][0], top[f"{difference}_influence"][0]) == (close, close)
        assert frame[f"{difference}_influence"][QUERIES[query], example] == close
        [row] = [r for r in rows if (r["query"], r["difference"], r["rank"]) == (QUERIES[query], difference, 1)]
        assert (row["example"], row["influence"], row[f"{difference}_influence"]) == (example, close, close)
        [article] = re.findall(rf'<article class="figures" data-query="{query}".*?</article>', page, re.DOTALL)
        [table] = re.findall(rf'data-difference="{difference}-.*?</table>', article, re.DOTALL)
        assert float(re.search(r'title="(\S+) ± ', table)[1]) == close
        low, high = attribution.interval(difference)[:, query, top["example"].tolist()].tolist()
        assert f"{number(expected, common_exponent([*top['influence'], *low, *high]))} [" in printed
        assert top_figure(attribution, query, difference, K).data[0].x[0] == close
        points = [trace for trace in influence_figure(attribution, query).data if trace.mode == "markers"]
        drawn = {n: (x, y) for t in points for x, y, (n, *_) in zip(t.x, t.y, t.customdata, strict=True)}
        assert drawn[example][difference == "variance"] == close
