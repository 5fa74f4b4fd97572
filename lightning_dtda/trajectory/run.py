"""One recorded training, read lazily from its directory."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.optimizers import UPDATES, Clipping, GroupedUpdate, Hyperparameters, State, clipping
from lightning_dtda.trajectory.example_checksums import ExampleChecksums
from lightning_dtda.trajectory.layout import ParameterLayout
from lightning_dtda.trajectory.manifest import AVERAGE, Manifest
from lightning_dtda.trajectory.schema import FLOATS, check_tensors
from lightning_dtda.trajectory.shard import MicroBatch, Shard
from lightning_dtda.trajectory.storage import check_size, read_tensors

_SAME_AVERAGE = 1e-3
"""Largest relative distance of an average from what is rebuilt: it was computed step by step, perhaps on a GPU."""


@dataclass(frozen=True)
class Checkpoint:
    """Parameters and optimizer state after a number of steps.

    Args:
        step: t, the number of optimizer steps taken.
        theta: Parameters ``(P,)``.
        states: Optimizer state of each parameter group; empty if the optimizer had none yet.
        buffers: Buffers and frozen parameters by name.
    """

    step: int
    theta: Tensor
    states: list[State]
    buffers: dict[str, Tensor]


class Run:
    """One seeded training on disk: what happened at each of its T optimizer steps.

    Files are read when they are needed and checked against the manifest at that time. A training with several processes
    is one run: each step has the micro-batches of all processes, those of the first process first.

    Args:
        path: Run directory.

    Raises:
        TrajectoryError: If the manifest cannot be read, or files are missing or truncated.
    """

    def __init__(self, path: str | Path, _process: int = 0) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        if _process and self.manifest.processes != 1:  # a process has no processes of its own, without end
            raise TrajectoryError(f"{self.path} is damaged: it is not the record of one process. Record the run again.")
        for entry in self.manifest.files:
            check_size(self.path, entry)
        self.processes = (self, *(Run(process_path(self.path, n), n) for n in range(1, self.manifest.processes)))
        # the processes of a killed training may have recorded different numbers of steps
        self._checkpoints = {entry["step"]: entry for entry in self.manifest.checkpoints if entry["step"] <= self.steps}
        self._shard_starts = [entry["first_step"] for entry in self.manifest.shards]
        self._on_disk = self.manifest  # a hypothetical run changes the other
        self._shard: tuple[int, Shard] | None = None
        self._cursor: tuple[int, Tensor, list[State]] | None = None
        self._has_compared_average = False

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, steps={self.steps}, status={self.manifest.status!r})"

    @property
    def name(self) -> str:
        """Name of the run and of its directory."""
        return self.path.name

    @property
    def steps(self) -> int:
        """T, the number of recorded optimizer steps."""
        return min(process.manifest.steps for process in self.processes)

    @property
    def checksum(self) -> int:
        """Checksum of the trained model, which distinguishes the run from another one recorded under the same name."""
        if not self.manifest.checkpoints:
            raise TrajectoryError(f"{self.path} ended before its initial parameters were written. Record it again.")
        return self.manifest.checkpoints[-1]["crc32"]

    @property
    def example_checksums(self) -> ExampleChecksums | None:
        """Checksums of the examples that the run was trained on; ``None`` if batches were stored.

        Raises:
            TrajectoryError: If the file of the checksums is damaged.
        """
        if self.manifest.examples is None:
            return None
        length = self.manifest.configuration["dataset"]["length"]
        return ExampleChecksums.of(length, read_tensors(self.path, self.manifest.examples))

    @property
    def complete(self) -> bool:
        """Whether the training ended normally."""
        return all(process.manifest.status == "complete" for process in self.processes)

    @property
    def layout(self) -> ParameterLayout:
        """Position of each parameter in the flat vectors."""
        return self.manifest.layout

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps t whose parameters and optimizer state are on disk, in ascending order, starting at 0."""
        return sorted(self._checkpoints)

    @property
    def has_exact_gradients(self) -> bool:
        """Whether recorded gradients have the precision of the parameters, so theta_t can be rebuilt from them."""
        return self.manifest.gradients == self.manifest.dtype

    @property
    def clipping(self) -> Clipping:
        """Clipping that the Trainer applied to gradients before the optimizer received them."""
        training = self.manifest.configuration["training"]
        return clipping(training["gradient_clip_val"], training["gradient_clip_algorithm"])

    @property
    def update(self) -> GroupedUpdate:
        """Update of the optimizer, over all of its parameter groups."""
        layout = self.layout
        parameters = layout.group_parameters(self.manifest.torch_dtype)
        if (update := UPDATES.get(self.manifest.optimizer)) is None:
            raise TrajectoryError(
                f"{self.path} was trained with {self.manifest.optimizer}, whose update is not known here. Add it to "
                "lightning_dtda.optimizers.UPDATES, as when the run was recorded."
            )
        return GroupedUpdate(update, layout.group_slices, parameters)

    def has_theta(self, step: int) -> bool:
        """Return whether theta_t can be read or rebuilt from the record alone."""
        return step in self._checkpoints or self.has_exact_gradients

    def theta(self, step: int) -> dict[str, Tensor]:
        """Return the parameters after ``step`` optimizer steps, by name.

        They are read from a checkpoint if there is one, else rebuilt from the last earlier checkpoint with the recorded
        gradients.

        Args:
            step: t, from 0 (initialisation) to T (the trained model).

        Raises:
            TrajectoryError: If there is no checkpoint, and no record of the gradients in the parameters' precision. In
                this case ``lightning_dtda.replay.Replay`` rebuilds the parameters by recomputing the gradients.
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
        return theta.clone()  # the caller may change it, which must not affect the next one

    def checkpoint(self, step: int) -> Checkpoint:
        """Read the checkpoint after ``step`` optimizer steps, which must be one of :attr:`checkpoint_steps`."""
        if step not in self._checkpoints:
            raise TrajectoryError(f"{self.path} has no checkpoint at step {step}. Record the run again.")
        tensors = read_tensors(self.path, self._checkpoints[step])
        where = f"The checkpoint of {self.path} at step {step}"
        theta = self._theta(tensors, where)
        if step:
            states = self._states(tensors, theta, where)
        else:  # the initial state follows from the first step's hyperparameters
            states = self.update.initial_states(theta, self.hyperparameters(0)) if self.steps else []
        return Checkpoint(step, theta, states, _below("buffers.", tensors))

    def average(self) -> Checkpoint | None:
        """Read the averaged parameters that the training ended with; ``None`` if it ended with its last ones."""
        if self.manifest.average is None:
            return None
        tensors = read_tensors(self.path, self.manifest.average)
        theta = self._theta(tensors, f"The average of {self.path}", FLOATS)  # perhaps less precise than the parameters
        is_precise = theta.dtype in (torch.float64, torch.float32)  # else it may be far from the sum, by rounding
        if self.has_exact_gradients and is_precise and not self._has_compared_average:
            rebuilt = torch.stack([c * self.theta_vector(t).double() for t, c in self.averaged_steps.items()]).sum(0)
            if not (rebuilt - theta).norm() <= _SAME_AVERAGE * rebuilt.norm():  # NaN is not the same
                raise TrajectoryError(
                    f"{self.path}: {AVERAGE} is not the average of the recorded parameters. Record the run again."
                )
            self._has_compared_average = True
        return Checkpoint(self.steps, theta, [], _below("buffers.", tensors))

    def _theta(self, tensors: dict[str, Tensor], where: str, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
        layout, dtypes = self.layout, dtypes or (self.manifest.torch_dtype,)
        names = [f"parameters.{name}" for name in layout.names]
        check_tensors(tensors, {n: (dtypes, shape) for n, shape in zip(names, layout.shapes, strict=True)}, where)
        return layout.flatten([tensors[name] for name in names])

    def _states(self, tensors: dict[str, Tensor], theta: Tensor, where: str) -> list[State]:
        """Return the optimizer state of each parameter group, which has the sizes of the initial state."""
        first = self.manifest.configuration["hyperparameters"]
        settings = [
            {name: values[group] for name, values in first.items()} | options
            for group, options in enumerate(self.manifest.options)
        ]
        states = self.update.initial_states(theta.to("meta"), settings)
        expected = {
            # torch keeps some numbers in another data type than the parameters
            f"state.{group}.{key}": (FLOATS if part.numel() == 1 else (part.dtype,), tuple(part.shape))
            for group, state in enumerate(states)
            for key, part in state.items()
        }
        check_tensors(tensors, expected, where)
        return [{key: tensors[f"state.{group}.{key}"] for key in state} for group, state in enumerate(states)]

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
        """Return the micro-batches whose gradients the step applied, in order."""
        micro_batches = []
        for number, process in enumerate(self.processes):
            shard, row = process._locate(step)
            micro_batches += [replace(micro_batch, process=number) for micro_batch in shard.micro_batches(row)]
        return micro_batches

    def batch_indices(self, step: int) -> Tensor:
        """Return the data set indices of the examples in a step ``(B,)``, over all micro-batches in order."""
        return torch.cat([micro_batch.indices for micro_batch in self.micro_batches(step)])

    def coefficients(self, step: int) -> Tensor:
        """Return the coefficient of each example's loss in the step's loss ``(B,)``, float64.

        This is 1 divided by the size of the example's micro-batch, by ``accumulate_grad_batches`` (Lightning divides by
        it even if the last group of an epoch has fewer micro-batches) and by the number of processes (their gradients
        are averaged).
        """
        divisor = self.accumulation(step) * len(self.processes)
        sizes = torch.tensor([len(micro_batch.indices) for micro_batch in self.micro_batches(step)])
        return (1 / (divisor * sizes.double())).repeat_interleave(sizes)

    def accumulation(self, step: int) -> int:
        """Return ``accumulate_grad_batches``, the number that Lightning divided the step's losses by."""
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
                f'{self.path} was recorded without gradients. Record with gradients="float32", or recompute them '
                "from its module and data (lightning_dtda.replay.Replay)."
            )
        return shard.tensors["gradients"][row].clone()

    def gradient_norm(self, step: int) -> Tensor:
        """Return the Euclidean norm of the gradient before it was clipped by norm, a scalar.

        Raises:
            TrajectoryError: If gradients were not clipped by norm, so that no norms were recorded.
        """
        shard, row = self._locate(step)
        if "gradient_norms" not in shard.tensors:
            raise TrajectoryError(f"{self.path} has no gradient norms: its gradients were not clipped by norm.")
        return shard.tensors["gradient_norms"][row]

    def _locate(self, step: int) -> tuple[Shard, int]:
        """Return the shard that holds the step's record, reading it if necessary, and the step's row in it."""
        if not 0 <= step < self.steps:
            raise TrajectoryError(f"{self.path} has no record of step {step}; it has {self.steps} steps, 0 first.")
        number = bisect_right(self._shard_starts, step) - 1
        if self._shard is None or self._shard[0] != number:
            self._shard = (number, Shard(self.path, self._on_disk, number))
        return self._shard[1], step - self._shard_starts[number]


def process_path(path: Path, number: int) -> Path:
    """Return the directory in which one of the processes of a run records."""
    return path / f"process-{number}" if number else path


def changed_examples(first: Run, second: Run) -> list[int]:
    """Return the training examples that differ between two runs, among those with a checksum in both."""
    entries = first.manifest.examples, second.manifest.examples
    # usually the files are identical, and nothing needs to be read
    if entries[0] is None or entries[1] is None or entries[0]["crc32"] == entries[1]["crc32"]:
        return []
    checksums, others = first.example_checksums, second.example_checksums
    return [] if checksums is None or others is None else checksums.changed(others)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, with the prefix removed."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
