"""The results of an attribution, for people: one HTML file, a Weights & Biases run, the terminal.

Everything here reads an :class:`~lightning_dtda.attribution.attribution.Attribution` and computes no influence of its
own. Every influence shown is marked as significant or not (:mod:`lightning_dtda.reporting.certainty`). The figures are
in :mod:`lightning_dtda.reporting.figures`.
"""

from lightning_dtda.reporting.findings import Findings, find
from lightning_dtda.reporting.report import report
from lightning_dtda.reporting.terminal import print_summary
from lightning_dtda.reporting.weights_and_biases import log_to_wandb

__all__ = ["Findings", "find", "log_to_wandb", "print_summary", "report"]
