"""Forecasts of the cost of recording and attributing, before anything long is started."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from lightning_dtda.estimators.estimator import labels
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
"""Default number of runs if there is no ensemble, as in ``lightning-dtda record``."""

_SECONDS = 5.0
"""Duration of the trial training in seconds."""


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
    """Forecast the disk space, memory and time that recording and attributing will take, and advise what to choose.

    With a Trainer, the first seconds of a training (at least ten steps) are run and recorded into a temporary directory
    (in ``TMPDIR``). With an ensemble, nothing is trained. Then each estimator plans its work for the full number of
    runs and steps; estimators that only use checkpoints are also tried on a few examples and queries.
    ``docs/costs.md`` compares forecasts with actual costs.

    Args:
        module: The LightningModule, unchanged.
        data: Training data, as for :func:`~lightning_dtda.attribute`.
        queries: Inputs on which the measurement will be taken.
        trainer: Trainer with the settings of the training; it is used up. Give either this or ``ensemble``.
        ensemble: Recorded runs.
        estimators: Estimators to plan for, in order of preference; by default unrolling, then influence functions
            with increasingly rough curvatures and TracIn.
        runs: S, the number of runs; by default those of the ensemble, or 20.
        steps: T, the number of steps; by default as set in the Trainer, or as recorded.
        epochs: Number of epochs, instead of ``steps``.
        examples: N, the number of training examples; by default those of the data. Unless ``steps`` is given, the
            number of epochs stays the same.
        query_count: Q, the number of queries; by default the given ones.
        measurement: Measurement as for :func:`~lightning_dtda.attribute`.
        removals: Removals as for :func:`~lightning_dtda.attribute`.
        recorder: Arguments of the :class:`~lightning_dtda.TrajectoryRecorder`, if a Trainer is given.
        device: Device for attributing; by default that of the training, or that of the module.
        workers: Number of processes on this machine that the runs will be distributed over.
        hours: Maximum hours that recording and attributing may take together.
        progress: Whether to show a progress bar.

    Returns:
        Forecast of the costs.

    Raises:
        AttributionError: If an argument is invalid, or the question cannot be answered.
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
    _check_counts(runs=runs, steps=steps, epochs=epochs, examples=examples, query_count=query_count, workers=workers)
    if (trainer is None) == (ensemble is None):
        raise AttributionError(
            "Pass either a trainer, to record the first steps with, or an ensemble of recorded runs, but not both."
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
            tried = TrajectoryRecorder(directory, run="trial", **({} if recorder is None else recorder))
            first = record_first_steps(trainer, module, data, tried, _SECONDS)
            device = trainer.strategy.root_device if device is None else device
        else:
            assert ensemble is not None
            available.refuse_changes(ensemble[0])
            first = _as_recorded(ensemble, steps, epochs)
        advance(1)
        if examples is not None and steps is None:  # keep the number of epochs
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
        costs = _costs(estimators, alike, question, workers, advance)
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


def _all_estimators() -> list[Estimator]:
    """Return the estimators in order of their agreement with retraining, best first; see docs/estimators.md."""
    return [
        UnrolledDifferentiation(),
        InfluenceFunctions(GaussNewton()),
        InfluenceFunctions(EKFAC()),
        InfluenceFunctions(Identity()),
        TracIn(),
    ]


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise AttributionError(f"{name}={value!r} must be a positive integer.")
    if counts["steps"] is not None and counts["epochs"] is not None:
        raise AttributionError(
            f"steps={counts['steps']} and epochs={counts['epochs']} are both given. Leave one of them out."
        )


def _costs(
    estimators: Sequence[Estimator],
    runs: Sequence[ProlongedRun],
    question: TrialQuestion,
    workers: int,
    advance: Callable[[float], None],
) -> dict[str, Cost | str]:
    """Return the cost of each estimator by its label, or why it cannot answer."""
    costs: dict[str, Cost | str] = {}
    for name, estimator in zip(labels(estimators), estimators, strict=True):
        costs[name] = _cost(estimator, runs, question, workers)
        advance(1)
    return costs


def _cost(estimator: Estimator, runs: Sequence[ProlongedRun], question: TrialQuestion, workers: int) -> Cost | str:
    try:
        return _shared(cost_of(estimator, runs, question), workers, len(runs))
    except AttributionError as error:
        return str(error)


def _shared(cost: Cost, workers: int, runs: int) -> Cost:
    """Return the cost if the runs are distributed over processes that run at the same time."""
    workers = min(workers, runs)
    return replace(cost, seconds=None if cost.seconds is None else cost.seconds / workers, memory=workers * cost.memory)


def _set_length(trainer: pl.Trainer, steps: int | None, epochs: int | None) -> None:
    """Change the length of the training before the Trainer uses it."""
    if steps is not None:
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit_loop.max_epochs = -1
    if epochs is not None:
        trainer.fit_loop.epoch_loop.max_steps = -1
        trainer.fit_loop.max_epochs = epochs


def _as_recorded(ensemble: Ensemble, steps: int | None, epochs: int | None) -> FirstSteps:
    """Return the cost of a run that is recorded in the same way as the ensemble; its duration is not recorded."""
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
    """Silence the messages of trainings and estimators, which the trials would repeat many times."""
    log = logging.getLogger("lightning_dtda")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with quiet_lightning():
            yield
    finally:
        log.setLevel(level)
