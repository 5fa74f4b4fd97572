"""The results of an attribution, for people: one HTML file, a Weights & Biases run, the terminal.

Everything here reads an :class:`~lightning_dtda.attribution.attribution.Attribution` and computes no influence of its
own. Every influence shown is marked as significant or not (:mod:`lightning_dtda.reporting.certainty`). The figures are
in :mod:`lightning_dtda.reporting.figures`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dtda.reporting.findings import Findings, find
from lightning_dtda.reporting.report import report
from lightning_dtda.reporting.terminal import print_summary

if TYPE_CHECKING:
    from lightning_dtda.reporting.weights_and_biases import (
        log_evaluation_to_wandb,
        log_suggestion_to_wandb,
        log_to_wandb,
        log_truth_to_wandb,
        wandb_report,
        wandb_workspace,
    )

__all__ = [
    "Findings",
    "find",
    "log_evaluation_to_wandb",
    "log_suggestion_to_wandb",
    "log_to_wandb",
    "log_truth_to_wandb",
    "print_summary",
    "report",
    "wandb_report",
    "wandb_workspace",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # W&B takes half a second to import, which page and terminal should not pay
        return getattr(import_module("lightning_dtda.reporting.weights_and_biases"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
