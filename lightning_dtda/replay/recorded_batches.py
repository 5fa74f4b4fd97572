"""The batches of recorded steps, made again from the examples or from what was stored of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.replay.batches import stack_leaves
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import MicroBatchInputs, StepBatch
from lightning_dtda.trajectory import MicroBatch, Run


class RecordedBatches:
    """The batches that several runs of equal shape were trained on.

    Args:
        runs: The runs.
        examples: Training examples.
        device: Device of the batches.
    """

    def __init__(self, runs: Sequence[Run], examples: Examples, device: torch.device) -> None:
        self._runs, self._examples, self._device = runs, examples, device
        self._are_stored = runs[0].manifest.batches == "store"
        self._ahead: Iterator[tuple[int, list[list[Any]]]] | None = None

    def of(self, step: int) -> StepBatch:
        """Return the micro-batches of a step; their batches are made on demand."""
        micro_batches = [run.micro_batches(step) for run in self._runs]
        ready = self._read_ahead(step)
        passes = [
            [
                self._inputs(run, step, micro_batch, ready[number][part] if ready else None)
                for part, micro_batch in enumerate(of_run)
            ]
            for number, (run, of_run) in enumerate(zip(self._runs, micro_batches, strict=True))
        ]
        indices = [run.batch_indices(step) for run in self._runs]
        return StepBatch.of(indices, passes, self._device, lambda part: self._leaves(micro_batches, passes, part))

    def expect(self, steps: Sequence[int]) -> None:
        """Have DataLoader workers, if the training used them, read the batches of these steps ahead, in this order."""
        if self._are_stored or not self._examples.reads_ahead:
            self._ahead = None
            return
        lists = [
            [[micro_batch.indices.tolist() for micro_batch in run.micro_batches(step)] for run in self._runs]
            for step in steps
        ]
        batches = self._examples.batches([indices for step in lists for run in step for indices in run])
        self._ahead = (
            (step, [[next(batches) for _ in run] for run in of_step])
            for step, of_step in zip(steps, lists, strict=True)
        )

    def _read_ahead(self, step: int) -> list[list[Any]] | None:
        if self._ahead is None:
            return None
        expected, batches = next(self._ahead, (None, None))
        if expected != step:
            self._ahead = None
            return None
        return batches

    def _inputs(self, run: Run, step: int, micro_batch: MicroBatch, ready: Any) -> MicroBatchInputs:
        def make(rows: Sequence[int]) -> Any:
            if self._are_stored:
                return self._examples.restore([leaf[list(rows)] for leaf in micro_batch.leaves])
            if ready is not None and isinstance(rows, range):
                return ready
            return self._examples.collated(micro_batch.indices[list(rows)].tolist())

        time = Time(micro_batch.epoch, micro_batch.global_step, micro_batch.batch_idx, run.hyperparameters(step))
        factor = 1 / (run.accumulation(step) * len(run.processes))
        return MicroBatchInputs(
            len(micro_batch.indices), time, micro_batch.rng_states, make, factor, micro_batch.process == 0
        )

    def _leaves(
        self, micro_batches: list[list[MicroBatch]], passes: list[list[MicroBatchInputs]], part: int
    ) -> list[Tensor] | None:
        """Return the tensors of micro-batch number ``part`` of all runs; ``None`` if they cannot be stacked."""
        if len({len(of_run) for of_run in passes}) > 1 or len({of_run[part].examples for of_run in passes}) > 1:
            return None
        if not self._are_stored:
            found = self._examples.tensors(torch.stack([of_run[part].indices for of_run in micro_batches]))
            if found is not None:
                return found
        return stack_leaves([of_run[part].batch() for of_run in passes])
