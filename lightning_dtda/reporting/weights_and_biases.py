"""One Weights & Biases run that summarizes an attribution."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.facts import (
    about_in_brief,
    largest_drift,
    most_interesting,
    predicted_out_of_range,
    without_repeated_warnings,
    worst_diagnosis,
)
from lightning_dtda.reporting.figures import influence_figure
from lightning_dtda.reporting.rows import significance_on, top_examples
from lightning_dtda.reporting.verdicts import verdict_on_all
from lightning_dtda.statistics.differences import Difference, resolve_difference

MOST_QUERIES = 20
"""Maximum number of queries with a figure and histograms: the number of panels that a W&B page shows at once."""

MOST_ROWS = 10_000
"""Maximum number of rows in the table of top examples: W&B shows no more."""

_BINS = 32
_NUMBERS = (
    "influence",
    "standard_error",
    "interval_low",
    "interval_high",
    "p_value",
    "significant",
    "retrainings_low",
    "retrainings_high",
    "mean_influence",
    "spread_influence",
    "out_of_range",
)


def log_to_wandb(
    attribution: Attribution,
    directory: str | Path,
    *,
    project: str | None = None,
    group: str | None = None,
    k: int = 10,
    differences: Sequence[str | Difference] | None = None,
) -> str:
    """Log an attribution as one summary run of Weights & Biases.

    The run has the configuration of the attribution, a table of the top examples or groups, and the attribution's
    directory as an artifact. For each of up to :data:`MOST_QUERIES` queries it has a figure of mean against spread
    influence, and histograms of the measurement as trained and without the example or group that changes it most. The
    notes say how many influences on these queries are significant, and what to know before trusting them, such as the
    runs that are left out. The summary has the median number of significant examples or groups over these queries. It
    is a separate run: an active run is not affected.

    Args:
        attribution: The attribution.
        directory: Directory where the attribution is saved.
        project: Name of the project. Defaults to ``WANDB_PROJECT``, or ``lightning-dtda``.
        group: Group of the run. Defaults to the name of the ensemble.
        k: Number of examples, or groups, for each query and difference.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`. ``None`` means
            mean, spread and Wasserstein. The last of them selects the example of the histograms.

    Returns:
        The id of the run.

    Raises:
        AttributionError: If the directory does not exist, ``k`` is less than one, a difference is unknown, or it needs
            more runs.
    """
    import wandb  # takes a second, which report and terminal should not pay

    directory = Path(directory)
    facts, cautions = _facts(attribution), wording.cautions(attribution)
    attribution = attribution.trusted()
    queries = most_interesting(attribution, MOST_QUERIES)
    chosen = [resolve_difference(each) for each in differences or attribution.available_differences]
    tests = [[significance_on(attribution, query, difference) for query in queries] for difference in chosen]
    for difference, of_queries in zip(chosen, tests, strict=True):
        facts[f"significant/{difference.name}"] = statistics.median(each.discoveries for each in of_queries)
    if not directory.is_dir():
        raise AttributionError(f"The directory {directory} does not exist. Save the attribution there first.")
    with without_repeated_warnings():
        table = wandb.Table(columns=[*_columns(attribution)], data=list(_rows(attribution, chosen, k)))
        panels = dict(_panels(attribution, queries, chosen[-1]))
    artifact = wandb.Artifact(_artifact_name(attribution), type="attribution", metadata=facts)
    artifact.add_dir(str(directory))
    with wandb.init(
        project=project or os.environ.get("WANDB_PROJECT") or "lightning-dtda",
        group=group or attribution.about.get("ensemble"),
        job_type="attribution",
        config=about_in_brief(attribution),
        notes="\n".join(
            [*(verdict_on_all(attribution, [each.outcome for each in of_queries]) for of_queries in tests), *cautions]
        ),
        reinit="create_new",
    ) as run:
        run.log({"top_examples": table, **panels})
        run.summary.update(facts)
        run.log_artifact(artifact)
    return str(run.id)


def _columns(attribution: Attribution) -> list[str]:
    removed = ["example"] if attribution.removals is None else ["removal", "size"]
    return ["query", "difference", "rank", *removed, *_NUMBERS]


def _rows(attribution: Attribution, differences: Sequence[Difference], k: int) -> Iterator[list[Any]]:
    rows_of_a_query = max(k * len(differences), 1)
    for query in most_interesting(attribution, max(MOST_ROWS // rows_of_a_query, 1)):
        for difference in differences:
            for row in top_examples(attribution, query, difference, k):
                fields = {"query": attribution.queries[query], "difference": difference.name, **vars(row)}
                fields |= {"example": row.position, "removal": row.name}
                for end in ("retrainings_low", "retrainings_high"):
                    if not math.isfinite(fields[end]):
                        fields[end] = None  # JSON has no infinity
                yield [fields[column] for column in _columns(attribution)]


def _panels(attribution: Attribution, queries: list[int], difference: Difference) -> Iterator[tuple[str, Any]]:
    """Yield each query's figure and histograms; the histograms of a query share their bins."""
    import wandb

    for query in queries:
        name = f"query {attribution.queries[query]}"
        yield f"influence/{name}", wandb.Plotly(influence_figure(attribution, query))
        [largest] = top_examples(attribution, query, difference, 1)
        selected = attribution.select([query])
        trained = selected.baseline[:, 0].cpu().numpy()
        predicted = selected.predict([largest.position])[:, 0].cpu().numpy()
        bins = np.histogram_bin_edges(np.concatenate([trained, predicted]), _BINS)
        yield f"distribution/{name}, as trained", wandb.Histogram(np_histogram=np.histogram(trained, bins))
        yield (
            f"distribution/{name}, without {wording.noun(attribution)} {largest.name}",
            wandb.Histogram(np_histogram=np.histogram(predicted, bins)),
        )


def _facts(attribution: Attribution) -> dict[str, Any]:
    runs, queries, removals = attribution.responses.shape
    facts: dict[str, Any] = {"runs": runs, "queries": queries, f"{wording.noun(attribution)}s": removals}
    facts["chaotic_runs"] = len(attribution.chaotic)
    facts["queries_predicted_out_of_range"] = predicted_out_of_range(attribution)[0]
    with without_repeated_warnings(), suppress(AttributionError):  # too few runs
        facts["reliability"] = float(attribution.reliability("mean").median())
    worst = {f"largest_drift/{part}": largest_drift(attribution, part) for part in ("parameters", "gradients")}
    for part in ("finite_differences", "precision"):
        worst[f"largest_error/{part}"] = worst_diagnosis(attribution, part)
    return facts | {name: figure for name, figure in worst.items() if figure is not None}


def _artifact_name(attribution: Attribution) -> str:
    # the characters that W&B allows
    return re.sub(r"[^\w.-]+", "-", f"attribution-{attribution.about.get('ensemble', 'ensemble')}", flags=re.ASCII)
