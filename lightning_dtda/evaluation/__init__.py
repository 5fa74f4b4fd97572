"""Is an attribution right? Scores against retraining, with noise ceilings and confidence intervals."""

from lightning_dtda.evaluation.agreement import LeaveOneOutCorrelation, LinearDatamodelingScore
from lightning_dtda.evaluation.comparing import Comparison, compare
from lightning_dtda.evaluation.evaluating import Evaluation, Score, evaluate
from lightning_dtda.evaluation.functional import Brittleness, brittleness
from lightning_dtda.evaluation.mislabelled import MislabelDetection
from lightning_dtda.evaluation.verification import Verification, verify

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
    "compare",
    "evaluate",
    "verify",
]
