"""Distribution of a plan's batches of runs over workers."""

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
    """Answer the question for each batch of a plan, and yield each estimate as soon as it is finished.

    All workers use the same plan, so they compute exactly the same. A batch is split only if some workers would
    otherwise have nothing to do.

    Args:
        workers: Workers to compute on.
        estimator: Estimator that made the plan.
        question: The question.
        plan: Plan of the estimator.
        advance: Called with the number of finished steps: after each step in this process, otherwise after each batch.

    Raises:
        AttributionError: If the worker of a batch was lost, or a worker cannot find a run.
        ExecutionError: As for :meth:`Workers.run <lightning_dtda.execution.Workers.run>`.
    """
    if isinstance(workers, ThisProcess):
        for batch in plan.batches:
            yield batch, estimator.estimate(batch, question, plan, advance)
        return
    question.kept.clear()  # this process computes nothing
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
            f"{len(lost)} batches of runs were not attributed: {lost[0]}. If you gave an output, the others are stored "
            "there: call attribute again to continue."
        )


@dataclass(frozen=True)
class _Work:
    """What is sent to other processes: everything but the runs, which they read from disk."""

    estimator: Estimator
    question: Question
    plan: Plan

    def __call__(self, paths: tuple[str, ...]) -> Estimate:
        for path in paths:
            if not Path(path).is_dir():
                raise AttributionError(
                    f"A worker cannot find the run {path}. Put the ensemble on a disk that all nodes share."
                )
        estimate = self.estimator.estimate([Run(path) for path in paths], self.question, self.plan, lambda steps: None)
        # the calling process may not have this device
        baseline, responses = (part.cpu() for part in (estimate.baseline, estimate.responses))
        return replace(estimate, baseline=baseline, responses=responses)


def _pieces(plan: Plan, workers: Workers) -> Iterator[tuple[str, ...]]:
    """Yield the paths of the runs in each batch, split so that every worker has something to do."""
    runs = sum(len(batch) for batch in plan.batches)
    most = -(-runs // max(1, workers.places()))
    for batch in plan.batches:
        for start in range(0, len(batch), most):
            yield tuple(str(run.path.resolve()) for run in batch[start : start + most])
