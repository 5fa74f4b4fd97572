"""An attribution as a run of Weights & Biases."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting import wording
from lightning_dtda.reporting.facts import (
    largest_drift,
    predicted_out_of_range,
    without_repeated_warnings,
    worst_diagnosis,
)
from lightning_dtda.reporting.findings import Findings, find
from lightning_dtda.reporting.report import report
from lightning_dtda.reporting.weights_and_biases.queries import MOST_ROWS, charts, panels, top_table
from lightning_dtda.reporting.weights_and_biases.seeds import seed_table, spreads
from lightning_dtda.reporting.weights_and_biases.summary_run import artifact, leaves, recording, summary_run, use
from lightning_dtda.statistics.differences import Difference
from lightning_dtda.trajectory import Ensemble

MOST_QUERIES = 20
"""Maximum number of queries that the slider of a panel goes through."""


def log_to_wandb(
    found: Attribution | Findings,
    directory: str | Path | None = None,
    *,
    ensemble: Ensemble | None = None,
    k: int = 10,
    differences: Sequence[str | Difference] | None = None,
    **settings: Any,
) -> str:
    """Log an attribution as one summary run of Weights & Biases, beside the active run, if any.

    The run is named after the question. It has

    - notes and a summary: what was found, and what to know before trusting it;
    - one step for each of up to :data:`MOST_QUERIES` queries, the most affected last: numbers, pictures of the query
      and of its top examples, distributions as trained and without the top example, mean against spread influence;
    - charts for the most affected query, and a table of the top examples, or groups, of all queries, with pictures;
    - the report, as a page;
    - the recorded runs as its input and the attribution's directory as its output.

    No key holds an index, so that the panels of two attributions line up.

    Args:
        found: An attribution, or what :func:`~lightning_dtda.reporting.find` found in it.
        directory: Directory where the attribution is saved. Defaults to the one that it was loaded from.
        ensemble: The recorded runs: their logged metrics, with mean and standard deviation over seeds, and the lineage.
        k: Number of examples, or groups, for each query and difference, for an attribution.
        differences: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`, for an attribution.
            ``None`` means mean, spread and Wasserstein. The last of them selects the example that the distributions are
            shown without.
        **settings: Arguments of ``wandb.init``, such as ``project``, ``entity`` or ``group``. Defaults are W&B's
            environment variables, then the project ``lightning-dtda`` and the name of the ensemble as the group.

    Returns:
        The id of the run.

    Raises:
        AttributionError: If the directory does not exist, ``k`` is less than one, a difference is unknown, or it needs
            more runs.
    """
    attribution = found if isinstance(found, Attribution) else found.attribution
    path = attribution.path if directory is None else directory
    if path is None:
        raise AttributionError("The attribution is in no directory. Save it, and give the directory.")
    if isinstance(found, Attribution):
        found = find(found, k, differences)
    attribution = found.attribution
    trusted = attribution.trusted()
    queries = [found.queries[position] for position in found.most_interesting]
    facts = {"verdict": found.verdict.sentence, "usable": found.verdict.level} | dict(_facts(found))
    config = dict(_config(attribution))
    saved = artifact("attribution", attribution.about.get("ensemble"), path, facts)
    tags = [attribution.measurement, config["estimator"], f"{wording.noun(attribution)}s"]
    name = _name(attribution, config["estimator"])
    with (
        summary_run("attribution", name, config, tags, _notes(found), settings) as run,
        tempfile.TemporaryDirectory() as temporary,
        without_repeated_warnings(),
    ):
        if ensemble is not None:
            use(run, recording(ensemble))
            run.log({"seeds": seed_table(ensemble)}, commit=False)
            facts |= spreads(ensemble)
        shown = queries[:MOST_QUERIES]
        for query in reversed(shown):  # a panel with a slider first shows the last step
            run.log(panels(trusted, query))
        in_table = queries[: max(MOST_ROWS // sum(len(ranked.rows) for ranked in queries[0].ranked), 1)]
        names = [ranked.difference for ranked in queries[0].ranked]
        page = report(attribution, Path(temporary) / "report.html", len(queries[0].ranked[0].rows), names)
        run.log(
            {
                **charts(trusted, queries[0]),
                "top_examples": top_table(trusted, in_table, {query.position for query in shown}),
                "report": wandb.Html(str(page), inject=False),
            }
        )
        run.summary.update(facts)
        run.log_artifact(saved)
    return str(run.id)


def _notes(found: Findings) -> str:
    """Return what was found and what to do now, the verdict first."""
    steps = [
        f"- {step.title}. {step.cost}\n\n" + "\n".join(f"      {command}" for command in step.commands)
        for step in found.next_steps
    ]
    parts = [
        f"{found.verdict.sign} {found.verdict.sentence}",
        found.question,
        *(f"Caution: {caution}" for caution in found.cautions),
        *(["What to do now:", *steps] if steps else []),
        *found.said,
        found.answer,
    ]
    return "\n\n".join(parts)


def _name(attribution: Attribution, estimator: str) -> str:
    """Return the question in a few words."""
    removals, members, ensemble = attribution.responses.shape[2], attribution.members, attribution.about.get("ensemble")
    what = f"one of {removals} {wording.noun(attribution)}s"
    if members is not None and removals == 1:
        what = f"a group of {wording.counted(len(members[0]), 'example')}"
    return f"{f'{ensemble}: ' if ensemble else ''}{attribution.measurement} without {what} ({estimator})"


def _config(attribution: Attribution) -> Iterator[tuple[str, Any]]:
    """Yield what was asked and how it was answered, the most important first."""
    about = attribution.about
    runs, queries, removals = attribution.responses.shape
    estimator, trained = about.get("estimator"), about.get("configuration") or {}
    settings = dict(estimator) if isinstance(estimator, dict) else {"class": estimator or "unnamed estimator"}
    yield "question", wording.question(attribution)
    yield "measurement", attribution.measurement
    yield "estimator", str(settings.pop("class", "estimator")).rpartition(".")[2]
    yield "scale", attribution.scale
    yield "step", attribution.step
    yield "removal", about.get("removal")
    yield "ensemble", about.get("ensemble")
    yield from {"runs": runs, "queries": queries, f"{wording.noun(attribution)}s": removals}.items()
    yield from leaves("estimator", settings)
    yield "module", (trained.get("module") or {}).get("class")
    yield from leaves("optimizer", trained.get("hyperparameters") or {})
    yield from leaves("training", trained.get("training") or {})
    yield "version", about.get("version")
    yield from leaves("module", (trained.get("module") or {}).get("hyperparameters") or {})


def _facts(found: Findings) -> Iterator[tuple[str, Any]]:
    """Yield the figures by which attributions are compared in W&B's table."""
    attribution = found.attribution
    if found.cautions:
        yield "cautions", " ".join(found.cautions)
    for number, ranked in enumerate(found.queries[0].ranked):
        discoveries = [query.ranked[number].outcome.discoveries for query in found.queries]
        yield f"significant/{ranked.difference.name}", statistics.median(discoveries)
    if not math.isnan(found.agreement):
        yield "agreement", found.agreement
    yield "chaotic_runs", len(attribution.chaotic)
    yield "queries_predicted_out_of_range", predicted_out_of_range(attribution)[0]
    figures = {f"largest_drift/{part}": largest_drift(attribution, part) for part in ("parameters", "gradients")}
    for part in ("finite_differences", "precision"):
        figures[f"largest_error/{part}"] = worst_diagnosis(attribution, part)
    yield from ((name, figure) for name, figure in figures.items() if figure is not None)
