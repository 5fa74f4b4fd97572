"""Where work runs: this process, several of this machine, a Ray cluster; memory, devices, progress.

``record``, ``attribute`` and ``retrain`` all take ``workers``: a number of processes of this machine, or a
:class:`Workers`, of which each kind is one class in one file.
"""

from lightning_dtda.execution.processes import Processes, workers_of
from lightning_dtda.execution.ray_cluster import RayCluster
from lightning_dtda.execution.workers import Lost, ThisProcess, Workers

__all__ = ["Lost", "Processes", "RayCluster", "ThisProcess", "Workers", "workers_of"]
