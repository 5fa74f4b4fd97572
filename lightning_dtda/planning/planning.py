"""What recording and attributing will take, before anything long is started."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import (
    EKFAC,
    Estimator,
    GaussNewton,
    Identity,
    InfluenceFunctions,
    TracIn,
    UnrolledDifferentiation,
    resolve_removals,
)
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT
from lightning_dtda.execution.device import usable_device
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.planning.first_steps import FirstSteps, record_first_steps
from lightning_dtda.planning.forecast import Cost, Forecast, advice
from lightning_dtda.planning.trials import TrialQuestion, cost_of, repeated
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.extent import checkpoint_interval
from lightning_dtda.replay import Measurement, query_examples, resolve_measurement, training_examples
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.prolonged import ProlongedRun

RUNS = 20
"""Runs that are planned for where there are none: as many as ``lightning-dtda record`` makes."""

_SECONDS = 5.0
"""Of a training that is begun to be timed."""


def plan(
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    *,
    queries: DataLoader[Any] | Dataset[Any],
    trainer: pl.Trainer | None = None,
    ensemble: Ensemble | None = None,
    estimators: Sequence[Estimator] | None = None,
    runs: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    examples: int | None = None,
    query_count: int | None = None,
    measurement: str | Measurement = "loss",
    removals: Any = LEAVE_ONE_OUT,
    recorder: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    workers: int = 1,
    hours: float | None = None,
    progress: bool = True,
) -> Forecast:
    """Say what disk, memory and time recording and attributing will take, and what to choose.

    With a Trainer, the first seconds of a training are trained and recorded into a temporary directory (that of
    ``TMPDIR``), ten steps at the least. With an ensemble nothing is trained. Then each estimator is asked for its plan
    of runs as many and as long as will be; those that look at checkpoints only are tried on a few examples and queries
    as well. Announced and measured costs are compared in ``docs/scale.md``.

    Args:
        module: The LightningModule, unchanged.
        data: What is trained on, as for :func:`~lightning_dtda.attribute`.
        queries: Inputs on which the measurement will be taken.
        trainer: A Trainer as for the training, which is used up.
        ensemble: Recorded runs, in its place.
        estimators: Which ones, the one that would be liked best first; exact unrolling, and influence functions with
            ever rougher curvatures, if not given.
        runs: S; those of the ensemble, or 20, if not given.
        steps: T; as the Trainer means to take, or as recorded, if not given.
        epochs: In place of steps.
        examples: N, if not those of the data; for as many epochs.
        query_count: Q, if not those that are given.
        measurement: As for :func:`~lightning_dtda.attribute`.
        removals: As for :func:`~lightning_dtda.attribute`.
        recorder: Arguments of the :class:`~lightning_dtda.TrajectoryRecorder`, for a training.
        device: Where to attribute; that of the training, or the module's, if not given.
        workers: Processes of this machine that will share the runs out.
        hours: The most that recording and attributing may take together.
        progress: Whether to show a progress bar.

    Returns:
        What it takes.

    Raises:
        AttributionError: If an argument makes no sense, or the question cannot be asked.
        RecordingError: If the training cannot be recorded.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
        >>> data = DiabetesData()
        >>> data.setup("fit")
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(max_epochs=2, accelerator="cpu", **quiet)
        >>> found = plan(
        ...     DiabetesRegressor(), data, queries=data.validation, trainer=trainer,
        ...     estimators=[InfluenceFunctions(Identity())], progress=False,
        ... )
        >>> found.runs, found.steps, found.examples, found.queries
        (20, 24, 353, 89)
    """
    counts = {"runs": runs, "steps": steps, "epochs": epochs, "examples": examples, "query_count": query_count}
    for name, value in (counts | {"workers": workers}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise AttributionError(f"{name}={value!r}; give a positive number.")
    if steps is not None and epochs is not None:
        raise AttributionError(f"steps={steps} and epochs={epochs} are both given. Leave one of them out.")
    if (trainer is None) == (ensemble is None):
        raise AttributionError(
            "Give either a trainer, with which a few steps are recorded, or an ensemble of recorded runs."
        )
    estimators = _all_estimators() if estimators is None else list(estimators)
    available = training_examples(data)
    length = len(available)
    with (
        tempfile.TemporaryDirectory(prefix="lightning-dtda-plan-") as directory,
        _quiet(),
        progress_bar("planning", "parts", 1 + len(estimators), progress) as advance,
    ):
        if trainer is not None:
            _set_length(trainer, steps, epochs)
            settings = {} if recorder is None else recorder
            first = record_first_steps(
                trainer, module, data, TrajectoryRecorder(directory, run="trial", **settings), _SECONDS
            )
            device = trainer.strategy.root_device if device is None else device
        else:
            assert ensemble is not None
            available.refuse_changes(ensemble[0])
            first = _as_recorded(ensemble, steps, epochs)
        advance(1)
        if examples is not None and steps is None:  # as many epochs
            first = first.of_length(max(1, round(first.steps * examples / length)))
        asked = query_examples(queries, available)
        question = TrialQuestion(
            module=module,
            examples=repeated(available, examples or length),
            queries=repeated(asked, query_count or len(asked)),
            measurement=resolve_measurement(measurement)[1],
            device=usable_device(module.device if device is None else device),
            removals=replace(resolve_removals(removals, available), examples=examples or length),
        )
        number = runs or (RUNS if ensemble is None else len(ensemble))
        alike = [first.prolonged(len(question.examples))] * number
        costs: dict[str, Cost | str] = {}
        for estimator in estimators:
            costs[_unused(label(estimator), costs)] = _cost(estimator, alike, question, workers)
            advance(1)
        found = Forecast(
            runs=number,
            steps=first.steps,
            parameters=first.run.layout.size,
            examples=len(question.examples),
            queries=len(question.queries),
            removals=len(question.removals),
            device=str(question.device),
            workers=min(workers, number),
            recorded_steps=first.run.steps,
            recorded_examples=length,
            given_queries=len(asked),
            recording=_shared(first.recording.times(number), workers, number),
            estimators=costs,
        )
        return replace(found, advice=advice(found, question.device, hours))


def label(estimator: Estimator) -> str:
    """Return what an estimator is called in a table.

    Example:
        >>> label(UnrolledDifferentiation()), label(InfluenceFunctions(EKFAC()))
        ('UnrolledDifferentiation', 'InfluenceFunctions(EKFAC)')
    """
    curvature = getattr(estimator, "curvature", None)
    return type(estimator).__name__ + ("" if curvature is None else f"({type(curvature).__name__})")


def _all_estimators() -> list[Estimator]:
    """Return estimators in the order in which their predictions agree with retraining, see the README's figures."""
    return [
        UnrolledDifferentiation(),
        InfluenceFunctions(GaussNewton()),
        InfluenceFunctions(EKFAC()),
        InfluenceFunctions(Identity()),
        TracIn(),
    ]


def _unused(name: str, names: Container[str]) -> str:
    """Return a name that there is not yet."""
    others = (f"{name} {number}" for number in count(2))
    return next(one for one in chain([name], others) if one not in names)


def _cost(estimator: Estimator, runs: Sequence[ProlongedRun], question: TrialQuestion, workers: int) -> Cost | str:
    try:
        return _shared(cost_of(estimator, runs, question), workers, len(runs))
    except AttributionError as error:
        return str(error)


def _shared(cost: Cost, workers: int, runs: int) -> Cost:
    """Return what each of some processes takes at the same time."""
    workers = min(workers, runs)
    return replace(cost, seconds=None if cost.seconds is None else cost.seconds / workers, memory=workers * cost.memory)


def _set_length(trainer: pl.Trainer, steps: int | None, epochs: int | None) -> None:
    """Let a Trainer mean to take other steps, before anything asks it."""
    if steps is not None:
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit_loop.max_epochs = -1
    if epochs is not None:
        trainer.fit_loop.epoch_loop.max_steps = -1
        trainer.fit_loop.max_epochs = epochs


def _as_recorded(ensemble: Ensemble, steps: int | None, epochs: int | None) -> FirstSteps:
    """Return what a run of an ensemble takes if it goes on as it was recorded; how long, its record does not say."""
    run = ensemble[0]
    if epochs is not None:
        recorded = run.micro_batches(run.steps - 1)[-1].epoch + 1
        steps = max(1, round(run.steps * epochs / recorded))
    steps = run.steps if steps is None else steps
    disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    gap = run.checkpoint_steps[1] - run.checkpoint_steps[0]
    is_root = gap == checkpoint_interval("sqrt", run.manifest.planned_steps)
    recording = Cost(None, 0.0, disk * steps / run.steps)
    return FirstSteps(run, steps, checkpoint_interval("sqrt", steps) if is_root else gap, recording)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what trainings and estimators say: of trials it would be said many times."""
    log = logging.getLogger("lightning_dtda")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with quiet_lightning():
            yield
    finally:
        log.setLevel(level)
