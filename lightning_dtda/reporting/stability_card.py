"""What was found as Markdown for a model card: how much results depend on the seed, and on which training examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from lightning_dtda.reporting import wording
from lightning_dtda.reporting.against_retraining import Retrained
from lightning_dtda.reporting.certainty import FDR, LEVEL
from lightning_dtda.reporting.findings import Findings
from lightning_dtda.reporting.formatting import capital
from lightning_dtda.reporting.wording import counted, noun
from lightning_dtda.statistics.variance_components import deviation_interval
from lightning_dtda.text import printable
from lightning_dtda.version import __version__

MOST_QUERIES, MOST_ROWS = 5, 10
"""Number of queries and of examples on the card."""


def stability_card(found: Findings, compared: Retrained | None = None) -> str:
    """Return findings as a section of a model card, in Markdown.

    It names queries and examples, and has their labels, but none of their content.

    Args:
        found: The findings, of mean and spread.
        compared: Predictions beside retraining.
    """
    attribution = found.attribution.trusted()
    what, measurement = noun(attribution), attribution.measurement
    trainings = counted(len(attribution.runs), "training")
    several = len(attribution.runs) > 1
    parts = [
        "## Training stability",
        f"Training again with another seed gives another model. This section says how much the {measurement} changes "
        f"with the seed, and which training {what}s change its distribution, as found in {trainings} "
        f"on {counted(len(found.queries), 'query', 'queries')}.",
        f"**{found.verdict.sign} {found.verdict.headline}.** {capital(found.verdict.reason)}",
        *(f"> **Caution.** {caution}" for caution in found.cautions),
    ]
    if several:
        parts += ["### Queries that depend most on the seed", _unstable(found, attribution.baseline)]
    if found.sources is not None:
        parts += ["### Where the variance comes from", *map(_cell, found.sources.said)]
    parts += [f"### Training {what}s with significant influence", *_influential(found, what)]
    if compared is not None:
        parts += ["### Against retraining", "\n".join(f"- {sentence}" for sentence in compared.said)]
    compares = "; predictions are compared with retraining above" if compared is not None else ""
    meaning = (
        f"*Without* {'an' if what == 'example' else 'a'} {what}: with weight zero in every training step, all else as "
        f"it was. This is predicted, not retrained{compares}. How: {wording.estimator(attribution)}.",
        f"Brackets: {100 * LEVEL:g} % intervals over seeds. *Significant*: at a false discovery rate of {100 * FDR:g} "
        f"% among all {attribution.responses.shape[2]:,} {what}s, query by query.",
        "It holds for this architecture, data set and training configuration, and for these queries; not for others.",
        f"Made by lightning-dtda {__version__}, by the method of Mlodozeniec et al., *Distributional Training Data "
        "Attribution: What do Influence Functions Sample?*, NeurIPS 2025, arXiv 2506.12965.",
    )
    parts += ["### What this means", "\n".join(f"- {sentence}" for sentence in meaning)]
    return "\n\n".join(parts) + "\n"


def _unstable(found: Findings, baseline: Tensor) -> str:
    """Return a table of the queries with the largest standard deviations over runs."""
    samples = baseline.double()
    deviation, ends = samples.std(0), deviation_interval(samples, LEVEL)
    order = deviation.nan_to_num(-1).argsort(descending=True, stable=True)[:MOST_QUERIES].tolist()
    rows = []
    for query in order:
        one = found.queries[query]
        size, low, high = (f"{value:.2g}" for value in (deviation[query], *ends[:, query]))
        rows.append((one.name, one.shown.label or "", f"{samples[:, query].mean():.3g}", f"{size} [{low}, {high}]"))
    columns = ("query", "label", f"mean {found.attribution.measurement}", "standard deviation over seeds")
    return _table(columns, rows)


def _influential(found: Findings, what: str) -> Iterator[str]:
    """Yield a table of the significant influences that are largest for their query, and what it leaves out."""
    listed = []
    for query in found.queries:
        for ranked in query.ranked:
            scale = max((abs(row.influence) for row in ranked.rows if math.isfinite(row.influence)), default=1.0) or 1.0
            for row, card in zip(ranked.rows, ranked.cards, strict=False):
                if row.significant:
                    label = next((each.label for each in card.shown if each.label), "") if row.size == 1 else ""
                    cells = (
                        card.title,
                        label,
                        query.name,
                        card.effect.removeprefix("Without it, ").rstrip("."),
                        f"{row.q_value:.2g}",
                    )
                    listed.append((row.q_value, -abs(row.influence) / scale, cells))
    if not listed:
        yield f"No single {what} has a significant influence on mean or spread. This does not show that none matters."
        return
    listed.sort(key=lambda each: each[:2])
    rows = [cells for _, _, cells in listed[:MOST_ROWS]]
    yield _table((what, "label", "query", f"without the {what}", "q"), rows)
    # of each difference, the sentence with the numbers
    yield "\n".join(f"- {sentence.partition('. ')[0]}." for sentence in found.said)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without the columns that are empty."""
    rows = list(rows)
    kept = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    lines = [[columns[n] for n in kept], ["---"] * len(kept), *([row[n] for n in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Escape what a name from a file could break the table with."""
    plain = " ".join(printable(text).split())
    return "".join(f"\\{c}" if c in "|\\`*_<>[]" and text != "---" and not _is_number(plain) else c for c in plain)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] == "\N{MINUS SIGN}"
