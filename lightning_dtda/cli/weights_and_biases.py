"""``--wandb``: what a command found, as a run of W&B beside the recorded ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from lightning_dtda.errors import TrajectoryError

if TYPE_CHECKING:
    from lightning_dtda import Attribution, Ensemble


def add_wandb(parser: ArgumentParser) -> None:
    """Add the option; where the run goes is said by W&B's own environment variables."""
    parser.add_argument(
        "--wandb",
        action="store_true",
        help="Log the result to W&B as a run of its own, to the project of the recorded runs unless WANDB_PROJECT, "
        "WANDB_ENTITY or WANDB_RUN_GROUP say otherwise.",
    )


def recorded_runs(attribution: Attribution) -> Ensemble | None:
    """Return the runs that a command attributed, if it is known and they are still there."""
    from lightning_dtda import Ensemble
    from lightning_dtda.reporting.commands import kept_command

    command = kept_command(attribution)
    try:
        return None if command is None else Ensemble.open(command.ensemble)
    except TrajectoryError:  # they were deleted, or moved
        return None


def logger_of(ensemble: Ensemble | None) -> dict[str, Any]:
    """Return the W&B project and entity that recorded runs were logged to, as far as the environment names no other."""
    from lightning_dtda.cli.configuration_cli import CONFIG, read_configuration

    path = None if ensemble is None else ensemble.root / CONFIG
    trainer = read_configuration(path).get("trainer") if path is not None and path.exists() else None
    loggers = trainer.get("logger") if isinstance(trainer, dict) else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and str(logger.get("class_path")).endswith("WandbLogger"):
            given = logger.get("init_args") or {}
            return {key: given.get(key) for key in ("project", "entity") if not os.environ.get(f"WANDB_{key.upper()}")}
    return {}
