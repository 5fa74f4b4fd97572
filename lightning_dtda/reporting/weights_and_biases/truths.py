"""A ground truth as a run of Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from lightning_dtda.errors import DTDAError
from lightning_dtda.reporting.weights_and_biases.summary_run import artifact, known, recording, summary_run, use
from lightning_dtda.reporting.wording import counted
from lightning_dtda.retraining.ground_truth import GroundTruth
from lightning_dtda.statistics.differences import DIFFERENCES
from lightning_dtda.trajectory import Ensemble

_SHOWN = ("mean", "spread", "wasserstein")
_MOST_EXAMPLES = 20
"""Maximum number of examples that a cell lists."""


def log_truth_to_wandb(
    truth: GroundTruth, directory: str | Path, *, ensemble: Ensemble | None = None, **settings: Any
) -> str:
    """Log what retraining without subsets of the examples did to the measurement.

    The run has a step and a row for each subset with the change of mean, spread and Wasserstein distance, a mean over
    queries; the spread of the measurement over seeds; and the ground truth's directory as its output.

    Args:
        truth: The ground truth.
        directory: Directory where it is stored.
        ensemble: The recorded runs that were repeated or whose configuration was trained, as the run's input.
        **settings: Arguments of ``wandb.init``, as for :func:`~lightning_dtda.reporting.log_to_wandb`.

    Returns:
        The id of the run.

    Raises:
        AttributionError: If the directory does not exist.
    """
    subsets, seeds, queries = truth.measurements.shape
    changes = dict(_changes(truth))
    name = f"{truth.measurement} retrained without {counted(subsets, 'subset')} ({truth.removal})"
    notes = (
        f"What does {counted(seeds, 'training')} without each of {counted(subsets, 'subset')} of the examples change "
        f"(mean over {counted(queries, 'query', 'queries')})? {counted(len(truth.unfinished), 'training')} missing."
    )
    config = {
        "measurement": truth.measurement,
        "removal": truth.removal,
        "ensemble": None if ensemble is None else ensemble.root.name,
        "subsets": subsets,
        "seeds": seeds,
        "baseline_seeds": len(truth.baseline_seeds),
        "queries": queries,
        "engine": truth.about.get("engine"),
        "module": (truth.about.get("module") or {}).get("class"),
    }
    saved = artifact("truth", config["ensemble"], directory, {"subsets": subsets, "seeds": seeds})
    table = wandb.Table(["subset", "size", "examples", *changes])
    with summary_run("retraining", name, config, [truth.measurement, truth.removal], notes, settings) as run:
        if ensemble is not None:
            use(run, recording(ensemble))
        for number, removed in enumerate(truth.removed):
            figures = {name: known(change[number]) for name, change in changes.items()}
            listed = ", ".join(map(str, removed[:_MOST_EXAMPLES])) + (", ..." if len(removed) > _MOST_EXAMPLES else "")
            table.add_data(number, len(removed), listed, *figures.values())
            run.log({"subsets/size": len(removed)} | {f"subsets/{name}": figure for name, figure in figures.items()})
        run.log({"subsets_without": table})
        run.summary.update({"unfinished": len(truth.unfinished), **dict(_spread(truth))})
        run.log_artifact(saved)
    return str(run.id)


def _changes(truth: GroundTruth) -> Iterator[tuple[str, list[float]]]:
    """Yield the change of each property by each subset, a mean over queries, as far as it is known."""
    for name in _SHOWN:
        with suppress(DTDAError):  # trainings are missing, or too few
            difference = DIFFERENCES[name]
            of_subsets = truth.influence(difference).mean(0).tolist()
            yield f"{name}_in_percent" if difference.relative else name, [*map(difference.shown, of_subsets)]


def _spread(truth: GroundTruth) -> Iterator[tuple[str, float]]:
    """Yield mean and standard deviation over seeds of the measurement as trained, a mean over queries."""
    finished = truth.baseline[~truth.baseline.isnan().any(1)].double()
    yield f"seeds/{truth.measurement}/n", len(finished)
    if len(finished):
        yield f"seeds/{truth.measurement}/mean", float(finished.mean())
    if len(finished) > 1:
        yield f"seeds/{truth.measurement}/standard_deviation", float(finished.std(0).mean())
