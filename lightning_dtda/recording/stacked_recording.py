"""Many seeds recorded at once on one device, as ordinary runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_dtda.errors import CannotStackError, RecordingError
from lightning_dtda.execution.device import usable_device
from lightning_dtda.execution.fitting import fit
from lightning_dtda.recording import TrajectoryRecorder, run_name
from lightning_dtda.recording.configuration import module_configuration, training_configuration
from lightning_dtda.recording.crossed_seeds import CrossedSeeds, OrderStream, RunSeeds, seed_training
from lightning_dtda.recording.data import describe_data
from lightning_dtda.recording.extent import checkpoint_interval
from lightning_dtda.recording.first_step import first_step_of
from lightning_dtda.recording.run_recording import make_directory
from lightning_dtda.recording.seeds import MakeTraining, is_complete, record_seeds, refuse_shared
from lightning_dtda.recording.stack_writer import StackWriter, footprint
from lightning_dtda.replay import Examples, prepare_fit
from lightning_dtda.stacking.stacks import Stacks, Training
from lightning_dtda.stacking.training import Schedule, Start, Taken
from lightning_dtda.stacking.watch import Watch
from lightning_dtda.trajectory import Run, RunWriter
from lightning_dtda.trajectory.manifest import mismatch

_log = logging.getLogger(__name__)

_LARGEST = 128
"""Maximum number of runs recorded at once. Each has a thread and an open, locked file, whose number per process is
limited (256 on macOS), and with more runs most of the time goes into writing anyway."""


def record_stacked(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    seeds: Sequence[int],
    *,
    device: torch.device | str | None,
    compile: bool | None,
    finished: Callable[[int], None],
    crossed: CrossedSeeds | None = None,
) -> dict[int, str]:
    r"""Train many seeds at once and write, for each, the run that the recorder writes when its Trainer trains it.

    .. math:: \theta_{t+1}^{(s)}, \sigma_{t+1}^{(s)} =
        U_t\big(\theta_t^{(s)}, \sigma_t^{(s)}, \nabla L_{b_t^{(s)}}(\theta_t^{(s)})\big)
        \quad \text{for all seeds } s \text{ together}

    The Trainer trains the first seed, which becomes one of the runs. Its record gives the steps: batch sizes, learning
    rates, and the number of random numbers drawn between epochs. For a second seed, the Trainer takes one step, to
    check that all this does not depend on the seed. The others start from the initial parameters and go through the
    batches of their seeds. The first training is repeated in every stack and must reproduce the Trainer's result at
    each checkpoint; otherwise the stack is discarded.

    Args:
        make: As for :func:`~lightning_dtda.record`.
        recorder: How and where to record.
        seeds: Seeds whose runs are missing.
        device: Device of stacked trainings.
        compile: Whether to use ``torch.compile``.
        finished: Function called after each seed that was trained or failed.
        crossed: What the seeds combine, if the sources of randomness have seeds of their own.

    Returns:
        Reasons of failures with the Trainer, by seed. If the first seed fails, the next one takes its place.

    Raises:
        CannotStackError: If these trainings cannot be stacked. Runs that the Trainer has recorded are kept.
        RecordingError: If another process records one of these runs, a file cannot be written, or the first two seeds
            fail with the Trainer for the same reason.
        ExecutionError: If the device does not exist.
    """
    if recorder.batches == "store":
        raise CannotStackError(
            'the recorder has batches="store", for data that differ each time they are read, but stacks record only '
            "the indices of the examples"
        )
    device = None if device is None else usable_device(device)
    watch, missing = Watch(), list(seeds)
    failures, reference = _record_reference(make, recorder, missing, watch, finished, crossed)
    if reference is None:
        return failures
    if len(missing) > 1:
        stacking = _Stacking(make, recorder, reference, watch.device if device is None else device, crossed)
        stacking.record(missing, compile, finished)
        return failures
    # one training needs no stack
    return failures | record_seeds(make, recorder, missing, finished, to_fit=0, crossed=crossed)


def _record_reference(
    make: MakeTraining,
    recorder: TrajectoryRecorder,
    missing: list[int],
    watch: Watch,
    finished: Callable[[int], None],
    crossed: CrossedSeeds | None,
) -> tuple[dict[int, str], Run | None]:
    """Record seeds with the Trainer, removing them from the missing ones, until one is complete."""

    def watched() -> Any:
        trainer, module, data = make()
        if trainer.world_size > 1:
            raise CannotStackError(f"the Trainer spreads a training over {trainer.world_size} processes")
        trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        return trainer, module, data

    failures: dict[int, str] = {}
    seeds = len(missing)
    while missing:
        to_fit, seed = len(missing), missing.pop(0)
        failures |= record_seeds(watched, recorder, [seed], finished, to_fit, (CannotStackError,), crossed)
        if is_complete(directory := recorder.root / run_name(seed)):
            return failures, Run(directory)
        refuse_shared(failures, seeds - len(missing), seeds)
    return failures, None


class _Stacking:
    """Records, in stacks, trainings like one that the Trainer has recorded.

    Args:
        make: Function that creates Trainer, module and data.
        recorder: How to record.
        reference: Run recorded with the Trainer.
        device: Device to train on.
        crossed: What the seeds combine, if the sources of randomness have seeds of their own.
    """

    def __init__(
        self,
        make: MakeTraining,
        recorder: TrajectoryRecorder,
        reference: Run,
        device: torch.device,
        crossed: CrossedSeeds | None,
    ) -> None:
        self._make = make
        self._crossed = crossed
        self._recorder = recorder
        self._reference = reference
        self._device = device
        self._interval = checkpoint_interval(recorder.checkpoint_every, reference.manifest.planned_steps)
        self._made: dict[str, Any] | None = None

    def record(self, seeds: Sequence[int], compile: bool | None, finished: Callable[[int], None]) -> None:
        """Record seeds.

        Raises:
            CannotStackError: If they cannot be stacked.
        """
        reference, manifest = self._reference, self._reference.manifest
        assert manifest.seed is not None
        _, loader, datamodule = self._begin(manifest.seed)
        examples = Examples(loader.dataset, loader.collate_fn, datamodule=datamodule)
        everything = torch.arange(manifest.configuration["dataset"]["length"])
        stacks = Stacks(reference, everything, lambda seed: self._begin(seed)[:2], examples, self._device)
        self._check_another(stacks, seeds[-1])

        @contextmanager
        def recorded(numbers: range, start: Start) -> Iterator[Callable[[Taken], None]]:
            rows = slice(1, 1 + len(numbers))  # after the reference
            writer = self._writer([seeds[number] for number in numbers], rows, stacks.schedule, start)
            try:
                yield writer.after_step
            except CannotStackError:
                writer.discard()  # keep only runs that were verified
                raise
            except BaseException as error:
                _stop(writer, error)
                raise
            writer.close("complete")

        trainings = [Training(seed, everything) for seed in seeds]
        beside = footprint(reference, self._interval)
        for numbers, _, _ in stacks.train(trainings, compile, recorded, beside, _LARGEST):
            for number in numbers:
                finished(seeds[number])

    def _begin(self, seed: int) -> tuple[pl.LightningModule, DataLoader[Any], pl.LightningDataModule | None]:
        """Run a training from setting the seed up to the creation of its loader."""
        seeds = seed_training(seed, self._crossed)
        trainer, module, data = self._make()
        loader = _loader(trainer, module, data, seed)
        if seeds is not None:
            order = OrderStream(seeds)
            order.seed_samplers(loader)
            order.take_over()
        found = {
            "module": module_configuration(module, seed),
            "dataset": describe_data(loader),
            "training": training_configuration(trainer, loader),
        }
        if self._made is None:
            # the configuration before a fit, which fills in some settings; the data must be those of the reference
            self._made = found | {"dataset": self._reference.manifest.configuration["dataset"]}
        if changes := mismatch(self._made, found):
            raise CannotStackError(
                f"the training created for seed {seed} differs from that of seed {self._reference.manifest.seed}:\n"
                f"{changes}"
            )
        return module, loader, data if isinstance(data, pl.LightningDataModule) else None

    def _seeds(self, seed: int) -> RunSeeds | None:
        return None if self._crossed is None else self._crossed.of_run(seed)

    def _check_another(self, stacks: Stacks, seed: int) -> None:
        """Take a step of another seed with the Trainer, as properties of the reference may be specific to its seed."""

        def begin(prepared: Callable[[pl.Trainer], pl.Trainer]) -> None:
            seed_training(seed, self._crossed)
            trainer, module, data = self._make()
            fit(prepared(trainer), module, data)

        with first_step_of(seed, begin, self._seeds(seed)) as run:
            if changes := mismatch(self._reference.manifest.comparable, run.manifest.comparable):
                raise CannotStackError(f"the configuration depends on the seed:\n{changes}")
            stacks.check_another(run)

    def _writer(self, seeds: Sequence[int], rows: slice, schedule: Schedule, start: Start) -> StackWriter:
        """Create the run directories and return their writer."""
        checksums = self._reference.example_checksums
        manifest = replace(self._reference.manifest, status="recording", reason=None, steps=0, examples=None)
        writers: list[RunWriter] = []
        try:
            for seed in seeds:
                directory = self._recorder.root / run_name(seed)
                make_directory(directory, overwrite=directory.exists())
                # new lists, because the writer appends to them
                apart = self._seeds(seed)
                own = replace(
                    manifest, seed=seed, seeds=None if apart is None else apart.crossed, shards=[], checkpoints=[]
                )
                writers.append(RunWriter(directory, own))
                if checksums is not None:
                    writers[-1].add_examples(checksums)
            return StackWriter(
                writers=writers,
                rows=rows,
                reference=self._reference,
                schedule=schedule,
                interval=self._interval,
                start=start,
            )
        except BaseException:  # another process may have started one of the runs, or the disk may be full
            for writer in writers:
                writer.discard()
            raise


def _stop(writer: StackWriter, error: BaseException) -> None:
    try:
        writer.close("incomplete", f"{type(error).__name__}: {error}".rstrip(": "))
    except RecordingError as failure:  # only logged: raise the error that stopped the training
        _log.error("%s", failure)


def _loader(trainer: pl.Trainer, module: pl.LightningModule, data: Any, seed: int) -> DataLoader[Any]:
    """Return the training DataLoader that the Trainer would get."""
    if isinstance(data, DataLoader):
        return data
    owner = module if data is None else data
    try:
        if data is not None:
            data.trainer = trainer  # setup may use it
        prepare_fit(owner)
        loader: DataLoader[Any] = owner.train_dataloader()
    except Exception as error:  # any error in the user's code
        raise CannotStackError(f"the data of seed {seed} cannot be loaded outside a training ({error!r})") from error
    return loader
