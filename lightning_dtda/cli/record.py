"""``lightning-dtda record``: train one LightningCLI configuration over many seeds, and record the runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_dtda.cli import say, stoppable
from lightning_dtda.cli.configuration_cli import CONFIG, ConfigurationCLI, save_configuration
from lightning_dtda.errors import RecordingError
from lightning_dtda.recording import CrossedSeeds, TrajectoryRecorder, record, run_name
from lightning_dtda.recording.recording import checked_seeds
from lightning_dtda.recording.seeds import is_complete

_log = logging.getLogger(__name__)

_OWN_OPTIONS = ("ensemble", "seeds", "workers", "stacked", "compile", "recorder")
"""Options of the command that are not part of the configuration."""


class RecordCLI(ConfigurationCLI):
    """Parser for the user's configuration and the options of ``record``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ensemble", type=str, required=True, help="Directory for the runs, with one sub-directory per seed."
        )
        parser.add_argument(
            "--seeds",
            type=int | list[int] | CrossedSeeds,
            default=20,
            help="Seeds to record: a number S for the seeds 0 to S-1, or a list: --seeds=[3,7]; or seeds for each "
            "source of randomness, to split the variance by source: --seeds.initialisation 8 --seeds.order 8 (and "
            "--seeds.noise) record 64 runs.",
        )
        self.add_workers_to_parser(parser)
        self.add_stacked_to_parser(parser, default=False)
        parser.add_class_arguments(TrajectoryRecorder, "recorder", skip={"root", "run", "overwrite"}, instantiate=False)

    def seeds(self) -> int | list[int] | CrossedSeeds:
        """Return the chosen seeds."""
        parser = ArgumentParser()
        parser.add_argument("--seeds", type=int | list[int] | CrossedSeeds)
        return parser.instantiate(parser.parse_object({"seeds": self.config.seeds})).seeds

    @property
    def root(self) -> Path:
        """The ensemble's directory."""
        return Path(self.config.ensemble)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        if self.config.trainer.default_root_dir is None:
            # checkpoints and logs of parallel trainings would otherwise compete for lightning_logs/version_0
            kwargs["default_root_dir"] = str(self.root / "logs" / run_name(int(os.environ["PL_GLOBAL_SEED"])))
        trainer = super().instantiate_trainer(**kwargs)
        if any(isinstance(callback, TrajectoryRecorder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise RecordingError(
                "trainer.callbacks in the configuration contains a TrajectoryRecorder, but record adds one for each "
                "seed. Remove it, and give its arguments as --recorder.gradients and so on."
            )
        return trainer


class ConfiguredRecording:
    """Creates Trainer, module and data of a configuration; other processes read it from the ensemble's directory.

    Args:
        cli: The parsed configuration.
    """

    def __init__(self, cli: RecordCLI) -> None:
        self.cli = cli
        root = cli.root.resolve()
        self._arguments = ["--config", str(root / CONFIG), "--ensemble", str(root)]

    def __getstate__(self) -> dict[str, Any]:
        return {"_arguments": self._arguments}

    @cached_property
    def cli(self) -> RecordCLI:
        """The parsed configuration.

        Raises:
            RecordingError: If the configuration cannot be read.
        """
        try:
            return _cli(self._arguments)
        except SystemExit as error:
            raise RecordingError(
                "A worker cannot read the configuration; its log has the reason. Check that all packages and files "
                "of the configuration are available there."
            ) from error

    def __call__(self) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule | None]:
        """Create a new Trainer, module and data module."""
        self.cli.build()
        return self.cli.trainer, self.cli.model, self.cli.datamodule


def run(arguments: Sequence[str]) -> None:
    """Record an ensemble.

    Raises:
        SystemExit: With code 1 if a seed could not be recorded; the others are recorded.
    """
    cli = _cli(arguments)
    config, root = cli.config, cli.root
    chosen = cli.seeds()
    seeds = checked_seeds(chosen)
    # if a training uses several processes, the others run this command too
    tell = say if getattr(rank_zero_only, "rank", 0) == 0 else _log.debug

    def progress() -> str:
        return (
            f"{sum(is_complete(root / run_name(seed)) for seed in seeds)} of {len(seeds)} runs are complete in {root}"
        )

    save_configuration(root, cli.dump(without=_OWN_OPTIONS))
    if skipped := sum(is_complete(root / run_name(seed)) for seed in seeds):
        tell(f"{skipped} of {len(seeds)} runs are already complete in {root}.")
    with stoppable("record", progress):
        failures = record(
            ConfiguredRecording(cli),
            TrajectoryRecorder(root.resolve(), **config.recorder.as_dict()),
            chosen,
            workers=cli.workers(),
            stacked=config.stacked,
            compile=config.compile,
        )
    for seed, reason in failures.items():
        tell(f"seed {seed} failed: {reason}")
    tell(f"{progress()}.")
    if not all(is_complete(root / run_name(seed)) for seed in seeds):
        raise SystemExit(1)


def _cli(arguments: Sequence[str]) -> RecordCLI:
    return RecordCLI(
        "record",
        "Train a LightningCLI configuration (model, data, trainer) once for each seed and record every step, on "
        "the device that --trainer.accelerator and --trainer.devices choose.",
        arguments,
        # the bars and summaries of twenty trainings hide the bar that matters; a configuration may enable them
        trainer_defaults={"enable_progress_bar": False, "enable_model_summary": False},
    )
