"""Where the runs of an ensemble are attributed: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimate, Estimator, Plan, Question
from lightning_dtda.estimators.estimator import Advance
from lightning_dtda.execution.processes import run_in_processes
from lightning_dtda.execution.ray_cluster import Lost, RayCluster
from lightning_dtda.trajectory import Run

EngineName = Literal["local", "ray"]

Batch = tuple[Run, ...]


@dataclass(frozen=True)
class Engine:
    """Where batches of runs are worked on.

    Args:
        jobs: Number of processes of this machine; 1 is this one.
        cluster: A Ray cluster in place of them.
    """

    jobs: int = 1
    cluster: RayCluster | None = None

    @classmethod
    def of(cls, engine: EngineName | RayCluster, jobs: int) -> Engine:
        """Return what was asked for.

        Raises:
            AttributionError: If there is no such engine, or the number of processes makes no sense for it.
            ExecutionError: If Ray is not installed.
        """
        if not isinstance(engine, RayCluster) and engine not in get_args(EngineName):
            raise AttributionError(
                f"engine={engine!r}; choose from {', '.join(get_args(EngineName))}, or give a RayCluster."
            )
        if isinstance(jobs, bool) or jobs < 1:
            raise AttributionError(f"jobs={jobs}; give the number of processes, at least 1.")
        if engine == "local":
            return cls(jobs)
        if jobs > 1:
            raise AttributionError(f'jobs={jobs} are processes of this machine; with engine="ray" leave them out.')
        return cls(1, engine if isinstance(engine, RayCluster) else RayCluster())

    def estimates(
        self, estimator: Estimator, question: Question, plan: Plan, advance: Advance
    ) -> Iterator[tuple[Batch, Estimate]]:
        """Answer the question for each of a plan's batches, and yield what is finished as soon as it is.

        The plan is made once, so that engines differ in nothing but where they compute. Only batches of more runs than
        there are for each place are parted.

        Args:
            estimator: The estimator that made the plan.
            question: The question.
            plan: Its plan.
            advance: Told how many steps were done: step by step in this process, otherwise when a batch is finished.

        Raises:
            AttributionError: If a process or a worker was lost.
            ExecutionError: As :meth:`RayCluster.run <lightning_dtda.execution.ray_cluster.RayCluster.run>`.
        """
        if self.cluster is None and self.jobs == 1:
            for batch in plan.batches:
                yield batch, estimator.estimate(batch, question, plan, advance)
            return
        work = _Work(estimator, question, replace(plan, batches=()))
        lost: list[str] = []
        runs = {str(run.path.resolve()): run for batch in plan.batches for run in batch}
        if self.cluster:
            finished = _on_cluster(self.cluster, work, plan, lost)
        else:
            pieces = _pieces(plan, self.jobs)
            jobs = min(self.jobs, len(pieces))
            finished = run_in_processes(work, pieces, jobs, "batches of runs", AttributionError)
        for paths, estimate in finished:
            batch = tuple(runs[path] for path in paths)
            advance(sum(run.steps for run in batch))
            yield batch, estimate
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


def _on_cluster(
    cluster: RayCluster, work: _Work, plan: Plan, lost: list[str]
) -> Iterator[tuple[tuple[str, ...], Estimate]]:
    def pieces() -> Iterator[tuple[str, ...]]:
        # asked for when the cluster is connected to
        yield from _pieces(plan, max(1, cluster.places()))

    for done in cluster.run(work, pieces()):
        for paths, found in done:
            if isinstance(found, Lost):
                lost.append(f"{', '.join(Path(path).name for path in paths)}: {found.reason}")
            else:
                yield paths, found


def _pieces(plan: Plan, places: int) -> list[tuple[str, ...]]:
    """Return the paths of the runs in each batch, in such parts that no place stays empty."""
    runs = sum(len(batch) for batch in plan.batches)
    most = -(-runs // places)
    return [
        tuple(str(run.path.resolve()) for run in batch[start : start + most])
        for batch in plan.batches
        for start in range(0, len(batch), most)
    ]
