"""Where work runs: in this process, in several local processes, or on a Ray cluster; memory, devices, progress.

``record``, ``attribute`` and ``retrain`` all take ``workers``: a number of local processes, or a :class:`Workers`.
Each kind of workers is one class in one file.
"""

from lightning_dtda.execution.processes import Processes, workers_of
from lightning_dtda.execution.ray_cluster import RayCluster
from lightning_dtda.execution.workers import Lost, ThisProcess, Workers

__all__ = ["Lost", "Processes", "RayCluster", "ThisProcess", "Workers", "workers_of"]
