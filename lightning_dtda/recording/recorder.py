"""The callback that turns a training into a recorded run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dtda.compatibility import tree_leaves
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import checks
from lightning_dtda.recording.averaging import AveragingTap, averaging_callback
from lightning_dtda.recording.batch_tap import BatchTap
from lightning_dtda.recording.configuration import (
    configuration,
    hyperparameters,
    versions,
)
from lightning_dtda.recording.crossed_seeds import RunSeeds
from lightning_dtda.recording.data import TrainingData, check_batch, read_batch
from lightning_dtda.recording.distributed import together
from lightning_dtda.recording.extent import (
    Needed,
    check_disk,
    checkpoint_interval,
    gradient_precision,
    needed,
    planned_steps,
)
from lightning_dtda.recording.other_runs import refuse_other_configuration
from lightning_dtda.recording.resuming import resume
from lightning_dtda.recording.run_recording import RunRecording, make_directory
from lightning_dtda.recording.step_callback import StepCallback
from lightning_dtda.recording.trial import Trial, try_step
from lightning_dtda.replay.batches import example_types, map_tensors, rows_of
from lightning_dtda.trajectory import Manifest, MicroBatch, Run, RunWriter
from lightning_dtda.trajectory.run import process_path
from lightning_dtda.units import is_quantity

_log = logging.getLogger(__name__)


class TrajectoryRecorder(StepCallback):
    r"""Records every optimizer step of a training, so that it can be replayed and attributed afterwards.

    For each step, it records the data set indices of every micro-batch in order, the learning rate and the other
    hyperparameters of every parameter group, the states of the random number generators that ``training_step`` draws
    from, and the gradient that the optimizer applied. It also saves checkpoints of parameters, optimizer state and
    buffers. The training itself is unchanged, bit for bit. Files are written in a separate thread; a training that is
    killed leaves a readable prefix that is marked as incomplete.

    A training that resumes from a Trainer's checkpoint (``ckpt_path``) continues the same run. The checkpoint contains
    the name of the run and its number of steps, which are all on disk when it is saved. Steps recorded after the
    checkpoint are discarded.

    Args:
        root: Directory of the ensemble. Each run is a sub-directory.
        run: Name of the run. If ``None``, it is derived from the seed: ``seed-0007`` after ``seed_everything(7)``.
        gradients: Precision in which gradients are stored. ``"auto"`` means ``"float32"`` if the gradients of the whole
            run fit in ``gradients_budget``, else ``"none"``. A replay recomputes gradients that are not stored.
        gradients_budget: Budget for ``"auto"`` in GiB.
        batches: ``"indices"`` to record which examples are in a batch; a replay reads them from the data set.
            ``"store"`` to record the batches themselves, for data sets with random augmentation. Row n of a batch must
            belong to its n-th index, so do not use a ``collate_fn`` that mixes examples.
        checkpoint_every: Number of steps between checkpoints: ``"sqrt"`` for the square root of the number of steps (a
            replay then holds at most that many steps in memory), ``"all"`` for every step, or a number.
        overwrite: Whether to replace an existing run with this name.

    Raises:
        RecordingError: At the start of ``fit``, if the training could not be attributed afterwards: iterable data sets,
            several data loaders, manual optimization, several or unknown optimizers, strategies other than DDP, half
            precision, a loss that cannot be split into parts of single examples, an existing run, or too little free
            disk space. The message says what to do.

    Example:
        >>> recorder = TrajectoryRecorder("runs/concrete", gradients="none")
        >>> trainer = pl.Trainer(callbacks=[recorder], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        run: str | None = None,
        gradients: Literal["auto", "float32", "bfloat16", "none"] = "auto",
        gradients_budget: float = 2.0,
        batches: Literal["indices", "store"] = "indices",
        checkpoint_every: Literal["sqrt", "all"] | int = "sqrt",
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        if gradients not in ("auto", "float32", "bfloat16", "none"):
            raise RecordingError(f'gradients={gradients!r}; choose "auto", "float32", "bfloat16" or "none".')
        if batches not in ("indices", "store"):
            raise RecordingError(f'batches={batches!r}; choose "indices" or "store".')
        if not (checkpoint_every in ("sqrt", "all") or (type(checkpoint_every) is int and checkpoint_every > 0)):
            raise RecordingError(f'checkpoint_every={checkpoint_every!r}; choose "sqrt", "all" or a positive number.')
        if not (is_quantity(gradients_budget) and gradients_budget >= 0):
            raise RecordingError(f"gradients_budget={gradients_budget!r}; give a number of GiB.")
        if not isinstance(root, (str, os.PathLike)):
            raise RecordingError(f"root={root!r} must be the path of a directory.")
        if run is not None and (not isinstance(run, str) or Path(run).name != run or run in ("", "..")):
            raise RecordingError(f"run={run!r} must be the plain name of a sub-directory of root.")
        self.root = Path(root)
        self.run = run
        self.gradients = gradients
        self.gradients_budget = gradients_budget
        self.batches = batches
        self.checkpoint_every = checkpoint_every
        self.overwrite = overwrite
        self.runs_to_fit = 1
        """Number of runs like this one that the disk must have space for. A loop over seeds sets it for the first run,
        which then fails early if space would run out later, and sets it to 0 for the others."""
        self.seeds: RunSeeds | None = None
        """Seeds of the sources of randomness, if :func:`~lightning_dtda.record` sets them apart."""
        self.needed: Needed | None = None
        """Disk space and memory that the recording needs; known from the first batch on."""
        self._follower: RunRecording | None
        self._averaging: AveragingTap | None = None
        self._progress: dict[str, Any] = {}
        self._types: list[str] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if sum(isinstance(callback, TrajectoryRecorder) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise RecordingError("The Trainer has several TrajectoryRecorders. Keep one of them.")
        checks.refuse_trainer(trainer, pl_module)
        self._types = None
        if self.seeds is not None and trainer.world_size > 1:
            raise RecordingError(
                f"The Trainer spreads the training over {trainer.world_size} processes, but the seeds of "
                "initialisation, order and noise can only be set apart in one. Set Trainer(devices=1, num_nodes=1), or "
                "give plain seeds."
            )
        self._tap = BatchTap(trainer, pl_module, self.seeds)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._tap is None:
            return
        with together(trainer):
            self._directory = self._choose_directory(trainer)
            self._data = TrainingData(self._tap.loader, self._stores_batches)
            self._optimizer(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._tap is None:
            return
        micro_batch, collated = self._take_batch(trainer, batch_idx)
        if self._follower is None and self._averaging is None and (callback := averaging_callback(trainer)) is not None:
            self._writes_checkpoints = trainer.is_global_zero
            complete = partial(self._complete, trainer)
            self._averaging = AveragingTap(callback, pl_module, self._steps_so_far, complete)
        if self._follower is None:
            # not at the start of the training: hooks before the first batch may still change parameters and modes
            self._follower = self._begin(trainer, pl_module, micro_batch, batch, collated)
        if self._stores_batches:
            micro_batch = replace(micro_batch, leaves=self._leaves(collated, len(micro_batch.indices)))
        self._follower.begin_micro_batch(micro_batch, trainer.accumulate_grad_batches)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._follower is not None and trainer.gradient_clip_val and not _clips_by_value(trainer):
            self._follower.before_clipping()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._follower is not None:
            # a training that resumes from the checkpoint needs every step before it
            self._follower.sync()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._follower is not None:
            self._progress = {"run": self._directory.name, "steps": self._follower.steps}
        return self._progress

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._complete(trainer)

    def _complete(self, trainer: pl.Trainer) -> None:
        if self._follower is not None:
            self._follower.add_metrics(trainer.callback_metrics)
            if self._averaging is not None and self._writes_checkpoints:
                average = self._averaging.average(self._follower.layout)
                if average is not None:
                    self._follower.add_average(average)
        self._close("complete", None)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        try:
            self._stop(f"{type(exception).__name__}: {exception}".rstrip(": "))
        except Exception as error:
            # the user must see what stopped the training, and the Trainer still has to clean up
            if not isinstance(exception, RecordingError):
                _log.error("%s", error)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop("the training ended early")

    def _begin(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        micro_batch: MicroBatch,
        batch: Any,
        collated: Any,
    ) -> RunRecording:
        """Check the first batch, try an attribution step on it, and create the run directory."""
        is_first = trainer.global_rank == 0
        with together(trainer):
            optimizer = self._optimizer(trainer)
            indices = micro_batch.indices
            make = self._maker(indices, collated)
            trial = try_step(trainer, pl_module, optimizer, micro_batch, make)
            if not self._stores_batches:
                check_batch(make(range(len(indices))), batch, trial.eager.replica, micro_batch.rng_states)
            manifest = self._manifest(trainer, pl_module, optimizer, trial)
            if is_first and self._resumed is None and not self.overwrite:
                refuse_other_configuration(self._directory, manifest, self._data.checksums)
            if is_first:
                interval = checkpoint_interval(self.checkpoint_every, manifest.planned_steps)
                of_run = self.needed = needed(trainer, pl_module, optimizer, manifest, interval, collated)
                if self.runs_to_fit:
                    what = f"{self.runs_to_fit} runs in {self.root}" if self.runs_to_fit > 1 else str(self._directory)
                    check_disk(what, self.root, self.runs_to_fit * of_run.disk, of_run.memory)
                manifest = self._prepare(self._directory, manifest, pl_module)
        # the first process comes last: once its manifest exists, those of the others exist too
        for turn in (False, True):
            with together(trainer):
                if turn == is_first:
                    directory = process_path(self._directory, trainer.global_rank)
                    if not is_first:
                        self._check_root_is_shared()
                        manifest = replace(manifest, processes=1, gradients="none")
                        manifest = self._prepare(directory, manifest, pl_module)
                    recording = self._record(directory, manifest, pl_module, optimizer, is_first)
        return recording

    def _steps_so_far(self) -> int:
        return 0 if self._follower is None else self._follower.steps

    def _maker(self, indices: Tensor, collated: Any) -> Callable[[Sequence[int]], Any]:
        """Return a function that recreates the first batch from some of its rows."""
        if self._stores_batches:
            self._leaves(collated, len(indices))
            return lambda rows: map_tensors(lambda leaf: leaf[list(rows)], collated)
        return lambda rows: read_batch(self._loader, indices[list(rows)].tolist())

    def _manifest(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer, trial: Trial
    ) -> Manifest:
        layout = trial.layout
        numbers, options = hyperparameters(optimizer)
        planned, seed = planned_steps(trainer), _global_seed()
        facts: dict[str, Any] = {
            "seed": seed,
            "seeds": None if self.seeds is None else self.seeds.crossed,
            "configuration": configuration(trainer, pl_module, self._loader, self._data.description, optimizer, seed),
            "parameters": [
                {"name": name, "shape": list(shape)} for name, shape in zip(layout.names, layout.shapes, strict=True)
            ],
            "group_lengths": list(layout.group_lengths),
            "dtype": str(pl_module.get_parameter(layout.names[0]).dtype).removeprefix("torch."),
            "optimizer": checks.optimizer_path(optimizer),
            "options": options,
            "hyperparameters": numbers,
            "gradients": gradient_precision(self.gradients, self.gradients_budget, layout, planned),
            "batches": self.batches,
            "processes": trainer.world_size,
            "evaluation_modules": list(trial.circumstances.evaluation_modules),
            "circumstances": trial.circumstances.content(),
            "shared": trial.shared,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "planned_steps": planned,
        }
        return Manifest(**facts)

    def _prepare(self, directory: Path, manifest: Manifest, pl_module: pl.LightningModule) -> Manifest:
        """Create a run directory, or truncate the existing record to the step where the training resumes."""
        if self._resumed is None:
            make_directory(directory, self.overwrite)
            return manifest
        theta = manifest.layout.flatten([pl_module.get_parameter(name) for name in manifest.layout.names])
        resumed = resume(directory, manifest, self._resumed["steps"], theta, self.gradients != "auto")
        self._data.refuse_others(Run(directory))
        return resumed

    def _record(
        self, directory: Path, manifest: Manifest, pl_module: pl.LightningModule, optimizer: Optimizer, is_first: bool
    ) -> RunRecording:
        writer = RunWriter(directory, manifest)
        if is_first and manifest.examples is None and self._data.checksums is not None:
            writer.add_examples(self._data.checksums)
        interval = checkpoint_interval(self.checkpoint_every, manifest.planned_steps) if is_first else None
        return RunRecording(pl_module, optimizer, writer, manifest, interval)

    @property
    def _loader(self) -> DataLoader[Any]:
        assert self._tap is not None
        return self._tap.loader

    def _stop(self, reason: str) -> None:
        if self._averaging is not None:
            self._averaging.remove()
            self._averaging = None
        self._release()
        self._close("incomplete", reason)

    def _close(self, status: Literal["complete", "incomplete"], reason: str | None) -> None:
        if self._follower is not None:
            self.state_dict()  # for checkpoints saved after the end
            recording, self._follower = self._follower, None
            recording.close(status, reason)

    def _leaves(self, batch: Any, examples: int) -> tuple[Tensor, ...]:
        """Copy the tensors of the batch, which the training may change in place."""
        if rows_of(batch) != examples:
            raise RecordingError(
                'TrajectoryRecorder(batches="store") needs batches of tensors whose first dimension runs over the '
                f"examples; this batch of {examples} examples is different. Let the collate_fn stack tensors, or make "
                'the data set deterministic and leave out batches="store".'
            )
        if self._types is None:
            self._types = example_types(batch)
        if example_types(batch) != self._types:
            raise RecordingError(
                f"The examples of a batch are {example_types(batch)}, but those of the first batch are {self._types}. "
                "Stored batches need the same data types and shapes throughout: pad the examples, or convert them."
            )
        return tuple(leaf.clone() for leaf in tree_leaves(batch))

    def _choose_directory(self, trainer: pl.Trainer) -> Path:
        if not trainer.global_step or (self._resumed and not self._resumed["steps"]):
            self._resumed = None  # the checkpoint has no steps, or was loaded for another purpose
        elif self._resumed is None:
            raise RecordingError(
                f"The training resumes at step {trainer.global_step}, but the steps before it were not recorded. Train "
                "from the start (no ckpt_path), or resume from a checkpoint that was saved while a TrajectoryRecorder "
                "was among the Trainer's callbacks."
            )
        if self._resumed is not None:
            directory = self.root / self._resumed["run"]
        elif self.run is not None:
            directory = self.root / self.run
        elif (seed := _global_seed()) is not None:
            directory = self.root / run_name(seed)
        else:
            raise RecordingError(
                "The run has no name: call lightning.seed_everything(seed) before creating the module, with another "
                "seed for each run of the ensemble, or pass TrajectoryRecorder(run=...)."
            )
        if self._resumed is None and trainer.is_global_zero:
            checks.refuse_existing(directory, self.overwrite)
        return directory

    def _check_root_is_shared(self) -> None:
        if not self._directory.is_dir():
            raise RecordingError(
                f"{self._directory}, which the first process created, is not visible to the others. Choose a root on a "
                "file system that all machines share."
            )

    @property
    def _stores_batches(self) -> bool:
        return self.batches == "store"


def run_name(seed: int) -> str:
    """Return the default name of the run with the given seed.

    Example:
        >>> run_name(7)
        'seed-0007'
    """
    return f"seed-{seed:04d}"


def _clips_by_value(trainer: pl.Trainer) -> bool:
    return trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE


def _global_seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)
