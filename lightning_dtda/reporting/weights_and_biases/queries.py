"""What a run shows of an attribution's queries: panels with a slider, charts, the table of the top examples."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import wandb
from PIL import Image

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.gallery import Shown
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.figures import influence_figure
from lightning_dtda.reporting.findings import QueryFindings
from lightning_dtda.reporting.formatting import capital
from lightning_dtda.reporting.rows import TopExample
from lightning_dtda.reporting.weights_and_biases.summary_run import known
from lightning_dtda.statistics.differences import DIFFERENCES

MOST_ROWS = 10_000
"""Maximum number of rows in a table: W&B shows no more."""

_BINS = 32
_NUMBERS = (
    "influence",
    "standard_error",
    "interval_low",
    "interval_high",
    "p_value",
    "q_value",
    "significant",
    "retrainings_low",
    "retrainings_high",
    "mean_influence",
    "spread_influence",
    "out_of_range",
)


def panels(attribution: Attribution, query: QueryFindings) -> dict[str, Any]:
    """Return one step of the panels that have a slider: the numbers, pictures and distributions of a query."""
    trained, without = _samples(attribution, query)
    logged: dict[str, Any] = {
        "queries/query": attribution.queries[query.position],
        "queries/mean": float(trained.mean()),
        "queries/influence": wandb.Plotly(influence_figure(attribution, query.position)),
    }
    if len(trained) > 1:
        logged["queries/standard_deviation"] = float(trained.std(ddof=1))
    for ranked in query.ranked:
        logged[f"queries/significant_{ranked.difference.name}"] = ranked.outcome.discoveries
        logged[f"queries/largest_{ranked.difference.name}"] = known(ranked.rows[0].influence)
    finite = [sample[np.isfinite(sample)] for sample in (trained, without)]
    bins = np.histogram_bin_edges(np.concatenate(finite), _BINS)  # shared, to be compared
    for name, sample in zip(("as_trained", "without_top_example"), finite, strict=True):
        logged[f"queries/{name}"] = wandb.Histogram(np_histogram=np.histogram(sample, bins))
    if pictures := _pictures(attribution, query):
        logged["queries/pictures"] = pictures
    return logged


def charts(attribution: Attribution, query: QueryFindings) -> dict[str, Any]:
    """Return W&B's native charts of one query: top examples, mean against spread, distribution over runs."""
    what, name = wording.noun(attribution), capital(query.name)
    drawn = {}
    for ranked in query.ranked:
        bars = [[_label(attribution, row), known(row.influence)] for row in ranked.rows]
        title = f"{name}: {ranked.words.short}{', in %' * ranked.difference.relative}"
        chart = wandb.plot.bar(wandb.Table(["removed", "influence"], data=bars), "removed", "influence", title=title)
        drawn[f"top_query/top_{ranked.difference.name}"] = chart
    trained, without = _samples(attribution, query)
    drawn["top_query/distribution"] = wandb.plot.line_series(
        list(range(1, len(trained) + 1)),
        [np.sort(trained).tolist(), np.sort(without).tolist()],
        ["as trained", f"without {_label(attribution, query.ranked[-1].rows[0])}"],
        title=f"{name}: {attribution.measurement} in each run, from lowest to highest",
        xname="run",
    )
    if len(trained) > 1:
        drawn["top_query/mean_against_spread"] = _scatter(attribution, query, what, name)
    return drawn


def top_table(attribution: Attribution, queries: Sequence[QueryFindings], with_pictures: Collection[int]) -> Any:
    """Return the table of the top examples, or groups, of queries, with what they look like if it is known.

    Args:
        attribution: The attribution.
        queries: The queries.
        with_pictures: Positions of the queries whose rows have pictures.
    """
    gallery = attribution.gallery
    items = [*gallery.queries.values(), *gallery.examples.values()]
    removed = ["example"] if attribution.removals is None else ["removal", "size"]
    columns = ["query", "difference", "rank", *removed, *_NUMBERS]
    sides = {"query": gallery.query} | ({"example": gallery.example} if attribution.removals is None else {})
    looks = [*sides] if any(_text(item) for item in items) else []
    pictured = [*sides] if any(item.image for item in items) else []
    table = wandb.Table([*columns, *(f"{side}_content" for side in looks), *(f"{side}_picture" for side in pictured)])
    picture = cache(lambda side, index: _cell(sides[side](index)))  # most examples are in several rows
    for query in sorted(queries, key=lambda query: query.position):
        for ranked in query.ranked:
            for row in ranked.rows:
                fields = {**vars(row), "example": row.position, "removal": row.name}
                fields |= {"query": attribution.queries[query.position], "difference": ranked.difference.name}
                for end in ("retrainings_low", "retrainings_high"):
                    fields[end] = known(fields[end])
                texts = [_text(sides[side](fields[side])) for side in looks]
                shows = query.position in with_pictures
                pictures = [picture(side, fields[side]) if shows else None for side in pictured]
                table.add_data(*(fields[column] for column in columns), *texts, *pictures)
    return table


def _samples(attribution: Attribution, query: QueryFindings) -> tuple[np.ndarray, np.ndarray]:
    """Return the measurement in each run, as trained and without the top example by the last difference."""
    selected = attribution.select([query.position])
    predicted = selected.predict([query.ranked[-1].rows[0].position])
    return selected.baseline[:, 0].double().cpu().numpy(), predicted[:, 0].double().cpu().numpy()


def _scatter(attribution: Attribution, query: QueryFindings, what: str, name: str) -> Any:
    selected, spread = attribution.select([query.position]), DIFFERENCES["spread"]
    of_mean, of_spread = (selected.influence(each)[0].tolist() for each in ("mean", "spread"))
    order = sorted(range(len(of_mean)), key=lambda number: -abs(of_spread[number]))[:MOST_ROWS]
    names = attribution.removals or range(len(of_mean))
    x, y = "change of the mean", "change of the standard deviation in percent"
    rows = [[f"{what} {names[n]}", known(of_mean[n]), known(spread.shown(of_spread[n]))] for n in order]
    title = f"{name}: change of the {attribution.measurement} over seeds if the {what} is removed"
    return wandb.plot.scatter(wandb.Table([what, x, y], data=rows), x, y, title=title)


def _pictures(attribution: Attribution, query: QueryFindings) -> list[wandb.Image]:
    """Return the pictures of a query and its top examples by the spread, or by the first difference there is."""
    items = [(query.shown, query.name, query.as_trained.sentence)]
    ranked = next((each for each in query.ranked if each.difference.name == "spread"), query.ranked[0])
    items += [(shown, card.title, card.effect) for card in ranked.cards for shown in card.shown]
    return [
        wandb.Image(image, caption=f"{', '.join(filter(None, [title, shown.label]))}: {said}")
        for shown, title, said in items
        if (image := _image(shown)) is not None
    ]


def _label(attribution: Attribution, row: TopExample) -> str:
    """Return what to call an example, or a group."""
    name = attribution.gallery.example(row.position).name if attribution.removals is None else None
    return name or f"{wording.noun(attribution)} {row.name}"


def _image(shown: Shown) -> Image.Image | None:
    return None if shown.image is None else Image.open(io.BytesIO(shown.image))


def _cell(shown: Shown) -> wandb.Image | None:
    image = _image(shown)
    return None if image is None else wandb.Image(image)


def _text(shown: Shown) -> str:
    """Return everything but the picture in one line."""
    fields = ", ".join(f"{name} {value}" for name, value in shown.fields)
    return " · ".join(filter(None, [shown.name, shown.label, shown.prediction, shown.text, fields]))
