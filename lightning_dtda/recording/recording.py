"""``record``: many seeds of one training, each a run on disk."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_dtda.errors import CannotStackError, RecordingError
from lightning_dtda.execution import Lost, ThisProcess, Workers, workers_of
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.execution.quiet import output_to, quiet_lightning
from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.recording.seeds import Data, MakeTraining, is_complete, record_seeds
from lightning_dtda.recording.stacked_recording import record_stacked
from lightning_dtda.stacking.choice import Stacked, check_stacked

_log = logging.getLogger(__name__)


def record(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    seeds: int | Sequence[int],
    *,
    workers: int | Workers = 1,
    stacked: Stacked = False,
    compile: bool | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[int, str]:
    r"""Train a configuration once for each seed, and record every step: samples of the distribution of trained models.

    .. math:: (\theta_0^{(s)}, \dots, \theta_T^{(s)}), \quad s \in \text{seeds}, \qquad \theta_T^{(s)} \sim \mu_D

    Runs that are complete are skipped, incomplete ones are recorded again; a seed that fails does not stop the others.
    The runs then are in ``Ensemble.open(recorder.root)``.

    Args:
        make: Makes Trainer, module and data afresh: ``(trainer, module, data)``, called after each seed is set. Data
            are a data module, a DataLoader, or ``None`` for modules with a ``train_dataloader`` of their own.
        recorder: How to record, and where: each run is a sub-directory of its root.
        seeds: A number S for the seeds 0 to S - 1, or a list.
        workers: Where the Trainer trains: a number of processes of this machine, or a
            :class:`~lightning_dtda.execution.RayCluster`, whose nodes write to a disk that all of them share. What
            trainings in other processes print goes to ``logs/seed-0000.log`` and so on.
        stacked: Whether many seeds are trained at once on one device, after the Trainer has recorded the first: the
            same runs, up to rounding, of small networks many times faster. Loggers, callbacks and validation are then
            for the seeds that the Trainer trains. ``"auto"`` stacks where that can be.
        compile: Whether ``torch.compile`` is used for stacks; ``None`` compiles where there is enough to do.
        device: Where stacks are trained; ``None`` is the Trainer's own device.
        progress: Whether to show a progress bar.

    Returns:
        What went wrong, by seed; empty where all runs are complete.

    Raises:
        RecordingError: If there is no such seed; if the recorder asks for what cannot be; or, of stacks, if another
            process records one of these runs or a file cannot be written.
        CannotStackError: If the trainings were to be stacked and cannot be. Nothing is lost: runs that are complete
            count.
        ExecutionError: If there are no such workers or device, or a process was lost.

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
    workers, wanted = workers_of(workers), checked_seeds(seeds)
    check_stacked(stacked, workers)
    _refuse_recorder(recorder)
    missing = [seed for seed in wanted if not is_complete(recorder.root / run_name(seed))]
    if not missing:
        return {}
    # in a training of several processes, the others come by here too
    show = progress and getattr(rank_zero_only, "rank", 0) == 0
    with quiet_lightning(), progress_bar("recording", "runs", len(missing), show) as advance:

        def finished(seed: int) -> None:
            advance(1)

        if stacked:
            try:
                return record_stacked(make, recorder, missing, device=device, compile=compile, finished=finished)
            except CannotStackError as error:
                if stacked is True:
                    raise
                _log.info("Not stacked: %s. The Trainer trains one by one.", error.reason)
                # one that failed by the Trainer is told again by it
                missing = [seed for seed in missing if not is_complete(recorder.root / run_name(seed))]
        if isinstance(workers, ThisProcess):
            return record_seeds(make, recorder, missing, finished)
        failures: dict[int, str] = {}
        for seed, result in workers.run(_Elsewhere(make, recorder, tuple(missing)), missing):
            reason = result.reason if isinstance(result, Lost) else result
            if reason is None and not is_complete(recorder.root / run_name(seed)):
                reason = (
                    f"its run is not in {recorder.root} on this machine. Let the ensemble be on a disk that all nodes "
                    "share."
                )
            if reason is not None:
                failures[seed] = reason
            finished(seed)
    return failures


@dataclass(frozen=True)
class _Elsewhere:
    """What is sent to other processes: records the run of a seed, and returns what went wrong.

    Args:
        make: As for :func:`record`.
        recorder: The same.
        seeds: All seeds; the first looks whether their runs fit on the disk.
    """

    make: MakeTraining
    recorder: TrajectoryRecorder
    seeds: tuple[int, ...]

    def __call__(self, seed: int) -> str | None:
        log = self.recorder.root / "logs" / f"{run_name(seed)}.log"
        to_fit = len(self.seeds) if seed == self.seeds[0] else 0
        with output_to(log), quiet_lightning():
            reason = record_seeds(self._make, self.recorder, [seed], to_fit=to_fit).get(seed)
        return reason and f"{reason} (see {log})"

    def _make(self) -> tuple[pl.Trainer, pl.LightningModule, Data]:
        training = self.make()
        if (processes := training[0].world_size) > 1:
            raise RecordingError(
                f"The Trainer spreads a training over {processes} processes; each worker does one by itself. Set the "
                "Trainer's devices to 1, or workers to 1."
            )
        return training


def checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return seeds as a list.

    Raises:
        RecordingError: If there are none, or one is given twice or is negative.
    """
    try:
        chosen = list(range(seeds)) if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) != len(chosen) or min(chosen) < 0:
        raise RecordingError(
            f"seeds={seeds!r} is no set of seeds. Give a positive number, or a list of different numbers from 0 on."
        )
    return chosen


def _refuse_recorder(recorder: TrajectoryRecorder) -> None:
    """Refuse what the recorder of a single training can do.

    Raises:
        RecordingError: Naming the argument.
    """
    if recorder.run is not None:
        raise RecordingError(
            f"The recorder has run={recorder.run!r}; there is a run for each seed, which takes its name from it. Leave "
            "run out."
        )
    if recorder.overwrite:
        raise RecordingError(
            "The recorder has overwrite=True. Runs that are complete are skipped, incomplete ones are replaced. Leave "
            "it out, and delete what is to be recorded again."
        )
