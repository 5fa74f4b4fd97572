"""Collects the records of consecutive steps until there are enough for a file."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.recording.step_watch import TakenStep
from lightning_dtda.trajectory import MicroBatch, ParameterLayout
from lightning_dtda.trajectory.shard import LEAF, RNG_MICRO_BATCHES, RNG_SIZES, RNG_STATES

SHARD_BYTES = 64 * 2**20
"""Size in bytes of the gradients or batches in a shard, which bounds the memory and what a killed training loses."""

_SHARD_STEPS = 512
"""Number of steps in a shard without gradients, whose records are small."""


@dataclass
class ShardBuffer:
    """The records of steps since ``first_step``; ``take`` returns them as a shard.

    Memory for gradients is reused once its shard is on disk: allocating new memory costs more than writing to it,
    because the system clears every page first.

    Args:
        layout: Layout of the recorded parameters.
        gradients: Data type of the recorded gradients, or ``None`` to record none.
        device: Device of the gradients; they stay there until the shard is full.
        first_step: Next step to record.
    """

    layout: ParameterLayout
    gradients: torch.dtype | None
    device: torch.device
    first_step: int = 0
    _steps: list[TakenStep] = field(default_factory=list)
    _leaf_bytes: int = 0
    _gradients: Tensor | None = None
    _spare: queue.SimpleQueue[Tensor] = field(default_factory=queue.SimpleQueue)
    _norm: Tensor | None = None
    _norms: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether it is time to write a shard."""
        return len(self) >= self.capacity or self._leaf_bytes >= SHARD_BYTES

    @cached_property
    def capacity(self) -> int:
        """Number of steps in a full shard, unless stored batches fill it earlier."""
        return shard_steps(self.layout, self.gradients)

    def put_gradient(self, gradients: list[Tensor]) -> None:
        """Copy the gradient that the optimizer is about to apply; ``append`` completes the step."""
        if self.gradients is None:
            return
        if self._gradients is None:
            self._gradients = self._host_memory() if self.device.type == "cpu" else self._memory(device=self.device)
        row = self._gradients[len(self)]
        if gradients[0].dtype == self.gradients:
            self.layout.flatten(gradients, out=row)
        else:  # torch.cat would first create a vector in the precision of the gradients
            for part, gradient in zip(row.split(self.layout.sizes), gradients, strict=True):
                part.copy_(gradient.reshape(-1))

    def put_norm(self, gradients: list[Tensor]) -> None:
        """Note the norm of the gradient that is about to be clipped by norm."""
        # norm of the tensors' norms, as in torch; it stays on the device, because reading it would wait for the device
        self._norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))

    def append(self, step: TakenStep) -> None:
        """Add the record of one step."""
        self._steps.append(step)
        self._leaf_bytes += sum(leaf.nbytes for micro_batch in step.micro_batches for leaf in micro_batch.leaves)
        if self._norm is not None:
            self._norms.append(self._norm)
            self._norm = None

    def take(self) -> tuple[int, int, dict[str, Tensor], Callable[[], None] | None]:
        """Return first step, last step and tensors of the shard, and start the next one.

        The fourth element must be called, from any thread, when the tensors are no longer needed; it is ``None`` if
        there is no memory to release.
        """
        first, steps = self.first_step, len(self)
        tensors = step_records(
            [step.micro_batches for step in self._steps],
            [step.hyperparameters for step in self._steps],
            [step.accumulate_grad_batches for step in self._steps],
        )
        release = None
        if self._gradients is not None:
            host = self._gradients
            if self.device.type == "cpu":
                self._gradients = None
            else:
                host = self._host_memory()
                host[:steps].copy_(self._gradients[:steps])
            tensors["gradients"] = host[:steps]
            release = partial(self._spare.put, host)
        if self._norms:
            tensors["gradient_norms"] = torch.stack(self._norms).cpu()
        self.first_step += steps
        self._steps, self._norms = [], []
        self._leaf_bytes = 0
        return first, first + steps, tensors, release

    def _host_memory(self) -> Tensor:
        """Return memory for the gradients of a shard that no shard waiting to be written uses."""
        try:
            return self._spare.get_nowait()
        except queue.Empty:
            return self._memory(pin_memory=self.device.type == "cuda")

    def _memory(self, **where: Any) -> Tensor:
        return torch.empty((self.capacity, self.layout.size), dtype=self.gradients, **where)


def shard_steps(layout: ParameterLayout, gradients: torch.dtype | None) -> int:
    """Return the number of steps in a full shard, unless stored batches fill it earlier.

    Args:
        layout: Layout of the recorded parameters.
        gradients: Data type of the recorded gradients, or ``None``.
    """
    if gradients is None:
        return _SHARD_STEPS
    return max(1, min(_SHARD_STEPS, SHARD_BYTES // (layout.size * gradients.itemsize)))


def step_records(
    micro_batches: Sequence[Sequence[MicroBatch]],
    hyperparameters: Sequence[Sequence[Sequence[float]]],
    accumulations: Sequence[int],
) -> dict[str, Tensor]:
    """Return the records of each step in a shard, except for the gradients.

    Args:
        micro_batches: Micro-batches of each step.
        hyperparameters: Numeric hyperparameters of each parameter group at each step.
        accumulations: ``accumulate_grad_batches`` of each step, the number that Lightning divided the losses by.
    """
    flat = [micro_batch for step in micro_batches for micro_batch in step]
    return {
        "indices": torch.cat([micro_batch.indices for micro_batch in flat]),
        "micro_batch_sizes": torch.tensor([len(micro_batch.indices) for micro_batch in flat]),
        "micro_batches": torch.tensor([len(step) for step in micro_batches]),
        "epochs": torch.tensor([micro_batch.epoch for micro_batch in flat]),
        "batch_idx": torch.tensor([micro_batch.batch_idx for micro_batch in flat]),
        "global_steps": torch.tensor([micro_batch.global_step for micro_batch in flat]),
        "accumulate_grad_batches": torch.tensor(accumulations),
        "hyperparameters": torch.tensor(hyperparameters, dtype=torch.float64),
        **_rng_tensors(flat),
        **{f"{LEAF}{n}": torch.cat(parts).cpu() for n, parts in enumerate(zip(*(m.leaves for m in flat), strict=True))},
    }


def _rng_tensors(micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in sorted({name for micro_batch in micro_batches for name in micro_batch.rng_states}):
        drawing = [number for number, micro_batch in enumerate(micro_batches) if name in micro_batch.rng_states]
        states = [micro_batches[number].rng_states[name] for number in drawing]
        tensors[f"{RNG_MICRO_BATCHES}{name}"] = torch.tensor(drawing)
        tensors[f"{RNG_SIZES}{name}"] = torch.tensor([len(state) for state in states])
        tensors[f"{RNG_STATES}{name}"] = torch.cat(states)
    return tensors
