"""A plan's batches of runs, shared out to whoever works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.execution import Lost, ThisProcess, Workers
from lightning_dtda.trajectory import Run

Batch = tuple[Run, ...]


def estimates(
    workers: Workers, estimator: Estimator, question: Question, plan: Plan, advance: Advance
) -> Iterator[tuple[Batch, Estimate]]:
    """Answer the question for each of a plan's batches, and yield what is finished as soon as it is.

    The plan is made once, so that workers differ in nothing but where they compute. Only batches of more runs than
    there are for each place are parted.

    Args:
        workers: Where.
        estimator: The estimator that made the plan.
        question: The question.
        plan: Its plan.
        advance: Told how many steps were done: step by step in this process, otherwise when a batch is finished.

    Raises:
        AttributionError: If the worker of a batch was lost, or a run is not where it is to be attributed.
        ExecutionError: As :meth:`Workers.run <lightning_dtda.execution.Workers.run>`.
    """
    if isinstance(workers, ThisProcess):
        for batch in plan.batches:
            yield batch, estimator.estimate(batch, question, plan, advance)
        return
    runs = {str(run.path.resolve()): run for batch in plan.batches for run in batch}
    lost: list[str] = []
    for paths, found in workers.run(_Work(estimator, question, replace(plan, batches=())), _pieces(plan, workers)):
        if isinstance(found, Lost):
            lost.append(f"{', '.join(Path(path).name for path in paths)}: {found.reason}")
            continue
        batch = tuple(runs[path] for path in paths)
        advance(sum(run.steps for run in batch))
        yield batch, found
    if lost:
        raise AttributionError(
            f"{len(lost)} batches of runs are not attributed: {lost[0]}. The others are on disk if there is an "
            "output: call again to go on."
        )


@dataclass(frozen=True)
class _Work:
    """What is sent to other processes: everything but the runs, which they read."""

    estimator: Estimator
    question: Question
    plan: Plan

    def __call__(self, paths: tuple[str, ...]) -> Estimate:
        for path in paths:
            if not Path(path).is_dir():
                raise AttributionError(
                    f"There is no run {path} where it is to be attributed. Let the ensemble be on a disk that all "
                    "nodes share."
                )
        estimate = self.estimator.estimate([Run(path) for path in paths], self.question, self.plan, lambda steps: None)
        # the process that asked may have no such device
        baseline, responses = (part.cpu() for part in (estimate.baseline, estimate.responses))
        return replace(estimate, baseline=baseline, responses=responses)


def _pieces(plan: Plan, workers: Workers) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the runs in each batch, in such parts that no place stays empty."""
    runs = sum(len(batch) for batch in plan.batches)
    most = -(-runs // max(1, workers.places()))
    for batch in plan.batches:
        for start in range(0, len(batch), most):
            yield tuple(str(run.path.resolve()) for run in batch[start : start + most])
