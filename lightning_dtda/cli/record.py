"""``lightning-dtda record``: many seeded, recorded trainings of one LightningCLI configuration."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_dtda.cli.configuration_cli import CONFIG, ConfigurationCLI, save_configuration
from lightning_dtda.errors import RecordingError
from lightning_dtda.execution.progress import progress_bar
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.execution.ray_cluster import RayCluster
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.recording.jobs import record_in_jobs
from lightning_dtda.recording.ray_jobs import record_on_ray
from lightning_dtda.recording.seeds import is_complete, record_seeds, run_name
from lightning_dtda.retraining import record_stacked

_log = logging.getLogger(__name__)

_OWN_OPTIONS = ("ensemble", "seeds", "jobs", "engine", "ray", "runs_to_fit", "recorder")
"""Options of the command that are no part of the configuration."""


class RecordCLI(ConfigurationCLI):
    """The user's configuration and which seeds of it to record where."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ensemble", type=str, required=True, help="Directory of the runs, one sub-directory a seed."
        )
        parser.add_argument(
            "--seeds",
            type=int | list[int],
            default=20,
            help="A number S for the seeds 0 to S-1, or a list: --seeds=[3,7].",
        )
        parser.add_argument("--jobs", type=int, default=1, help="Number of processes that train at the same time.")
        parser.add_argument(
            "--engine",
            type=Literal["trainer", "stacked", "ray"],
            default="trainer",
            help="How runs are trained. trainer: one by one, in --jobs processes of this machine. stacked: many at "
            "once on one device, after the Trainer has recorded the first. ray: on a Ray cluster.",
        )
        parser.add_class_arguments(RayCluster, "ray", instantiate=False)
        parser.add_argument(
            "--runs_to_fit",
            type=int | None,
            default=None,
            help="Number of runs that the disk must hold; those of --seeds if not given. Set by --jobs and --engine.",
        )
        parser.add_class_arguments(TrajectoryRecorder, "recorder", skip={"root", "run", "overwrite"}, instantiate=False)

    @property
    def root(self) -> Path:
        """The ensemble's directory."""
        return Path(self.config.ensemble)

    @property
    def seeds(self) -> list[int]:
        """The seeds to record.

        Raises:
            RecordingError: If there are none, or one is given twice or is negative.
        """
        given = self.config.seeds
        seeds = list(range(given)) if isinstance(given, int) else list(given)
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise RecordingError(
                f"--seeds={given} is no set of seeds. Give a positive number, or a list of different numbers from 0 on."
            )
        return seeds

    def make_recorder(self, overwrite: bool) -> TrajectoryRecorder:
        """Make the recorder of a run."""
        return TrajectoryRecorder(self.root, overwrite=overwrite, **self.config.recorder.as_dict())

    def make_training(self) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule | None]:
        """Make Trainer, module and data afresh."""
        self.build()
        return self.trainer, self.model, self.datamodule

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        if self.config.trainer.default_root_dir is None:
            # checkpoints and logs of parallel trainings would otherwise compete for lightning_logs/version_0
            kwargs["default_root_dir"] = str(self.root / "logs" / run_name(int(os.environ["PL_GLOBAL_SEED"])))
        trainer = super().instantiate_trainer(**kwargs)
        if any(isinstance(callback, TrajectoryRecorder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise RecordingError(
                "The configuration's trainer.callbacks have a TrajectoryRecorder; record adds one for each seed. "
                "Remove it, and give its arguments as --recorder.gradients and so on."
            )
        return trainer


def run(arguments: Sequence[str]) -> None:
    """Record an ensemble; exit code 1 if a seed failed.

    Raises:
        SystemExit: With code 1 if a seed could not be recorded; the others are.
    """
    cli = _cli(arguments)
    if cli.config.jobs < 1:
        raise RecordingError(f"--jobs={cli.config.jobs}; give the number of processes, at least 1.")
    everything = cli.seeds
    if cli.config.jobs > 1 and cli.config.engine == "stacked":
        raise RecordingError(
            f"--jobs={cli.config.jobs} are processes of the Trainer; stacked runs are trained together in one. Leave "
            "--jobs or --engine stacked out."
        )
    # in a training of several processes, the others run this command too
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    say = print if is_first else _log.debug
    save_configuration(cli.root, cli.dump(without=_OWN_OPTIONS))
    seeds = [seed for seed in everything if not is_complete(cli.root / run_name(seed))]
    if skipped := len(everything) - len(seeds):
        say(f"{skipped} of {len(everything)} runs are complete already in {cli.root}.")
    if not seeds:
        return
    with quiet_lightning(), progress_bar("recording", "runs", len(seeds), is_first) as advance:

        def finished(seed: int) -> None:
            advance(1)

        if cli.config.engine == "ray":
            record = functools.partial(_record_one, _command(cli), seeds)
            failures = record_on_ray(RayCluster(**cli.config.ray.as_dict()), record, cli.root, seeds, finished)
        elif cli.config.engine == "stacked":
            failures = record_stacked(cli.make_training, cli.make_recorder(overwrite=False), seeds, finished=finished)
        elif min(cli.config.jobs, len(seeds)) > 1:
            failures = record_in_jobs(_command(cli), cli.root, seeds, cli.config.jobs, finished)
        else:
            to_fit = cli.config.runs_to_fit
            failures = record_seeds(cli.make_training, cli.make_recorder, cli.root, seeds, finished, to_fit)
    for seed, reason in failures.items():
        say(f"seed {seed} failed: {reason}")
    complete = sum(is_complete(cli.root / run_name(seed)) for seed in everything)
    say(f"{complete} of {len(everything)} runs are complete in {cli.root}.")
    if complete < len(everything):
        raise SystemExit(1)


def _cli(arguments: Sequence[str]) -> RecordCLI:
    return RecordCLI(
        "record",
        "Train a LightningCLI configuration (model, data, trainer) once for each seed and record every step.",
        arguments,
        # twenty bars and summaries of the same model hide the one bar that matters; a configuration may ask for them
        trainer_defaults={"enable_progress_bar": False, "enable_model_summary": False},
    )


def _command(cli: RecordCLI) -> list[str]:
    """Return the arguments with which another process records into the same ensemble."""
    root = cli.root.resolve()
    options = [f"--recorder.{key}={value}" for key, value in cli.config.recorder.as_dict().items()]
    return ["record", "--config", str(root / CONFIG), "--ensemble", str(root), *options]


def _record_one(command: Sequence[str], seeds: Sequence[int], seed: int) -> str | None:
    """Record a seed in a worker of Ray.

    Args:
        command: What :func:`_command` returned.
        seeds: All seeds; the first looks whether they fit on the disk.
        seed: The seed.

    Returns:
        What went wrong.
    """
    try:
        cli = _cli([*command[1:], f"--seeds=[{seed}]"])
    except SystemExit:
        return "its worker cannot read the configuration, and has written why: is a package missing on its node?"

    def make_training() -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule | None]:
        training = cli.make_training()
        if (processes := training[0].world_size) > 1:
            raise RecordingError(
                f"The Trainer spreads a training over {processes} processes; on Ray, each is in one worker. Set "
                "trainer.devices to 1."
            )
        return training

    to_fit = sum(not is_complete(cli.root / run_name(one)) for one in seeds) if seed == seeds[0] else 0
    with quiet_lightning():
        return record_seeds(make_training, cli.make_recorder, cli.root, [seed], to_fit=to_fit).get(seed)
