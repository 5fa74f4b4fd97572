"""Is an attribution right? Scores against retraining, with what noise allows and how sure they are."""

from lightning_dtda.evaluation.agreement import LeaveOneOutCorrelation, LinearDatamodelingScore
from lightning_dtda.evaluation.comparing import ScoreDifference, compare
from lightning_dtda.evaluation.evaluating import Evaluation, Score, evaluate
from lightning_dtda.evaluation.functional import Brittleness, brittleness
from lightning_dtda.evaluation.mislabelled import MislabelDetection
from lightning_dtda.evaluation.verification import Verification, verify

__all__ = [
    "Brittleness",
    "Evaluation",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "Score",
    "ScoreDifference",
    "Verification",
    "brittleness",
    "compare",
    "evaluate",
    "verify",
]
