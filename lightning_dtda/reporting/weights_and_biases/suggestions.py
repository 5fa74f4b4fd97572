"""A suggestion, and what retraining says about it, as a run of Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.suggesting import Suggestion
from lightning_dtda.evaluation.verification import Verification
from lightning_dtda.reporting.weights_and_biases.summary_run import artifact, known, summary_run, use


def log_suggestion_to_wandb(
    suggestion: Suggestion,
    attribution: Attribution,
    *,
    verification: Verification | None = None,
    truth: str | Path | None = None,
    **settings: Any,
) -> str:
    """Log suggested removals: one step for each number of removals, with its predicted effect and interval.

    Effects are changes of the suggestion's quantity if the examples are removed; for a standard deviation, relative to
    what it was.

    Args:
        suggestion: The suggestion.
        attribution: The attribution that it was made from; if it was loaded, its directory is the run's input.
        verification: What retraining says about it.
        truth: Directory of the ground truth behind the verification, for the lineage.
        **settings: Arguments of ``wandb.init``, as for :func:`~lightning_dtda.reporting.log_to_wandb`.

    Returns:
        The id of the run.
    """
    ensemble = attribution.about.get("ensemble")
    inputs = [
        artifact(kind, ensemble, path, {})
        for kind, path in {"attribution": attribution.path, "truth": truth}.items()
        if path is not None
    ]
    summary: dict[str, Any] = {
        "verdict": suggestion.verdict,
        "removals": suggestion.best,
        "examples_removed": len(suggestion.removed),
        "quantity_as_trained": suggestion.before,
    }
    if suggestion.best:
        summary |= _figures("predicted", *_step(suggestion, suggestion.best - 1))
    if verification is not None:
        summary |= _figures("retrained", verification.effect, verification.low, verification.high)
    config = {
        "goal": suggestion.goal,
        "quantity": suggestion.quantity,
        "measurement": attribution.measurement,
        "ensemble": ensemble,
        "queries": len(suggestion.queries),
        "runs_that_chose": len(suggestion.chosen_on),
        "runs_that_evaluated": len(suggestion.evaluated_on),
        "level": suggestion.level,
    }
    name = f"{suggestion.goal.replace('_', ' ')}: {attribution.measurement}"
    tags = [suggestion.goal, attribution.measurement]
    table = suggestion.to_dataframe()
    table["removal"] = table["removal"].map(str)  # an index or a name
    with summary_run("suggestion", name, config, tags, suggestion.verdict, settings) as run:
        for made in inputs:
            use(run, made)
        for step, together in enumerate(suggestion.sets):
            figures = _figures("predicted", *_step(suggestion, step))
            figures["examples"] = len(together)
            run.log({f"removals/{key}": figure for key, figure in figures.items()})
        run.log({"suggested_removals": wandb.Table(dataframe=table)})
        run.summary.update(summary)
    return str(run.id)


def _step(suggestion: Suggestion, step: int) -> tuple[float, float, float]:
    return float(suggestion.effects[step]), *suggestion.intervals[:, step].tolist()


def _figures(name: str, effect: float, low: float, high: float) -> dict[str, float | None]:
    return {f"{name}_effect": known(effect), f"{name}_low": known(low), f"{name}_high": known(high)}
