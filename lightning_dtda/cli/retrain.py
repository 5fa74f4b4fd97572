"""``lightning-dtda retrain``: ground truth for attributions, by actual retraining."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_dtda.cli import say, stoppable
from lightning_dtda.cli.configuration_cli import read_json_option
from lightning_dtda.cli.question import QuestionCLI, query_loader
from lightning_dtda.cli.weights_and_biases import add_wandb, logger_of
from lightning_dtda.errors import RetrainingError
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.recording import run_name
from lightning_dtda.replay import training_examples
from lightning_dtda.retraining import GroundTruth, random_subsets, retrain
from lightning_dtda.retraining.retraining import Removal
from lightning_dtda.retraining.truth_store import TruthStore
from lightning_dtda.trajectory import Ensemble


class RetrainCLI(QuestionCLI):
    """Parser for the user's configuration and the options of ``retrain``."""

    usage = "--config FILE --output DIR"

    def __init__(
        self, command: str, description: str, arguments: Sequence[str], defaults: Mapping[str, Any], **kwargs: Any
    ) -> None:
        self._defaults = dict(defaults)
        super().__init__(command, description, arguments, **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ensemble",
            type=str | None,
            default=None,
            help="Directory of recorded runs, for --removal reweight or for their configuration if there is no "
            "--config. Their seeds are not reused for new trainings.",
        )
        self.add_question_to_parser(parser)
        self.add_draws_to_parser(parser)
        parser.add_argument("--output", type=str, required=True, help="Directory for the ground truth.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace an existing ground truth with other settings."
        )
        parser.add_argument("--subsets", type=int, default=40, help="Number of random subsets to remove.")
        parser.add_argument("--fraction", type=float, default=0.9, help="Fraction of the training examples to keep.")
        parser.add_argument("--subsets_seed", type=int, default=0, help="Seed of the random subsets.")
        parser.add_argument(
            "--removed",
            type=str | None,
            default=None,
            help="JSON file with a list of lists of training example indices, instead of random subsets.",
        )
        parser.add_argument(
            "--seeds",
            type=int | list[int],
            default=32,
            help="Seeds of the trainings for each subset: a number of new seeds, or a list: --seeds=[103,107].",
        )
        parser.add_argument(
            "--baseline_seeds",
            type=int | list[int] | None,
            default=None,
            help="Seeds of the trainings on all examples; by default, those of --seeds.",
        )
        parser.add_argument(
            "--removal",
            type=Removal,
            default="drop",
            help="How to remove: drop, train without the examples; reweight, replay recorded runs with the weights of "
            "the examples set to zero.",
        )
        self.add_workers_to_parser(parser)
        self.add_stacked_to_parser(parser, default="auto")
        add_wandb(parser)
        parser.set_defaults(self._defaults)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:  # type: ignore[override]
        """Create a Trainer that leaves nothing behind, as thousands of trainings would fill any log."""
        options = self.config.trainer
        callbacks = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        if not any("Checkpoint" in str(getattr(callback, "class_path", "")) for callback in callbacks):
            kwargs.setdefault("enable_checkpointing", False)
        if options.default_root_dir is None:
            # callbacks may still write files: each training has its own directory for them
            name = run_name(int(os.environ.get("PL_GLOBAL_SEED", 0)))
            kwargs["default_root_dir"] = str(Path(self.config.output) / "logs" / f"{name}-{os.getpid()}")
        return super(QuestionCLI, self).instantiate_trainer(logger=DummyLogger(), **kwargs)


class ConfiguredRetraining:
    """Creates module and Trainer of a configuration; other processes read the configuration again.

    Args:
        arguments: Arguments of the command.
        defaults: Defaults of options that differ from the usual ones.
    """

    def __init__(self, arguments: Sequence[str], defaults: Mapping[str, Any]) -> None:
        self._arguments = list(arguments)
        self._defaults = dict(defaults)
        self._trainer: pl.Trainer | None = None
        self._is_elsewhere = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments, "_defaults": self._defaults, "_trainer": None, "_is_elsewhere": True}

    @cached_property
    def cli(self) -> RetrainCLI:
        """The parsed configuration.

        Raises:
            RetrainingError: If a worker cannot read it.
        """
        try:
            return RetrainCLI(
                "retrain",
                "Train a configuration without random subsets of its training examples, over many seeds, and measure "
                "the models: ground truth for attributions. Another call runs only the missing trainings.",
                self._arguments,
                self._defaults,
                trainer_defaults={"enable_progress_bar": False, "enable_model_summary": False},
            )
        except SystemExit as error:
            if not self._is_elsewhere:
                raise
            raise RetrainingError(
                "A worker cannot read the configuration; its log has the reason. Start the command in the same "
                "directory on all nodes, with all packages and files of the configuration."
            ) from error

    def module(self) -> pl.LightningModule:
        """Create the module, and everything else in the same order as ``record``, to draw the same random numbers."""
        self.cli.build()
        self._trainer = self.cli.trainer
        return self.cli.model

    def trainer(self) -> pl.Trainer:
        """Return the Trainer that was created with the module."""
        if self._trainer is None:
            self.module()
        trainer, self._trainer = self._trainer, None
        assert trainer is not None
        return trainer


def run(arguments: Sequence[str]) -> None:
    """Retrain and print the result.

    Raises:
        SystemExit: With code 1 if trainings failed; the others are stored.
    """
    retrained(arguments)


def retrained(
    arguments: Sequence[str], subsets: Sequence[Sequence[int]] | None = None, defaults: Mapping[str, Any] | None = None
) -> GroundTruth:
    """Retrain, print the result and return it.

    Args:
        arguments: Arguments of the command.
        subsets: Subsets to remove instead of those that the arguments specify.
        defaults: Defaults of options that differ from the usual ones.

    Raises:
        SystemExit: With code 1 if trainings failed; the others are stored.
    """
    configured = ConfiguredRetraining(arguments, defaults or {})
    config = configured.cli.config
    with quiet_lightning():
        module = configured.module()
    data = module if configured.cli.datamodule is None else configured.cli.datamodule
    ensemble = None if config.ensemble is None else Ensemble.open(config.ensemble)
    with stoppable("retrain", lambda: _progress(config.output)):
        truth = retrain(
            module if config.removal == "reweight" else configured.module,
            data,
            subsets=read_subsets(config, len(training_examples(data))) if subsets is None else subsets,
            seeds=config.seeds,
            baseline_seeds=config.baseline_seeds,
            queries=query_loader(data, config.queries.split, config.queries.indices),
            measurement=config.measurement,
            measurement_draws=config.measurement_draws,
            measurement_seed=config.measurement_seed,
            removal=config.removal,
            trainer=configured.trainer,
            ensemble=ensemble,
            output=config.output,
            overwrite=config.overwrite,
            workers=configured.cli.workers(),
            stacked=config.stacked,
            compile=config.compile,
            device=config.device,
        )
    say(f"{truth} is in {config.output}.")
    if config.wandb:
        from lightning_dtda.reporting import log_truth_to_wandb  # imported here to keep --help fast

        log_truth_to_wandb(truth, config.output, ensemble=ensemble, **logger_of(ensemble))
    if truth.unfinished:
        raise SystemExit(1)
    return truth


def _progress(output: str) -> str:
    """Return how many trainings are stored."""
    if not TruthStore.is_at(output):
        return "no training is finished"
    store = TruthStore.open(output)
    wanted = len(store.baseline_seeds) + len(store.removed) * len(store.seeds)
    return f"{len(store.finished())} of {wanted} trainings are stored in {output}"


def read_subsets(config: Any, examples: int) -> list[Any]:
    """Return the subsets that the options specify.

    Args:
        config: Options of the command.
        examples: Number of training examples N.

    Raises:
        RetrainingError: If the file cannot be read, or is not a list of lists.
    """
    if config.removed is None:
        return list(random_subsets(examples, config.subsets, config.fraction, config.subsets_seed))
    content = read_json_option("--removed", config.removed, RetrainingError)
    if not isinstance(content, list) or not all(isinstance(subset, list) for subset in content):
        raise RetrainingError(
            f"--removed {config.removed} is not a list of lists of training example indices, like [[3, 17], [4]]."
        )
    return content
