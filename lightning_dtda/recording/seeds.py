"""Many seeded runs of one configuration, in this process."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_dtda.errors import DTDAError, TrajectoryError, UnknownFormatError
from lightning_dtda.recording.recorder import TrajectoryRecorder, run_name
from lightning_dtda.trajectory import Run

Data: TypeAlias = "pl.LightningDataModule | DataLoader[Any] | None"
"""What is trained on; ``None`` for modules with a ``train_dataloader`` of their own."""

MakeTraining: TypeAlias = Callable[[], tuple[pl.Trainer, pl.LightningModule, Data]]


def record_seeds(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    seeds: Iterable[int],
    finished: Callable[[int], None] = lambda seed: None,
    to_fit: int | None = None,
    reraised: tuple[type[Exception], ...] = (),
) -> dict[int, str]:
    """Train and record one run for each seed; one that fails does not stop the others.

    Runs that are complete are skipped, incomplete ones are recorded again.

    Args:
        make: Makes Trainer, module and data afresh, after the seed is set.
        recorder: How to record, and where: each run is a sub-directory of its root.
        seeds: The seeds.
        finished: Called after each seed that was trained or failed.
        to_fit: Number of runs that the disk must hold; as many as are missing if not given. Others may record into
            the same root at the same time.
        reraised: Errors that say something of all seeds: they are not put down to one, but raised.

    Returns:
        What went wrong, by seed.
    """
    failures, root = {}, recorder.root
    missing = [seed for seed in seeds if not is_complete(root / run_name(seed))]
    to_fit = len(missing) if to_fit is None else to_fit
    for seed in missing:
        name = run_name(seed)
        of_seed = copy.copy(recorder)
        of_seed.overwrite = (root / name).exists()
        of_seed.runs_to_fit, to_fit = to_fit, 0
        try:
            with _weights_and_biases(root.name, name):
                _record_seed(make, of_seed, seed)
        except reraised:
            raise
        except Exception as error:
            if not isinstance(error, DTDAError):  # the user's own code: show where
                traceback.print_exc()
            failures[seed] = f"{type(error).__name__}: {error}"
        finished(seed)
    return failures


def is_complete(directory: Path) -> bool:
    """Whether a directory holds a run that came to its regular end, with all its files.

    Raises:
        UnknownFormatError: If another version of lightning-dtda wrote it: no reason to record over it.
    """
    try:
        return Run(directory).complete
    except UnknownFormatError:
        raise
    except TrajectoryError:
        return False


def _record_seed(make: MakeTraining, recorder: TrajectoryRecorder, seed: int) -> None:
    pl.seed_everything(seed, workers=True, verbose=False)
    trainer, module, data = make()
    trainer.callbacks.append(recorder)  # type: ignore[attr-defined]
    trainer.fit(module, data)
    if trainer.interrupted:
        raise KeyboardInterrupt


@contextmanager
def _weights_and_biases(group: str, name: str) -> Iterator[None]:
    """Let a W&B logger that says nothing else put each run under its name in the ensemble's group."""
    wanted = {"WANDB_RUN_GROUP": group, "WANDB_NAME": name, "WANDB_JOB_TYPE": "training"}
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()  # the logger of the next seed would go on with this run
            wandb.teardown()  # and W&B reads its environment once for each set-up: the next seed has another name
        for key in added:
            os.environ.pop(key, None)
