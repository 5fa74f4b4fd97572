"""What was found, as runs of Weights & Biases: one for each attribution, ground truth, evaluation and suggestion.

Every key that is logged says what a panel shows and holds no index, so that two attributions line up in one workspace.
:mod:`.workspaces` arranges the panels.
"""

from lightning_dtda.reporting.weights_and_biases.attributions import log_to_wandb
from lightning_dtda.reporting.weights_and_biases.evaluations import log_evaluation_to_wandb
from lightning_dtda.reporting.weights_and_biases.suggestions import log_suggestion_to_wandb
from lightning_dtda.reporting.weights_and_biases.truths import log_truth_to_wandb
from lightning_dtda.reporting.weights_and_biases.workspaces import wandb_report, wandb_workspace

__all__ = [
    "log_evaluation_to_wandb",
    "log_suggestion_to_wandb",
    "log_to_wandb",
    "log_truth_to_wandb",
    "wandb_report",
    "wandb_workspace",
]
