"""Recording many seeds of one configuration in this process."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_dtda.compatibility import is_a
from lightning_dtda.errors import DiskSpaceError, DTDAError, RecordingError, TrajectoryError, UnknownFormatError
from lightning_dtda.execution.fitting import fit
from lightning_dtda.recording.crossed_seeds import CrossedSeeds, seed_training
from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.trajectory import Run
from lightning_dtda.trajectory.storage import is_disk_full

Data: TypeAlias = "pl.LightningDataModule | DataLoader[Any] | None"
"""Training data; ``None`` for modules that have a ``train_dataloader`` method."""

MakeTraining: TypeAlias = Callable[[], tuple[pl.Trainer, pl.LightningModule, Data]]


def record_seeds(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    seeds: Iterable[int],
    finished: Callable[[int], None] = lambda seed: None,
    to_fit: int | None = None,
    reraised: tuple[type[Exception], ...] = (),
    crossed: CrossedSeeds | None = None,
) -> dict[int, str]:
    """Train and record one run for each seed; a seed that fails does not stop the others, unless they would fail too.

    Complete runs are skipped; incomplete runs are recorded again.

    Args:
        make: Function that creates Trainer, module and data after the seed is set.
        recorder: How and where to record: each run is a sub-directory of its root.
        seeds: Seeds to train.
        finished: Function that is called after each seed that was trained or failed.
        to_fit: Number of runs that the disk must have space for; by default the number of missing runs. Other processes
            may record into the same root at the same time.
        reraised: Types of errors that concern all seeds and are raised, not reported for one seed.
        crossed: What the seeds combine, if the sources of randomness have seeds of their own.

    Returns:
        Reasons of failures, by seed.

    Raises:
        DiskSpaceError: If the disk does not have space for all runs, or becomes full.
        RecordingError: If the first two seeds fail for the same reason, and there are more.
    """
    failures: dict[int, str] = {}
    root = recorder.root
    missing = [seed for seed in seeds if not is_complete(root / run_name(seed))]
    to_fit = len(missing) if to_fit is None else to_fit
    for number, seed in enumerate(missing):
        name = run_name(seed)
        if is_complete(root / name):  # another process recorded it in the meantime
            finished(seed)
            continue
        of_seed = copy.copy(recorder)
        of_seed.overwrite = (root / name).exists()
        of_seed.runs_to_fit = to_fit
        try:
            with _weights_and_biases(root.name, name):
                _record_seed(make, of_seed, seed, crossed)
        except DiskSpaceError:  # it concerns all seeds
            raise
        except reraised:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise DiskSpaceError(
                    f"The disk became full while seed {seed} was trained ({error}). Free some space, then record "
                    "again: complete runs are kept."
                ) from error
            reason = f"{type(error).__name__}: {error}"
            if not isinstance(error, DTDAError) and reason not in failures.values():  # in the user's code: show where
                traceback.print_exc()
            failures[seed] = reason
            refuse_shared(failures, number + 1, len(missing))
        if of_seed.needed is not None:  # the space was checked for all
            to_fit = 0
        finished(seed)
    return failures


def refuse_shared(failures: Mapping[int, str], tried: int, seeds: int) -> None:
    """Stop trying seeds when the first two have failed for the same reason: so would the others.

    Args:
        failures: Reasons of failures, by seed.
        tried: Number of seeds tried.
        seeds: Number of seeds to try.

    Raises:
        RecordingError: If there are more than these two.
    """
    if tried == len(failures) == 2 < seeds and len(set(failures.values())) == 1:
        first, second = failures
        raise RecordingError(
            f"Seeds {first} and {second} failed for the same reason, so no others were tried: {failures[first]}"
        )


def is_complete(directory: Path) -> bool:
    """Return whether a directory holds a run that ended normally and has all its files.

    Raises:
        UnknownFormatError: If another version of lightning-dtda wrote the run, which must not be overwritten.
    """
    try:
        return Run(directory).complete
    except UnknownFormatError:
        raise
    except TrajectoryError:
        return False


def _record_seed(make: MakeTraining, recorder: TrajectoryRecorder, seed: int, crossed: CrossedSeeds | None) -> None:
    recorder.seeds = seed_training(seed, crossed)
    trainer, module, data = make()
    trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        if is_a(logger, "loggers.WandbLogger"):
            logger.log_hyperparams({"seed": seed})  # the column that tells the runs of the group apart
    fit(trainer, module, data)


@contextmanager
def _weights_and_biases(group: str, name: str) -> Iterator[None]:
    """Set defaults for W&B loggers: each run is logged under its name, in a group named after the ensemble."""
    wanted = {"WANDB_RUN_GROUP": group, "WANDB_NAME": name, "WANDB_JOB_TYPE": "training"}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()  # otherwise the logger of the next seed would continue this run
            wandb.teardown()  # W&B reads its environment once per set-up, and the next seed has another name
        for key in added:
            os.environ.pop(key, None)
