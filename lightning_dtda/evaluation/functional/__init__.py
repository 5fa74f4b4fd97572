"""The metrics as functions of tensors."""

from lightning_dtda.evaluation.functional.agreement import leave_one_out_correlation, linear_datamodeling_score
from lightning_dtda.evaluation.functional.brittleness import Brittleness, brittleness
from lightning_dtda.evaluation.functional.mislabelled import mislabel_detection

__all__ = [
    "Brittleness",
    "brittleness",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mislabel_detection",
]
