"""The user's own Trainer on a Ray cluster, each training a task."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

from typing_extensions import override

from lightning_dtda.execution.ray_cluster import Lost, RayCluster
from lightning_dtda.retraining.engine import Engine, Outcome, Retraining
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.trainer_engine import train_one


class RayEngine(Engine):
    """Runs the Trainer once for each training, on all nodes of a cluster.

    A cluster that this process is connected to is used, or one at ``address`` or ``RAY_ADDRESS``; if there is none,
    Ray is started on this machine and stopped afterwards. A worker or a node that is lost takes its own trainings
    along, no others, and those are done again.

    Args:
        cpus: CPUs, and threads, for each training.
        gpus: GPUs for each; a fraction shares one. The Trainer sees no others: ``Trainer(devices=1)``.
        address: Of a running cluster; ``"local"`` starts Ray on this machine in any case.
        retries: How often a training is done again whose worker was lost; then it has failed.

    Raises:
        ExecutionError: If Ray is not installed, or a number makes no sense.
    """

    name: ClassVar[str] = "ray"

    def __init__(self, cpus: float = 1.0, gpus: float = 0.0, address: str | None = None, retries: int = 3) -> None:
        self.cluster = RayCluster(cpus, gpus, address, retries)

    @override
    def train(self, retraining: Retraining, tasks: Sequence[Task]) -> Iterator[list[Outcome]]:
        # each a task of its own, so that nothing else is lost with its worker: that costs 3 ms, and Lightning takes
        # 50 ms for a fit of seven steps
        for finished in self.cluster.run(functools.partial(train_one, retraining), tasks):
            yield [
                Outcome(task, None, outcome.reason) if isinstance(outcome, Lost) else outcome
                for task, outcome in finished
            ]
