"""``lightning-dtda attribute``: what the training examples of an ensemble do to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_dtda.attribution import attribute
from lightning_dtda.cli.configuration import CONFIG
from lightning_dtda.cli.question import QuestionCLI
from lightning_dtda.estimators import Estimator, UnrolledDifferentiation


class AttributeCLI(QuestionCLI):
    """The ensemble's configuration and what is asked of it."""

    own_options = (*QuestionCLI.own_options, "output", "overwrite", "estimator", "wandb")

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str, required=True, help="Directory for the attribution.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the answer to another question.")
        parser.add_subclass_arguments(Estimator, "estimator", help="How responses are computed.")
        parser.set_defaults({"estimator": {"class_path": _class_path(UnrolledDifferentiation)}})
        parser.add_argument("--wandb", action="store_true", help="Log the result as one summary run to W&B.")


def run(arguments: Sequence[str]) -> None:
    """Attribute an ensemble, print a summary, and log it to W&B if asked.

    Raises:
        AttributionError: If the ensemble has no configuration of its own and none is given.
    """
    cli = AttributeCLI(
        "attribute",
        "Predict what removing each training example does to the measurements of an ensemble. The configuration is "
        "the one that the ensemble was recorded with.",
        arguments,
    )
    config = cli.config
    attribution = attribute(
        **cli.question(),
        estimator=cli.config_init.estimator,
        output=config.output,
        overwrite=config.overwrite,
    )
    from lightning_dtda.reporting import log_to_wandb, print_summary

    print_summary(attribution)
    print(f"The attribution is in {config.output}; lightning-dtda report --attribution {config.output} shows it.")
    if config.wandb:
        log_to_wandb(attribution, config.output, project=_project(Path(config.ensemble)))


def _project(root: Path) -> str | None:
    """Return the W&B project that the runs were logged to, so that the summary stands beside them."""
    path = root / CONFIG
    loggers = yaml.safe_load(path.read_text())["trainer"].get("logger") if path.exists() else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and logger.get("class_path", "").endswith("WandbLogger"):
            project: str | None = logger.get("init_args", {}).get("project")
            return project
    return None


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
