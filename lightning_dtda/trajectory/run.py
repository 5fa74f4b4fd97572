"""One recorded training, read lazily from its directory."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.optimizers import UPDATES, Clipping, GroupedUpdate, Hyperparameters, State, clipping
from lightning_dtda.trajectory.example_checksums import ExampleChecksums
from lightning_dtda.trajectory.layout import ParameterLayout
from lightning_dtda.trajectory.manifest import Manifest
from lightning_dtda.trajectory.storage import check_size, read_tensors

LEAF = "leaves."
"""Prefix of a shard's entries for stored batches, one for each tensor in them."""

RNG_STATES, RNG_SIZES, RNG_MICRO_BATCHES = "rng_states.", "rng_sizes.", "rng_micro_batches."
"""Prefixes of a shard's entries for each random number generator: its states one after the other, how many bytes each
has, and before which micro-batches it was in them."""


@dataclass(frozen=True)
class Checkpoint:
    """Parameters and optimizer state after a number of steps.

    Args:
        step: t, the number of optimizer steps taken.
        theta: Parameters ``(P,)``.
        states: Optimizer state of each parameter group; empty where the optimizer has had none yet.
        buffers: Buffers and frozen parameters by name.
    """

    step: int
    theta: Tensor
    states: list[State]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of a step.

    Args:
        indices: Data set indices in order ``(B,)``.
        epoch: ``trainer.current_epoch``.
        batch_idx: As ``training_step`` got it.
        rng_states: States, before the batch was moved to the module, of the random number generators that the pass drew
            from, by name: torch's are ``cpu`` and ``cuda``.
        leaves: The tensors of the batch, each ``(B, ...)``; none where batches were not stored.
        process: The process that made the pass, 0 where there was one.
        global_step: ``trainer.global_step``, which also counts steps that were not taken.
    """

    indices: Tensor
    epoch: int
    batch_idx: int
    rng_states: dict[str, Tensor]
    leaves: tuple[Tensor, ...] = ()
    process: int = 0
    global_step: int = 0


class Run:
    """One seeded training on disk: what happened at each of its T optimizer steps.

    Files are read when they are needed and checked against the manifest then. A training that was spread over several
    processes is one run: each step has the micro-batches of all of them, those of the first process first.

    Args:
        path: The run directory.

    Raises:
        TrajectoryError: If it holds no readable manifest, or files are missing or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        for entry in self.manifest.files:
            check_size(self.path, entry)
        self.processes = (self, *(Run(process_path(self.path, n)) for n in range(1, self.manifest.processes)))
        # of a killed training, the processes may have left different numbers of steps
        self._checkpoints = {entry["step"]: entry for entry in self.manifest.checkpoints if entry["step"] <= self.steps}
        self._shard_starts = [entry["first_step"] for entry in self.manifest.shards]
        self._shard: tuple[int, _Shard] | None = None
        self._cursor: tuple[int, Tensor, list[State]] | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, steps={self.steps}, status={self.manifest.status!r})"

    @property
    def name(self) -> str:
        """The run's name, that of its directory."""
        return self.path.name

    @property
    def steps(self) -> int:
        """T, the number of recorded optimizer steps."""
        return min(process.manifest.steps for process in self.processes)

    @property
    def checksum(self) -> int:
        """Checksum of the trained model: tells a run from another one that was recorded under its name."""
        return max(self.manifest.checkpoints, key=lambda entry: entry["step"])["crc32"]

    @property
    def example_checksums(self) -> ExampleChecksums | None:
        """Checksums of the examples that the run was trained on; ``None`` where batches were stored.

        Raises:
            TrajectoryError: If their file is damaged.
        """
        if self.manifest.examples is None:
            return None
        length = self.manifest.configuration["dataset"]["length"]
        return ExampleChecksums.of(length, read_tensors(self.path, self.manifest.examples))

    @property
    def complete(self) -> bool:
        """Whether the training came to its regular end."""
        return all(process.manifest.status == "complete" for process in self.processes)

    @property
    def layout(self) -> ParameterLayout:
        """Where each parameter lies in the flat vectors."""
        return self.manifest.layout

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps t at which parameters and optimizer state are on disk, ascending, 0 first."""
        return sorted(self._checkpoints)

    @property
    def has_exact_gradients(self) -> bool:
        """Whether recorded gradients have the parameters' precision, so that theta_t can be rebuilt from them."""
        return self.manifest.gradients == self.manifest.dtype

    @property
    def clipping(self) -> Clipping:
        """What the Trainer did to gradients before the optimizer got them."""
        training = self.manifest.configuration["training"]
        return clipping(training["gradient_clip_val"], training["gradient_clip_algorithm"])

    @property
    def update(self) -> GroupedUpdate:
        """The optimizer's update over its parameter groups."""
        layout = self.layout
        parameters = layout.group_parameters(self.manifest.torch_dtype)
        return GroupedUpdate(UPDATES[self.manifest.optimizer], layout.group_slices, parameters)

    def has_theta(self, step: int) -> bool:
        """Whether theta_t can be had from the record alone."""
        return step in self._checkpoints or self.has_exact_gradients

    def theta(self, step: int) -> dict[str, Tensor]:
        """Return the parameters after ``step`` optimizer steps, by name.

        Read where there is a checkpoint, else rebuilt from the nearest earlier one with the recorded gradients.

        Args:
            step: t, from 0 (initialisation) to T (the trained model).

        Raises:
            TrajectoryError: If there is neither a checkpoint nor a gradient record of the parameters' precision;
                ``lightning_dtda.replay.Replay`` rebuilds those by computing the gradients anew.
        """
        return self.layout.unflatten(self.theta_vector(step))

    def theta_vector(self, step: int) -> Tensor:
        """Return the parameters after ``step`` optimizer steps as one vector ``(P,)``; see :meth:`theta`."""
        if not 0 <= step <= self.steps:
            raise TrajectoryError(f"{self.path} has no step {step}; it has steps 0 to {self.steps}.")
        if not self._checkpoints:
            raise TrajectoryError(f"{self.path} ended before its initial parameters were written. Record it again.")
        if step in self._checkpoints:
            return self.checkpoint(step).theta
        if not self.has_theta(step):
            raise TrajectoryError(
                f"{self.path} holds no checkpoint at step {step} and no gradients in {self.manifest.dtype} to rebuild "
                'it from. Record with gradients="float32" or checkpoint_every="all", or replay the run with its '
                "module and data (lightning_dtda.replay.Replay)."
            )
        start = max(earlier for earlier in self._checkpoints if earlier <= step)
        if self._cursor is None or not start <= self._cursor[0] <= step:
            checkpoint = self.checkpoint(start)
            self._cursor = (start, checkpoint.theta, checkpoint.states)
        t, theta, states = self._cursor
        update = self.update
        for t in range(t, step):  # noqa: B020 - the cursor moves on
            theta, states = update.step(theta, states, self.gradient_vector(t), self.hyperparameters(t), step=t)
        self._cursor = (step, theta, states)
        return theta.clone()  # what the caller does to it must not get into the next one

    def checkpoint(self, step: int) -> Checkpoint:
        """Read the checkpoint after ``step`` optimizer steps, one of :attr:`checkpoint_steps`."""
        tensors = read_tensors(self.path, self._checkpoints[step])
        layout = self.layout
        try:
            theta = layout.flatten([tensors[f"parameters.{name}"] for name in layout.names])
        except KeyError as error:
            raise TrajectoryError(f"The checkpoint of {self.path} at step {step} lacks {error}.") from None
        states: list[State] = [{} for _ in layout.group_lengths]
        for name, tensor in _below("state.", tensors).items():
            group, key = name.split(".", 1)
            states[int(group)][key] = tensor
        if step == 0 and self.steps:  # what state there is at the start, the first step's hyperparameters tell
            states = self.update.initial_states(theta, self.hyperparameters(0))
        return Checkpoint(step, theta, states, _below("buffers.", tensors))

    def average(self) -> Checkpoint | None:
        """Read the averaged parameters that the training ended with; ``None`` where it ended with its last ones."""
        if self.manifest.average is None:
            return None
        tensors = read_tensors(self.path, self.manifest.average)
        theta = self.layout.flatten([tensors[f"parameters.{name}"] for name in self.layout.names])
        return Checkpoint(self.steps, theta, [], _below("buffers.", tensors))

    @property
    def averaged_steps(self) -> dict[int, float]:
        r"""The coefficients :math:`c_t` of the average :math:`\sum_t c_t \theta_t` by step."""
        average = self.manifest.average
        if average is None:
            return {}
        found: dict[int, float] = {}
        for step, coefficient in zip(average["steps"], average["coefficients"], strict=True):
            found[step] = found.get(step, 0.0) + coefficient
        return found

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Return the forward passes whose gradients the step applied, in order."""
        micro_batches = []
        for number, process in enumerate(self.processes):
            shard, row = process._locate(step)
            micro_batches += [replace(micro_batch, process=number) for micro_batch in shard.micro_batches(row)]
        return micro_batches

    def batch_indices(self, step: int) -> Tensor:
        """Return the data set indices of the examples in a step, all micro-batches in order ``(B,)``."""
        return torch.cat([micro_batch.indices for micro_batch in self.micro_batches(step)])

    def coefficients(self, step: int) -> Tensor:
        """Return what each example's loss is multiplied with in the step's loss ``(B,)``, float64.

        One over the size of its micro-batch times ``accumulate_grad_batches``: Lightning divides by that number even
        where the last group of an epoch has fewer micro-batches. And over the number of processes, whose gradients are
        averaged.
        """
        divisor = self.accumulation(step) * len(self.processes)
        sizes = torch.tensor([len(micro_batch.indices) for micro_batch in self.micro_batches(step)])
        return (1 / (divisor * sizes.double())).repeat_interleave(sizes)

    def accumulation(self, step: int) -> int:
        """Return what Lightning divided the losses of the step's micro-batches by, ``accumulate_grad_batches``."""
        shard, row = self._locate(step)
        return int(shard.tensors["accumulate_grad_batches"][row])

    def learning_rates(self, step: int) -> Tensor:
        """Return the learning rate of each parameter group at the step ``(groups,)``, float64."""
        shard, row = self._locate(step)
        return shard.tensors["hyperparameters"][row, :, self.manifest.hyperparameters.index("lr")]

    def hyperparameters(self, step: int) -> list[Hyperparameters]:
        """Return each parameter group's hyperparameters at the step, by torch's names."""
        shard, row = self._locate(step)
        names = self.manifest.hyperparameters
        return [
            dict(zip(names, values.tolist(), strict=True)) | options
            for values, options in zip(shard.tensors["hyperparameters"][row], self.manifest.options, strict=True)
        ]

    def gradient(self, step: int) -> dict[str, Tensor]:
        """Return the gradient that the optimizer applied at the step (accumulated, unscaled, clipped), by name.

        Raises:
            TrajectoryError: If the run was recorded without gradients.
        """
        return self.layout.unflatten(self.gradient_vector(step))

    def gradient_vector(self, step: int) -> Tensor:
        """Return the applied gradient as one vector ``(P,)`` in its stored precision; see :meth:`gradient`."""
        shard, row = self._locate(step)
        if "gradients" not in shard.tensors:
            raise TrajectoryError(
                f'{self.path} was recorded without gradients. Record with gradients="float32", or compute them '
                "anew from its module and data (lightning_dtda.replay.Replay)."
            )
        return shard.tensors["gradients"][row].clone()

    def gradient_norm(self, step: int) -> Tensor:
        """Return the gradient's Euclidean norm before it was clipped by its norm, a scalar.

        Raises:
            TrajectoryError: If the run was not clipped by norm, and nothing recorded.
        """
        shard, row = self._locate(step)
        if "gradient_norms" not in shard.tensors:
            raise TrajectoryError(f"{self.path} has no gradient norms: its gradients were not clipped by norm.")
        return shard.tensors["gradient_norms"][row]

    def _locate(self, step: int) -> tuple[_Shard, int]:
        """Return the shard that holds the step's record, read if need be, and the step's row in it."""
        if not 0 <= step < self.steps:
            raise TrajectoryError(f"{self.path} has no record of step {step}; it has {self.steps} steps, 0 first.")
        number = bisect_right(self._shard_starts, step) - 1
        if self._shard is None or self._shard[0] != number:
            self._shard = (number, _Shard(read_tensors(self.path, self.manifest.shards[number])))
        return self._shard[1], step - self._shard_starts[number]


def process_path(path: Path, number: int) -> Path:
    """Return the directory of a run in which one of its processes records."""
    return path / f"process-{number}" if number else path


def changed_examples(first: Run, second: Run) -> list[int]:
    """Return the training examples that differ between two runs, as far as both have a checksum of them."""
    entries = first.manifest.examples, second.manifest.examples
    # mostly the same file: nothing has to be read
    if entries[0] is None or entries[1] is None or entries[0]["crc32"] == entries[1]["crc32"]:
        return []
    checksums, others = first.example_checksums, second.example_checksums
    return [] if checksums is None or others is None else checksums.changed(others)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Shard:
    """The records of consecutive steps; ragged data lie one after the other with their lengths beside them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        sizes = tensors["micro_batch_sizes"].tolist()
        self._indices = torch.split(tensors["indices"], sizes)
        leaves = sorted((key for key in tensors if key.startswith(LEAF)), key=lambda key: int(key.removeprefix(LEAF)))
        self._leaves = list(zip(*(torch.split(tensors[key], sizes) for key in leaves), strict=True))
        self._first_micro_batch = [0, *tensors["micro_batches"].cumsum(0).tolist()]
        self._rng: dict[int, dict[str, Tensor]] = {}
        for key in tensors:
            if key.startswith(RNG_STATES):
                name = key.removeprefix(RNG_STATES)
                states = torch.split(tensors[key], tensors[f"{RNG_SIZES}{name}"].tolist())
                for micro_batch, state in zip(tensors[f"{RNG_MICRO_BATCHES}{name}"].tolist(), states, strict=True):
                    # a copy: torch.set_rng_state crashes on a view into a larger tensor
                    self._rng.setdefault(micro_batch, {})[name] = state.clone()

    def micro_batches(self, row: int) -> list[MicroBatch]:
        tensors: dict[str, Any] = self.tensors
        return [
            MicroBatch(
                indices=self._indices[m],
                epoch=int(tensors["epochs"][m]),
                batch_idx=int(tensors["batch_idx"][m]),
                global_step=int(tensors["global_steps"][m]),
                rng_states=self._rng.get(m, {}),
                leaves=self._leaves[m] if self._leaves else (),
            )
            for m in range(self._first_micro_batch[row], self._first_micro_batch[row + 1])
        ]
