"""Hypothetical runs that repeat the recorded steps of a shorter run, to estimate costs."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from lightning_dtda.trajectory.run import Checkpoint, Run
from lightning_dtda.trajectory.shard import MicroBatch, Shard


class ProlongedRun(Run):
    """A run with more or fewer steps than were recorded, which repeats the recorded steps.

    It has the steps, checkpoints and sizes of the full run, so replaying any part of it costs the same as in the full
    run. The results are meaningless, and replays do not agree with the record beyond the recorded steps.

    Args:
        run: Recorded run.
        steps: T, the number of steps.
        interval: Number of steps between checkpoints.
        examples: N, the number of training examples. Indices in a batch are taken modulo N.
    """

    _steps: int | None = None

    def __init__(self, run: Run, steps: int, interval: int, examples: int) -> None:
        super().__init__(run.path)
        self._recorded = super().steps
        self._recorded_checkpoints = super().checkpoint_steps
        self._steps = steps
        self.interval = interval
        configuration = self.manifest.configuration
        data = configuration["dataset"] | {"length": examples, "fingerprint": None}
        self.manifest = replace(self.manifest, configuration=configuration | {"dataset": data}, examples=None)

    @property
    @override
    def steps(self) -> int:
        return super().steps if self._steps is None else self._steps

    @property
    @override
    def checkpoint_steps(self) -> list[int]:
        return sorted({*range(0, self.steps, self.interval), self.steps})

    @override
    def checkpoint(self, step: int) -> Checkpoint:
        recorded = self._recorded_checkpoints
        return replace(super().checkpoint(recorded[0] if step == 0 else recorded[-1]), step=step)

    @override
    def micro_batches(self, step: int) -> list[MicroBatch]:
        examples = self.manifest.configuration["dataset"]["length"]
        found = super().micro_batches(step % self._recorded)
        return [replace(micro_batch, indices=micro_batch.indices % examples) for micro_batch in found]

    @override
    def _locate(self, step: int) -> tuple[Shard, int]:
        return super()._locate(step % self._recorded)
