"""``record``: many seeds of one training, each a run on disk."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_dtda.errors import CannotStackError, RecordingError
from lightning_dtda.execution import Lost, ThisProcess, Workers, workers_of
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.execution.quiet import output_to, quiet_lightning
from lightning_dtda.recording.crossed_runs import CrossedRuns, refuse_other_seeds
from lightning_dtda.recording.crossed_seeds import CrossedSeeds
from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.recording.seeds import Data, MakeTraining, is_complete, record_seeds, refuse_shared
from lightning_dtda.recording.stacked_recording import record_stacked
from lightning_dtda.stacking.choice import Stacked, chosen_stacked

_log = logging.getLogger(__name__)


def record(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    seeds: int | Sequence[int] | CrossedSeeds,
    *,
    workers: int | Workers = 1,
    stacked: Stacked = False,
    compile: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[int, str]:
    r"""Train a configuration once for each seed, and record every step: samples of the distribution of trained models.

    .. math:: (\theta_0^{(s)}, \dots, \theta_T^{(s)}), \quad s \in \text{seeds}, \qquad \theta_T^{(s)} \sim \mu_D

    Complete runs are skipped and incomplete ones are recorded again. A seed that fails does not stop the others, unless
    it is clear that they would fail, too.
    Open the runs with ``Ensemble.open(recorder.root)``.

    Args:
        make: Function that creates Trainer, module and data: ``(trainer, module, data)``, called after each seed is
            set. ``data`` is a data module, a DataLoader, or ``None`` for modules with a ``train_dataloader`` method.
        recorder: How and where to record: each run is a sub-directory of its root.
        seeds: A number S for the seeds 0 to S - 1, or a list; or :class:`~lightning_dtda.recording.CrossedSeeds`, to
            split the variance by source: ``CrossedSeeds(initialisation=8, order=8)`` trains 64 runs.
        workers: Where the Trainer trains: a number of processes on this machine, or a
            :class:`~lightning_dtda.execution.RayCluster`, whose nodes must write to a shared disk. The output of
            trainings in other processes goes to ``logs/seed-0000.log`` and so on.
        stacked: Whether to train many seeds at once on one device, after the Trainer has recorded the first. The runs
            are the same up to rounding; small networks train many times faster. Loggers, callbacks and validation then
            run only for the seeds that the Trainer trains. ``"auto"`` stacks if possible.
        compile: Whether to compile stacks with ``torch.compile``; ``None`` compiles if there is enough work.
        device: Device of stacked trainings; by default that of the Trainer.
        progress: Whether to show a progress bar.

    Returns:
        Reasons of failures, by seed; empty if all runs are complete.

    Raises:
        RecordingError: If the seeds or the recorder's settings are invalid; if the first two of more seeds fail for the
            same reason; if runs that share the seed of a source differ in what it decides, or its seeds change nothing;
            or, for stacks, if another process records one of these runs or a file cannot be written.
        DiskSpaceError: If the disk has not enough space for all runs, or becomes full.
        CannotStackError: If the trainings cannot be stacked although ``stacked=True``. Complete runs are kept.
        ExecutionError: If the workers or the device do not exist, or a process was lost.

    Example:
        >>> import tempfile, torch, lightning.pytorch as pl
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_dtda import Ensemble, TrajectoryRecorder, record
        >>> from lightning_dtda.demo.diabetes import DiabetesRegressor
        >>> data = TensorDataset(torch.randn(40, 10), torch.randn(40))
        >>> quiet = dict.fromkeys(
        ...     ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
        ... )
        >>> def make():
        ...     trainer = pl.Trainer(max_epochs=2, accelerator="cpu", **quiet)
        ...     return trainer, DiabetesRegressor(width=4), DataLoader(data, batch_size=8, shuffle=True)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     failures = record(make, TrajectoryRecorder(root), seeds=5, stacked=True, progress=False)
        ...     print(failures, len(Ensemble.open(root)), Ensemble.open(root)[4].steps)
        {} 5 10
    """
    crossed = seeds if isinstance(seeds, CrossedSeeds) else None
    workers, wanted = workers_of(workers), checked_seeds(seeds)
    stacked = chosen_stacked(stacked, workers, compile)
    _refuse_recorder(recorder)
    missing = [seed for seed in wanted if not is_complete(recorder.root / run_name(seed))]
    refuse_other_seeds(recorder.root, wanted, crossed)
    crossed_runs = None if crossed is None else CrossedRuns(recorder.root, crossed)
    if crossed_runs is not None:
        for seed in wanted:
            crossed_runs.add(seed)
    if not missing:
        return {}
    # if a training uses several processes, the others get here too
    show = progress and getattr(rank_zero_only, "rank", 0) == 0
    with quiet_lightning(), progress_bar("recording", "runs", len(missing), show) as advance:

        def finished(seed: int) -> None:
            advance(1)
            if crossed_runs is not None:  # what goes wrong shows after few runs, not after all
                crossed_runs.add(seed)

        if stacked:
            try:
                settings: dict[str, Any] = {"device": device, "compile": compile, "crossed": crossed}
                return record_stacked(make, recorder, missing, finished=finished, **settings)
            except CannotStackError as error:
                if stacked is True:
                    raise
                _log.info("Not stacked: %s. Training one by one with the Trainer.", error.reason)
                # a seed that failed with the Trainer is trained again, and reported again
                missing = [seed for seed in missing if not is_complete(recorder.root / run_name(seed))]
        if isinstance(workers, ThisProcess):
            return record_seeds(make, recorder, missing, finished, crossed=crossed)
        failures = {}
        results = workers.run(_Elsewhere(make, recorder, tuple(missing), crossed), missing)
        for tried, (seed, result) in enumerate(results, 1):
            reason = result.reason if isinstance(result, Lost) else result
            if reason is None and not is_complete(recorder.root / run_name(seed)):
                reason = (
                    f"its run is not in {recorder.root} on this machine. Use a root on a disk that all nodes share."
                )
            if reason is not None:
                failures[seed] = reason
                refuse_shared(failures, tried, len(missing))
            finished(seed)
    logs = {seed: _log_of(recorder, seed) for seed in failures}
    return {seed: f"{why} (see {logs[seed]})" if logs[seed].exists() else why for seed, why in failures.items()}


def _log_of(recorder: TrajectoryRecorder, seed: int) -> Path:
    """Return the path of the file for what a training in another process prints."""
    return recorder.root / "logs" / f"{run_name(seed)}.log"


@dataclass(frozen=True)
class _Elsewhere:
    """Function for other processes: records the run of a seed, and returns the reason if that fails.

    Args:
        make: As for :func:`record`.
        recorder: As for :func:`record`.
        seeds: All seeds; the first one checks whether all runs fit on the disk.
        crossed: What the seeds combine, if the sources of randomness have seeds of their own.
    """

    make: MakeTraining
    recorder: TrajectoryRecorder
    seeds: tuple[int, ...]
    crossed: CrossedSeeds | None

    def __call__(self, seed: int) -> str | None:
        to_fit = len(self.seeds) if seed == self.seeds[0] else 0
        with output_to(_log_of(self.recorder, seed)), quiet_lightning():
            return record_seeds(self._make, self.recorder, [seed], to_fit=to_fit, crossed=self.crossed).get(seed)

    def _make(self) -> tuple[pl.Trainer, pl.LightningModule, Data]:
        training = self.make()
        if (processes := training[0].world_size) > 1:
            raise RecordingError(
                f"The Trainer spreads a training over {processes} processes, but each worker runs a training in one "
                "process. Set Trainer(devices=1, num_nodes=1), or workers=1."
            )
        return training


def checked_seeds(seeds: int | Sequence[int] | CrossedSeeds) -> list[int]:
    """Return the seeds of the runs as a list.

    Raises:
        RecordingError: If there are no seeds, or one is given twice or is negative.
    """
    if isinstance(seeds, CrossedSeeds):
        return [of_run.run for of_run in seeds.runs()]
    try:
        chosen = list(range(seeds)) if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise RecordingError(
            f"seeds={seeds!r} must give at least one seed, each only once and none negative: a number of seeds, or a "
            "list of seeds."
        )
    return chosen


def _refuse_recorder(recorder: TrajectoryRecorder) -> None:
    """Refuse settings of the recorder that only make sense for a single training.

    Raises:
        RecordingError: If there are any. The message names the argument.
    """
    if recorder.run is not None:
        raise RecordingError(
            f"The recorder has run={recorder.run!r}, but record names the run of each seed after the seed. Leave out "
            "run."
        )
    if recorder.overwrite:
        raise RecordingError(
            "The recorder has overwrite=True, but record skips complete runs and replaces incomplete ones. Leave out "
            "overwrite, and delete the runs to record again."
        )
