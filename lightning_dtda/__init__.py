"""Distributional training data attribution for PyTorch Lightning.

How does the *distribution* of trained models, over initialisation and batch order, change when training examples are
removed? Record seeded runs with :class:`TrajectoryRecorder`, open them as an :class:`Ensemble`, and
:func:`attribute` them.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

from lightning_dtda.text import printable
from lightning_dtda.version import __version__

if TYPE_CHECKING:
    from lightning_dtda import plot
    from lightning_dtda.attribution import Attribution, attribute, export, suggest_removals
    from lightning_dtda.estimators import InfluenceFunctions, UnrolledDifferentiation
    from lightning_dtda.evaluation import check, evaluate
    from lightning_dtda.planning import plan
    from lightning_dtda.recording import TrajectoryRecorder, record
    from lightning_dtda.reporting import report
    from lightning_dtda.retraining import GroundTruth, retrain
    from lightning_dtda.trajectory import Ensemble, Run


class _Fallback(logging.Handler):
    """Prints messages to standard error as long as the application has not set up logging itself.

    What a recording will need must be seen in a plain script. Asked for each message, not at the import: an application
    that calls ``logging.basicConfig`` later gets the messages from then on, once.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.hasHandlers():
            print(printable(self.format(record)), file=sys.stderr)


_log = logging.getLogger(__name__)
if _log.level == logging.NOTSET:  # the application may have chosen one
    _log.setLevel(logging.INFO)
_log.addHandler(_Fallback())

_HOMES = {
    "Attribution": "lightning_dtda.attribution",
    "Ensemble": "lightning_dtda.trajectory",
    "GroundTruth": "lightning_dtda.retraining",
    "InfluenceFunctions": "lightning_dtda.estimators",
    "Run": "lightning_dtda.trajectory",
    "TrajectoryRecorder": "lightning_dtda.recording",
    "UnrolledDifferentiation": "lightning_dtda.estimators",
    "attribute": "lightning_dtda.attribution",
    "check": "lightning_dtda.evaluation",
    "evaluate": "lightning_dtda.evaluation",
    "export": "lightning_dtda.attribution",
    "plan": "lightning_dtda.planning",
    "record": "lightning_dtda.recording",
    "report": "lightning_dtda.reporting",
    "retrain": "lightning_dtda.retraining",
    "suggest_removals": "lightning_dtda.attribution",
}

__all__ = [
    "Attribution",
    "Ensemble",
    "GroundTruth",
    "InfluenceFunctions",
    "Run",
    "TrajectoryRecorder",
    "UnrolledDifferentiation",
    "__version__",
    "attribute",
    "check",
    "evaluate",
    "export",
    "plan",
    "plot",
    "record",
    "report",
    "retrain",
    "suggest_removals",
]


def __getattr__(name: str) -> Any:
    # on first use: importing lightning takes seconds, which --help and reading an error should not cost
    if name == "plot":
        return importlib.import_module("lightning_dtda.plot")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
