"""Ground truth: models are trained again without examples, and measured."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.errors import RetrainingError
from lightning_dtda.execution import Workers, workers_of
from lightning_dtda.execution.device import usable_device
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.recording.configuration import versions
from lightning_dtda.replay import (
    Draws,
    Examples,
    Measurement,
    dataset_fingerprint,
    query_examples,
    query_names,
    resolve_measurement,
    training_examples,
)
from lightning_dtda.retraining.auto_engine import AutoEngine
from lightning_dtda.retraining.engine import Engine, Retraining
from lightning_dtda.retraining.fresh_seeds import fresh_seeds, recorded_seeds
from lightning_dtda.retraining.ground_truth import GroundTruth, some_tasks
from lightning_dtda.retraining.recipe import Recipe, describe_data
from lightning_dtda.retraining.reweighting import Reweighting
from lightning_dtda.retraining.stacked_engine import StackedEngine
from lightning_dtda.retraining.subsets import check_subsets
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import TrainerEngine
from lightning_dtda.retraining.truth_store import TruthStore, gather
from lightning_dtda.stacking.choice import Stacked, check_stacked
from lightning_dtda.trajectory import Ensemble

_log = logging.getLogger(__name__)

Removal = Literal["drop", "reweight"]

_REASONS = 3
"""Reasons for failures that a warning gives; the truth and its store have all."""


def retrain(
    module: pl.LightningModule | Callable[[], pl.LightningModule],
    data: pl.LightningDataModule | pl.LightningModule | DataLoader[Any] | Dataset[Any] | None = None,
    *,
    subsets: Sequence[Sequence[int]],
    seeds: int | Sequence[int],
    queries: DataLoader[Any] | Dataset[Any],
    measurement: str | Measurement = "loss",
    removal: Removal = "drop",
    baseline_seeds: int | Sequence[int] | None = None,
    measurement_draws: int = Draws.number,
    measurement_seed: int = Draws.seed,
    trainer: Callable[[], pl.Trainer] | None = None,
    ensemble: Ensemble | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    workers: int | Workers = 1,
    stacked: Stacked = "auto",
    compile: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> GroundTruth:
    r"""Train models without subsets of the training examples, over many seeds, and measure them.

    .. math:: y_{k,s,q} = m_q(\theta_T^{(s)} \text{ trained without } S_k), \qquad
        x_{s,q} = m_q(\theta_T^{(s)} \text{ trained on everything})

    What attribution predicts, by doing it (arXiv 2506.12965, section 5).

    Args:
        module: What is trained: a function that makes it, called after the seed is set; or a LightningModule that can
            be made again from the hyperparameters it saved. Its own weights do not count.
        data: What is trained on: a data module or a DataLoader; ``None``, or a module, for modules with a
            ``train_dataloader`` of their own. For ``"reweight"`` a Dataset will do.
        subsets: Sets of indices of training examples, K of them; see :mod:`lightning_dtda.retraining.subsets`.
        seeds: S of them: a number, which takes fresh ones; or a list.
        queries: Inputs on which the measurement is taken, Q of them, as for :func:`~lightning_dtda.attribute`.
        measurement: As for :func:`~lightning_dtda.attribute`.
        removal: ``"drop"``: the examples are gone, and each seed is a new training on a smaller data set.
            ``"reweight"``: the recorded runs of ``ensemble`` over again, in their own order, the examples' weights zero
            and the loss's divisor kept.
        baseline_seeds: For the trainings on everything; ``None`` takes those of ``seeds``. With the same seeds models
            start from the same parameters, which takes some noise out of differences of means.
        measurement_draws: As for :func:`~lightning_dtda.attribute`.
        measurement_seed: As for :func:`~lightning_dtda.attribute`.
        trainer: A function that makes a Trainer; not needed for ``"reweight"``.
        ensemble: Recorded runs: those that are replayed by ``"reweight"``, else those whose seeds are not to be used
            again.
        output: A directory. Every finished training is stored there at once; the same call goes on where one was
            broken off, more subsets or seeds are added, and several processes may work on it at the same time.
        overwrite: Whether the answer to another question in ``output`` is replaced.
        workers: Where the Trainer trains: a number of processes of this machine, or a
            :class:`~lightning_dtda.execution.RayCluster`. A worker that is lost takes its own trainings along, no
            others.
        stacked: Whether many trainings are done at once on one device, after the Trainer has shown that they come out
            the same; false leaves all to the Trainer. ``"auto"`` stacks where that can be.
        compile: Whether ``torch.compile`` is used for stacks, which takes about half a minute; ``None`` compiles where
            there is enough to do.
        device: Where stacked trainings are done; ``None`` is the module's own device. The Trainer has its own.
        progress: Whether to show a progress bar.

    Returns:
        Measurements ``(K, S, Q)`` and baseline ``(baseline seeds, Q)``. Trainings that failed are NaN, with a warning;
        ``about["failures"]`` has the reasons.

    Raises:
        RetrainingError: If the question cannot be answered, or all trainings failed.
        CannotStackError: If the trainings were to be stacked and cannot be.
        ExecutionError: If there are no such workers or device, or trainings cannot be sent to them.
        AttributionError: If queries or measurement are none.
        ReplayError: If recorded runs are not those of module and data.
    """
    if removal not in get_args(Removal):
        raise RetrainingError(f"removal={removal!r}; choose from {', '.join(get_args(Removal))}.")
    name, function = resolve_measurement(measurement)
    if output is not None and "<" in name:
        raise RetrainingError(
            f"The measurement {name} has no name of its own, so that its stored answers could be confused with those "
            "to another. Define it as a function of a module, or give no output."
        )
    draws = Draws(measurement_draws, measurement_seed)
    workers = workers_of(workers)
    check_stacked(stacked, workers)
    trained = (
        _reweighted(module, data, ensemble, seeds, baseline_seeds)
        if removal == "reweight"
        else _dropped(module, data, trainer, ensemble, seeds, baseline_seeds, _engine(workers, stacked, compile))
    )
    query_set = query_examples(queries, trained.examples)
    about: dict[str, Any] = {
        "removal": removal,
        "measurement": name,
        "draws": asdict(draws),
        "queries_fingerprint": dataset_fingerprint(query_set.dataset),
        "versions": versions(),
        **trained.about,
    }
    removed = check_subsets(subsets, about["data"]["length"])
    names = query_names(query_set)
    store = None
    if output is not None:
        store = TruthStore.create(output, about, names, removed, trained.seeds, trained.baseline_seeds, overwrite)
    positions = list(range(len(removed))) if store is None else store.positions(removed)
    tasks = [Task(None, seed) for seed in trained.baseline_seeds]
    # all subsets with a seed before the next seed: what is broken off has some of each
    tasks += [Task(position, seed) for seed in trained.seeds for position in positions]
    retraining = Retraining(
        recipe=trained.recipe,
        removed=removed if store is None else store.removed,
        data=about["data"],
        queries=query_set,
        measurement=function,
        device=None if device is None else usable_device(device),
        draws=draws,
    )
    finished, failures = _train(trained.engine, retraining, tasks, store, progress)
    measurements, baseline = gather(finished, positions, trained.seeds, trained.baseline_seeds, len(names))
    about |= {
        "engine": trained.engine.name,
        "failures": [
            {"subset": None if task.subset is None else positions.index(task.subset), "seed": task.seed, "reason": why}
            for task, why in failures.items()
        ],
    }
    if store is not None:
        about["engine"] = store.about["engine"]
    return GroundTruth(measurements, baseline, removed, names, trained.seeds, trained.baseline_seeds, about)


@dataclass(frozen=True)
class _Trained:
    """What kind of trainings there are."""

    engine: Engine
    recipe: Recipe | None
    examples: Examples
    seeds: tuple[int, ...]
    baseline_seeds: tuple[int, ...]
    about: dict[str, Any]


def _dropped(
    module: Any,
    data: Any,
    trainer: Any,
    ensemble: Ensemble | None,
    seeds: int | Sequence[int],
    baseline_seeds: int | Sequence[int] | None,
    engine: Engine,
) -> _Trained:
    recipe = Recipe.of(module, data, trainer)
    with quiet_lightning():
        loader = recipe.loader()
        about, examples = recipe.describe(loader), recipe.examples(loader)
    recorded = set()
    if ensemble is not None:
        recorded = {run.manifest.seed for run in ensemble}
        trained_on = ensemble[0].manifest.configuration["dataset"]
        if any(trained_on[key] not in (None, about["data"][key]) for key in ("length", "fingerprint")):
            raise RetrainingError(
                f"The training data are not those of {ensemble.root}: other examples, or another order. Give the data "
                "that were recorded."
            )
        examples.refuse_changes(ensemble[0])
    own = fresh_seeds("seeds", seeds, recorded)
    of_all = own if baseline_seeds is None else fresh_seeds("baseline_seeds", baseline_seeds, recorded)
    return _Trained(engine, recipe, examples, own, of_all, about)


def _reweighted(
    module: Any,
    data: Any,
    ensemble: Ensemble | None,
    seeds: int | Sequence[int],
    baseline_seeds: int | Sequence[int] | None,
) -> _Trained:
    if not isinstance(ensemble, Ensemble):
        raise RetrainingError(
            'removal="reweight" trains recorded runs over again. Give ensemble=Ensemble.open(...), or removal="drop".'
        )
    if baseline_seeds is not None:
        raise RetrainingError(
            "The baseline of reweighted runs is what was measured of these very runs. Leave baseline_seeds out."
        )
    made = module if isinstance(module, pl.LightningModule) else module()
    engine = Reweighting(ensemble, made, training_examples(made if data is None else data))
    own = recorded_seeds(seeds, sorted(engine.runs), ensemble.root)
    about = {
        "configuration": ensemble[0].manifest.configuration,
        "data": describe_data(engine.examples.dataset),
        "runs": {run.name: run.checksum for run in ensemble},
    }
    return _Trained(engine, None, engine.examples, own, own, about)


def _engine(workers: Workers, stacked: Stacked, compile: bool | None) -> Engine:
    """Return what trains."""
    if stacked == "auto":
        return AutoEngine(workers, compile)
    return StackedEngine(compile) if stacked else TrainerEngine(workers)


def _train(
    engine: Engine, retraining: Retraining, tasks: list[Task], store: TruthStore | None, progress: bool
) -> tuple[dict[Task, Tensor], dict[Task, str]]:
    """Train what is not in the store yet; return all measurements by task, and what went wrong."""
    finished = {} if store is None else store.finished()
    remaining = [task for task in tasks if task not in finished]
    failures: dict[Task, str] = {}
    _log.info(
        "Retraining: %d trainings%s.",
        len(remaining),
        f", {len(tasks) - len(remaining)} of {len(tasks)} are done already" if finished else "",
    )
    try:
        with (
            quiet_lightning(),
            progress_bar("retraining", "trainings", len(remaining), progress and bool(remaining)) as advance,
        ):
            for outcomes in engine.train(retraining, remaining) if remaining else ():
                done = [
                    (outcome.task, outcome.measurements) for outcome in outcomes if outcome.measurements is not None
                ]
                if done and store is not None:
                    store.add([task for task, _ in done], torch.stack([measured for _, measured in done]))
                finished |= dict(done)
                failures |= {outcome.task: outcome.failure for outcome in outcomes if outcome.failure is not None}
                advance(len(outcomes))
    finally:
        if store is not None and remaining:
            store.note(engine.name, failures)
    if failures:
        what = f"{len(failures)} of {len(remaining)} trainings failed ({_reasons(failures)})"
        if not any(task in finished for task in tasks):
            raise RetrainingError(f"{what}. There is nothing to measure.")
        warnings.warn(f"{what}. Their measurements are NaN; truth.finished() leaves them out.", stacklevel=3)
    return finished, failures


def _reasons(failures: Mapping[Task, str]) -> str:
    """Say why trainings failed; each reason once, most have the same."""
    tasks_of: dict[str, list[Task]] = {}
    for task, reason in failures.items():
        tasks_of.setdefault(reason, []).append(task)
    told = [f"{some_tasks(tasks)}: {reason}" for reason, tasks in list(tasks_of.items())[:_REASONS]]
    return "; ".join(told) + ("; ..." if len(tasks_of) > _REASONS else "")
