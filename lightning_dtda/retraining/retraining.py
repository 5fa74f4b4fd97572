"""Ground truth: training models again without some examples, and measuring them."""

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
from lightning_dtda.execution import ThisProcess, Workers, workers_of
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
from lightning_dtda.retraining.recipe import Recipe, data_facts
from lightning_dtda.retraining.reweighting import Reweighting
from lightning_dtda.retraining.stacked_engine import StackedEngine
from lightning_dtda.retraining.subsets import check_subsets
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import TrainerEngine
from lightning_dtda.retraining.truth_store import TruthStore, gather
from lightning_dtda.stacking.choice import Stacked, chosen_stacked
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.independence import independent_runs

_log = logging.getLogger(__name__)

Removal = Literal["drop", "reweight"]

_REASONS = 3
"""Number of reasons for failures in a warning; the ground truth and its store have all of them."""


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

    This is the ground truth for what attribution predicts (arXiv 2506.12965, section 5).

    Args:
        module: Module to train: a function that creates it, called after the seed is set, or a LightningModule that can
            be created again from its saved hyperparameters. The weights of the module are not used.
        data: Training data: a data module or a DataLoader; ``None`` or a module for modules that have a
            ``train_dataloader`` method. For ``"reweight"``, a Dataset is sufficient.
        subsets: K sets of indices of training examples; see :mod:`lightning_dtda.retraining.subsets`.
        seeds: S seeds: a number, for new seeds, or a list.
        queries: Q inputs on which the measurement is taken, as for :func:`~lightning_dtda.attribute`.
        measurement: Measurement as for :func:`~lightning_dtda.attribute`.
        removal: ``"drop"`` to delete the examples, so that each seed is a new training on a smaller data set;
            ``"reweight"`` to repeat the recorded runs of ``ensemble`` in their recorded order, with the weights of the
            examples set to zero and the divisor of the loss unchanged.
        baseline_seeds: Seeds of the trainings on all examples; by default ``seeds``. With the same seeds, models start
            from the same parameters, which removes some noise from differences of means.
        measurement_draws: Number of draws as for :func:`~lightning_dtda.attribute`.
        measurement_seed: Seed of the draws as for :func:`~lightning_dtda.attribute`.
        trainer: Function that creates a Trainer; not needed for ``"reweight"``.
        ensemble: Recorded runs: for ``"reweight"`` the runs to repeat, otherwise runs whose seeds must not be reused.
        output: Directory in which every finished training is stored at once. The same call continues an interrupted
            one, other subsets or seeds are added, and several processes may work on it at the same time.
        overwrite: Whether to replace the answer to another question in ``output``.
        workers: Where the Trainer trains: a number of processes on this machine, or a
            :class:`~lightning_dtda.execution.RayCluster`. If a node of a
            cluster is lost, its trainings are repeated; if a process is killed, the call ends and another one continues
            from ``output``.
        stacked: Whether to run many trainings at once on one device, after a comparison with the Trainer. ``"auto"``
            stacks if possible and leaves the remaining trainings to the Trainer; with workers, the Trainer runs all.
        compile: Whether to compile stacks with ``torch.compile``, which takes about half a minute; ``None`` compiles
            if there is enough work ahead.
        device: Device of stacked and reweighted trainings; by default that of the Trainer, or of the module for
            ``"reweight"``. Has no effect on trainings by the Trainer itself.
        progress: Whether to show a progress bar.

    Returns:
        Measurements ``(K, S, Q)`` and baseline ``(baseline seeds, Q)``. Failed trainings are NaN, with a warning;
        ``about["failures"]`` lists the reasons.

    Raises:
        RetrainingError: If the question cannot be answered, or all trainings failed.
        CannotStackError: If the trainings cannot be stacked although ``stacked=True``.
        ExecutionError: If the workers or the device do not exist, or trainings cannot be sent to them.
        AttributionError: If queries or measurement are invalid.
        ReplayError: If recorded runs do not belong to module and data.
    """
    if removal not in get_args(Removal):
        raise RetrainingError(f"removal={removal!r}; choose from {', '.join(get_args(Removal))}.")
    name, function = _usable_measurement(measurement, output)
    draws = Draws(measurement_draws, measurement_seed)
    workers = workers_of(workers)
    if removal == "reweight" and (not isinstance(workers, ThisProcess) or stacked != "auto" or compile is not None):
        raise RetrainingError(
            "Recorded runs are reweighted in this process, stacked if possible. Leave out workers, stacked and compile."
        )
    stacked = chosen_stacked(stacked, workers, compile)
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
    retraining = Retraining(
        recipe=trained.recipe,
        removed=removed if store is None else store.removed,
        data=about["data"],
        queries=query_set,
        measurement=function,
        device=None if device is None else usable_device(device),
        draws=draws,
    )
    finished, failures = _train(trained.engine, retraining, trained.tasks(positions), store, progress)
    measurements, baseline = gather(finished, positions, trained.seeds, trained.baseline_seeds, len(names))
    about |= {
        "engine": ", ".join(trained.engine.names),
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
    """The kind of trainings: dropped or reweighted."""

    engine: Engine
    recipe: Recipe | None
    examples: Examples
    seeds: tuple[int, ...]
    baseline_seeds: tuple[int, ...]
    about: dict[str, Any]

    def tasks(self, positions: Sequence[int]) -> list[Task]:
        """Return the trainings on all examples, and those without the subsets at these positions."""
        # all subsets for a seed before the next seed: an interrupted call has some of each
        return [Task(None, seed) for seed in self.baseline_seeds] + [
            Task(position, seed) for seed in self.seeds for position in positions
        ]


def _usable_measurement(measurement: str | Measurement, output: str | Path | None) -> tuple[str, Measurement]:
    name, function = resolve_measurement(measurement)
    if output is not None and "<" in name:
        raise RetrainingError(
            f"The measurement {name} has no unique name, so its stored answers could be confused with those for "
            "another measurement. Define it as a function at the top level of a Python file, or leave out output."
        )
    return name, function


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
                f"The training data are not those of {ensemble.root}: the examples or their order differ. Pass the "
                "data that the runs were recorded with."
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
            'removal="reweight" repeats recorded runs. Pass ensemble=Ensemble.open(...), or removal="drop".'
        )
    if baseline_seeds is not None:
        raise RetrainingError("The baseline of reweighted runs is measured on the same runs. Leave out baseline_seeds.")
    made = module if isinstance(module, pl.LightningModule) else module()
    engine = Reweighting(ensemble, made, training_examples(made if data is None else data))
    recorded = sorted(engine.runs)
    crossed = [engine.runs[seed].manifest.seeds for seed in recorded]
    few = [recorded[position] for position in independent_runs(crossed)]
    own = recorded_seeds(seeds, recorded, ensemble.root, None if len(few) == len(recorded) else few)
    about = {
        "configuration": ensemble[0].manifest.configuration,
        "data": data_facts(engine.examples.dataset),
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
    """Train what is not in the store yet, and return all measurements and reasons of failures by task."""
    finished = {} if store is None else store.finished()
    remaining = [task for task in tasks if task not in finished]
    failures: dict[Task, str] = {}
    _log.info(
        "Retraining: %d trainings%s.",
        len(remaining),
        f", {len(tasks) - len(remaining)} of {len(tasks)} are already done" if finished else "",
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
                    store.add([task for task, _ in done], torch.stack([values for _, values in done]))
                finished |= dict(done)
                failures |= {outcome.task: outcome.failure for outcome in outcomes if outcome.failure is not None}
                advance(len(outcomes))
    finally:
        if store is not None and remaining:
            store.note(engine.names, failures)
    if failures:
        what = f"{len(failures)} of {len(remaining)} trainings failed ({_reasons(failures)})"
        if not any(task in finished for task in tasks):
            raise RetrainingError(f"{what}. There is nothing to measure.")
        warnings.warn(f"{what}. Their measurements are NaN; truth.finished() leaves them out.", stacklevel=3)
    return finished, failures


def _reasons(failures: Mapping[Task, str]) -> str:
    """List the reasons why trainings failed, each one once, because most failures have the same reason."""
    tasks_of: dict[str, list[Task]] = {}
    for task, reason in failures.items():
        tasks_of.setdefault(reason, []).append(task)
    reasons = [f"{some_tasks(tasks)}: {reason}" for reason, tasks in list(tasks_of.items())[:_REASONS]]
    return "; ".join(reasons) + ("; ..." if len(tasks_of) > _REASONS else "")
