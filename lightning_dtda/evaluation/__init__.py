"""Is an attribution right? Scores against retraining, with noise ceilings and confidence intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_dtda.evaluation.agreement import LeaveOneOutCorrelation, LinearDatamodelingScore
from lightning_dtda.evaluation.comparing import Comparison, compare
from lightning_dtda.evaluation.evaluating import Evaluation, Score, evaluate
from lightning_dtda.evaluation.functional import Brittleness, brittleness
from lightning_dtda.evaluation.mislabelled import MislabelDetection
from lightning_dtda.evaluation.verification import Verification, verify

if TYPE_CHECKING:
    from lightning_dtda.evaluation.checking import check

__all__ = [
    "Brittleness",
    "Comparison",
    "Evaluation",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "Score",
    "Verification",
    "brittleness",
    "check",
    "compare",
    "evaluate",
    "verify",
]


def __getattr__(name: str) -> Any:
    # imported on first use: lightning takes seconds to import, and a comparison with a stored truth does not need it
    if name == "check":
        from lightning_dtda.evaluation import checking

        return checking.check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
