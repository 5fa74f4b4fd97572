"""One HTML file to hand to colleagues: no server, no network, no other files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.certainty import FDR, LEVEL, NEGLIGIBLE, PLANNING, POWER, Tested
from lightning_dtda.reporting.facts import about_in_brief, most_interesting, without_repeated_warnings
from lightning_dtda.reporting.figure_style import TEMPLATE
from lightning_dtda.reporting.figures import (
    adjoint_figure,
    baseline_figure,
    influence_figure,
    removal_figure,
    top_figure,
)
from lightning_dtda.reporting.formatting import capital, common_exponent, counts, number, p_value, unit
from lightning_dtda.reporting.rows import TopExample, significance_on, top_examples
from lightning_dtda.reporting.verdicts import retraining_verdict, verdict, verdict_on_all
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.power import can_be_planned
from lightning_dtda.trajectory.storage import replace_file
from lightning_dtda.version import __version__

MOST_QUERIES = 50
"""Maximum number of queries in a report: with the points below and ten examples per table, at most about 12 MB."""

MOST_POINTS = 100_000
"""Maximum number of points in all figures of mean against spread influence together, about 50 bytes each."""


@dataclass(frozen=True)
class _Table:
    """The top examples, or groups, by one difference, and what its tests say."""

    key: str
    difference: Difference
    words: wording.Wording
    tests: Tested
    rows: list[TopExample]
    verdicts: list[str]
    no_interval: str
    planned: bool


@dataclass(frozen=True)
class _Query:
    """What the page shows for one query: tables, and the JSON of the figures by name."""

    position: int
    name: int
    tables: list[_Table]
    figures: Markup


def report(
    attribution: Attribution, output: str | Path, k: int = 10, differences: Sequence[str | Difference] | None = None
) -> Path:
    """Write a report on an attribution as one self-contained HTML file.

    It states how many influences are significant and, if none is, how many more runs it would take. For each query and
    difference it has a table of the top examples, or groups, with intervals over seeds, and interactive figures. It
    opens without a network: plotly.js is included. If there are more than :data:`MOST_QUERIES` queries, it shows those
    on which a single removal changes the spread most, and says so.

    Args:
        attribution: The attribution.
        output: File to write; its folder is created if it does not exist.
        k: Number of examples, or groups, in each table.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`. ``None`` means mean,
            spread and Wasserstein. Differences without a test of their own, such as quantiles, are tested by 2,000
            random exchanges of X and Y: about a second per query for 20 runs and 1000 examples.

    Returns:
        The path of the file.

    Raises:
        AttributionError: If ``k`` is less than one, a difference is unknown or needs more runs, or the file cannot be
            written.

    Example:
        >>> import tempfile, torch
        >>> attribution = Attribution(torch.randn(9, 2), torch.randn(9, 2, 30), tuple("abcdefghi"), (0, 1))
        >>> report(attribution, Path(tempfile.mkdtemp()) / "report.html").name
        'report.html'
    """
    output, trusted = Path(output), attribution.trusted()
    chosen = [resolve_difference(each) for each in differences or trusted.available_differences]
    environment = Environment(
        loader=PackageLoader("lightning_dtda.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        capital=capital, number=number, unit=unit, p_value=p_value, counts=counts, exponent=_exponent
    )
    with without_repeated_warnings():
        page = environment.get_template("report.html.jinja").render(_content(attribution, trusted, k, chosen))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, page.encode())
    except OSError as error:
        raise AttributionError(
            f"The report cannot be written to {output} ({error}). Give another file name."
        ) from error
    return output


def _content(
    everything: Attribution, attribution: Attribution, k: int, differences: list[Difference]
) -> dict[str, Any]:
    """Return what the page shows: the question for all runs, the results for the trusted ones."""
    shown = most_interesting(attribution, MOST_QUERIES)
    queries = [_query(attribution, position, k, MOST_POINTS // len(shown), differences) for position in shown]
    of_differences = zip(*([table.tests.outcome for table in query.tables] for query in queries), strict=True)
    return {
        "question": wording.question(everything),
        "answer": wording.answer(everything),
        "estimator": wording.estimator(everything),
        "drift": wording.drift(everything),
        "diagnosis": wording.diagnosis(attribution),
        "cautions": wording.cautions(everything),
        "reliability": wording.reliability(attribution),
        "attribution": attribution,
        "removals": attribution.responses.shape[2],
        "noun": wording.noun(attribution),
        "out_of_range": wording.OUT_OF_RANGE,
        "a_noun": "an example" if attribution.removals is None else "a group",
        "about": json.dumps(about_in_brief(attribution), indent=2, default=str),
        "k": k,
        "fdr": f"{100 * FDR:g} %",
        "power": f"{100 * POWER:g} %",
        "level": f"{100 * LEVEL:g} %",
        "planning": f"{100 * PLANNING:g} %",
        "negligible": f"{100 * NEGLIGIBLE:g} %",
        "verdicts": [verdict_on_all(attribution, tests) for tests in of_differences],
        "queries": queries,
        "has_adjoints": any(attribution.about.get("adjoint_norms", {}).values()),
        "overview": _embedded({"baseline": baseline_figure(attribution, shown), "adjoint": adjoint_figure(everything)}),
        "template": _script_safe(json.dumps(TEMPLATE.to_plotly_json())),
        "plotly": Markup(get_plotlyjs()),
        "version": __version__,
    }


def _query(attribution: Attribution, position: int, k: int, most_points: int, differences: list[Difference]) -> _Query:
    tables = [_table(attribution, position, k, number, difference) for number, difference in enumerate(differences)]
    figures = {"influence": influence_figure(attribution, position, most_points)}
    for table in tables:
        figures[f"top-{table.key}"] = top_figure(attribution, position, table.difference, k, table.rows)
        for row in table.rows:
            figures[f"without-{row.position}"] = removal_figure(attribution, position, [row.position])
    return _Query(position, attribution.queries[position], tables, _embedded(figures))


def _table(attribution: Attribution, position: int, k: int, number: int, difference: Difference) -> _Table:
    tests = significance_on(attribution, position, difference)
    rows = top_examples(attribution, position, difference, k, tests)
    verdicts = [verdict(attribution, tests.outcome), retraining_verdict(attribution, rows)]
    words = wording.describe(difference, attribution.measurement, wording.noun(attribution))
    # a key by number: a name may have any characters, and two settings of a class may share it
    no_interval = difference.no_interval(len(attribution.runs))
    said = [text for text in verdicts if text]
    return _Table(
        f"difference-{number}",
        difference,
        words,
        tests,
        rows,
        said,
        no_interval,
        can_be_planned(difference, len(attribution.runs)),
    )


def _exponent(rows: list[TopExample], *fields: str) -> int:
    """Return the common power of ten of the columns of these fields."""
    return common_exponent(getattr(row, field) for row in rows for field in fields)


def _embedded(figures: dict[str, go.Figure]) -> Markup:
    """Return figures as JSON for a script element; the page adds the template that they share."""
    parts: Iterable[str] = (
        f"{json.dumps(name)}: {figure.update_layout(template=None).to_json()}" for name, figure in figures.items()
    )
    return _script_safe("{" + ",\n".join(parts) + "}")


def _script_safe(text: str) -> Markup:
    # in JSON, "<" only occurs inside strings, where it can be escaped; then nothing closes the script element
    return Markup(text.replace("<", "\\u003c"))
