"""Recording of a stack of runs: their steps are collected and handed to the writers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_dtda.errors import RecordingError
from lightning_dtda.optimizers import State
from lightning_dtda.optimizers.clipping import NormClipping
from lightning_dtda.recording.shard_buffer import shard_steps, step_records
from lightning_dtda.stacking.size import Footprint
from lightning_dtda.stacking.training import Schedule, Start, Taken
from lightning_dtda.trajectory import MicroBatch, Run, RunWriter
from lightning_dtda.trajectory.writer import FILES_IN_MEMORY


class StackWriter:
    """Writes, for each training of a stack, the same files as a recorder in its Trainer.

    Args:
        writers: Writers of the runs.
        rows: Rows of the runs in the stack, which may have other rows.
        reference: A recorded run of the same ensemble, which has the same shape.
        schedule: Schedule of the steps.
        interval: Number of steps between checkpoints.
        start: Initial state of the stack.
    """

    def __init__(
        self,
        *,
        writers: Sequence[RunWriter],
        rows: slice,
        reference: Run,
        schedule: Schedule,
        interval: int,
        start: Start,
    ) -> None:
        self._writers = writers
        self._rows = rows
        self._layout = reference.layout
        self._names = reference.manifest.hyperparameters
        self._gradient_dtype = _gradient_dtype(reference)
        self._has_norms = isinstance(reference.clipping, NormClipping)
        self._schedule = schedule
        self._interval = interval
        self._capacity = shard_steps(self._layout, self._gradient_dtype)
        self._orders = start.orders[rows]
        self._buffers = {name: buffer[rows].cpu() for name, buffer in start.buffers.items()}
        # frozen parameters are only in the first checkpoint
        self._repeated = reference.checkpoint(reference.steps).buffers.keys()
        self._first, self._steps, self._examples_before = 0, 0, 0
        self._gradients: Tensor | None = None
        self._norms: list[Tensor] = []
        self._checkpoint(start.theta[rows], [], self._buffers.keys())

    def after_step(self, taken: Taken) -> None:
        """Add a step; write shards that are full and checkpoints that are due."""
        if self._gradient_dtype is not None:
            gradient = taken.gradient[self._rows]
            if self._gradients is None:
                # run by run, so the part of each writer is contiguous
                shape = len(gradient), self._capacity, self._layout.size
                self._gradients = torch.empty(shape, dtype=self._gradient_dtype, device=gradient.device)
            self._gradients[:, taken.steps - 1 - self._first] = gradient
        if self._has_norms:
            parts = taken.unclipped[self._rows].split(self._layout.sizes, -1)
            # norm of the tensors' norms, as in torch
            norms = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts], -1)
            self._norms.append(torch.linalg.vector_norm(norms, dim=-1))
        self._steps = taken.steps
        is_last = self._steps == len(self._schedule.sizes)
        if self._steps % self._interval == 0 or is_last:
            self._flush()
            self._checkpoint(
                taken.theta[self._rows],
                [{key: part[self._rows] for key, part in state.items()} for state in taken.states],
                self._repeated,
            )
        elif self._steps - self._first >= self._capacity:
            self._flush()

    def close(self, status: Literal["complete", "incomplete"], reason: str | None = None) -> None:
        """Write the remaining records and close the runs; runs that stop before their first step are deleted.

        Raises:
            RecordingError: If a file could not be written.
        """
        if status == "incomplete" and self._steps == 0:
            self.discard()
            return
        try:
            if self._steps > self._first:
                self._flush()
        finally:
            failures = []
            for writer in self._writers:
                try:
                    writer.close(status, reason)
                except RecordingError as error:  # close the others first
                    failures.append(error)
        if failures:
            raise failures[0]

    def discard(self) -> None:
        """Delete the runs."""
        for writer in self._writers:
            writer.discard()

    def _flush(self) -> None:
        """Write the steps since the last shard."""
        first, last = self._first, self._steps
        steps = range(first, last)
        sizes, clocks, of_groups = self._schedule.sizes, self._schedule.clocks, self._schedule.hyperparameters
        length = sum(sum(sizes[step]) for step in steps)
        orders = self._orders[:, self._examples_before : self._examples_before + length]
        parts = iter(orders[0].split([size for step in steps for size in sizes[step]]))
        shared = step_records(
            [
                [MicroBatch(next(parts), epoch, batch_idx, {}, global_step=step) for epoch, batch_idx in clocks[step]]
                for step in steps
            ],
            [[[float(group[name]) for name in self._names] for group in of_groups[step]] for step in steps],
            [self._schedule.divisors[step] for step in steps],
        )
        gradients = None if self._gradients is None else self._gradients[:, : last - first].cpu()
        norms = torch.stack(self._norms, 1).cpu() if self._norms else None
        for row, writer in enumerate(self._writers):
            tensors = shared | {"indices": orders[row]}
            if gradients is not None:
                tensors["gradients"] = gradients[row]
            if norms is not None:
                tensors["gradient_norms"] = norms[row]
            writer.add_shard(first, last, tensors)
        self._first, self._examples_before = last, self._examples_before + length
        self._gradients, self._norms = None, []  # new memory: the writers have not read the old one yet

    def _checkpoint(self, theta: Tensor, states: list[State], names: Collection[str]) -> None:
        parameters = self._layout.unflatten(theta.cpu())
        of_state = {f"state.{n}.{key}": part.cpu() for n, state in enumerate(states) for key, part in state.items()}
        for row, writer in enumerate(self._writers):
            tensors = {f"parameters.{name}": part[row] for name, part in parameters.items()} | {
                name: part[row] for name, part in of_state.items()
            }
            # copy: these are views of shared tensors, and the tensors of a file must not share memory
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            tensors |= {f"buffers.{name}": self._buffers[name][row] for name in names}
            writer.add_checkpoint(self._steps, tensors)


def footprint(reference: Run, interval: int) -> Footprint:
    """Return the memory that the record of a run takes while it is collected and written.

    Args:
        reference: A run of the same shape.
        interval: Number of steps between its checkpoints.
    """
    gradients = _gradient_dtype(reference)
    steps = min(shard_steps(reference.layout, gradients), interval, reference.steps)
    shard = 0 if gradients is None else steps * reference.layout.size * gradients.itemsize
    last = reference.checkpoint(reference.steps)
    tensors = [last.theta, *last.buffers.values(), *(part for state in last.states for part in state.values())]
    return Footprint(device=shard, host=FILES_IN_MEMORY * (shard + sum(tensor.nbytes for tensor in tensors)))


def _gradient_dtype(reference: Run) -> torch.dtype | None:
    name = reference.manifest.gradients
    return None if name == "none" else getattr(torch, name)
