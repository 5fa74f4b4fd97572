"""``lightning-dtda plan``: cost of recording and attributing, before starting anything long."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers.logger import DummyLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_dtda.cli.attribute import read_removals
from lightning_dtda.cli.question import QuestionCLI, query_loader
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.planning import Cost, Forecast, plan
from lightning_dtda.recording import TrajectoryRecorder
from lightning_dtda.reporting.formatting import escape
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.units import human_bytes, human_seconds


class PlanCLI(QuestionCLI):
    """Parser for the configuration or the recorded runs, and the options of ``plan``."""

    usage = "--config FILE | --runs DIR"

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ensemble",
            "--runs",
            type=str | None,
            default=None,
            help="Directory of recorded runs. Without it, a few steps of --config are trained and recorded in a "
            "temporary directory.",
        )
        self.add_question_to_parser(parser)
        for option, meaning in {
            "--seeds": "Number of runs; by default, 20 or the number of recorded runs.",
            "--steps": "Number of steps in a run; by default, as configured or recorded.",
            "--epochs": "Number of epochs in a run, instead of --steps.",
            "--examples": "Number of training examples; by default, as in the data.",
            "--queries.count": "Number of queries; by default, those of --queries.split and --queries.indices.",
        }.items():
            parser.add_argument(option, type=int | None, default=None, help=meaning)
        parser.add_argument("--removals", type=str, default=LEAVE_ONE_OUT, help="As for attribute.")
        parser.add_argument(
            "--estimators",
            type=list[Estimator] | None,
            default=None,
            help="Estimators to consider, the preferred one first; by default, unrolling, influence functions "
            "and TracIn.",
        )
        parser.add_argument("--workers", type=int, default=1, help="Number of processes that will share the runs.")
        parser.add_argument(
            "--hours", type=float | None, default=None, help="Maximum hours for recording and attributing."
        )
        parser.add_argument("--json", action="store_true", help="Print all figures as JSON, in seconds and bytes.")
        parser.add_class_arguments(TrajectoryRecorder, "recorder", skip={"root", "run", "overwrite"}, instantiate=False)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer | None:  # type: ignore[override]
        """Create a Trainer that logs nothing; none if the runs are already recorded."""
        if self.config.ensemble is not None:
            return None
        return super(QuestionCLI, self).instantiate_trainer(logger=DummyLogger(), **kwargs)


def run(arguments: Sequence[str]) -> None:
    """Plan and print the forecast."""
    with tempfile.TemporaryDirectory() as directory:  # for files that callbacks write
        found = plan(**_question(arguments, directory))
    if "--json" in arguments:
        print(json.dumps(found.content(), indent=1))
    else:
        print_forecast(found)


def _question(arguments: Sequence[str], directory: str) -> dict[str, Any]:
    """Return the arguments of :func:`lightning_dtda.plan`.

    Raises:
        AttributionError: If there is neither a configuration nor an ensemble.
    """
    # the configuration of an ensemble is found through --ensemble
    arguments = [
        "--ensemble" + one.removeprefix("--runs") if one.split("=")[0] == "--runs" else one for one in arguments
    ]
    given = {argument.split("=")[0] for argument in arguments}
    if not given & {"--config", "-c", "--ensemble", "-h", "--help", "--help-all"}:
        raise AttributionError("Give --config, the configuration to train, or --runs, the directory of recorded runs.")
    cli = PlanCLI(
        "plan",
        "Estimate the disk space, memory and time for recording and attributing, and recommend settings. To measure, "
        "a few steps are trained and recorded in a temporary directory, or recorded runs are used.",
        arguments,
        trainer_defaults={"enable_progress_bar": False, "enable_model_summary": False},
    )
    config = cli.config
    if config.trainer.default_root_dir is None:
        config.trainer.default_root_dir = directory
    pl.seed_everything(0, workers=True, verbose=False)
    with quiet_lightning():
        cli.build()
    data = cli.model if cli.datamodule is None else cli.datamodule
    return {
        "module": cli.model,
        "data": data,
        "queries": query_loader(data, config.queries.split, config.queries.indices),
        "trainer": cli.trainer,
        "ensemble": None if config.ensemble is None else Ensemble.open(config.ensemble),
        "estimators": cli.config_init.estimators,
        "runs": config.seeds,
        "steps": config.steps,
        "epochs": config.epochs,
        "examples": config.examples,
        "query_count": config.queries.count,
        "measurement": config.measurement,
        "removals": read_removals(config.removals),
        "recorder": config.recorder.as_dict(),
        "device": config.device,
        "workers": config.workers,
        "hours": config.hours,
        "progress": not config.json,
    }


def print_forecast(found: Forecast, *, console: Console | None = None) -> None:
    """Print a table of all costs, what was extrapolated, and the recommended settings.

    Args:
        found: The forecast.
        console: Console to print to; standard output by default.
    """
    console = console or Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for column in ("time", "memory", "disk"):
        table.add_column(column, justify="right")
    rows = {"recording": found.recording, **found.estimators}
    for name, cost in rows.items():
        table.add_row(escape(name), *(_figures(cost) if isinstance(cost, Cost) else ("-", "-", "-")))
    processes = "" if found.workers == 1 else f", {found.workers} processes"
    console.print(
        f"{found.runs} runs of {found.steps:,} steps, {found.parameters:,} parameters, {found.examples:,} examples, "
        f"{found.queries:,} queries, {found.removals:,} removals; on {found.device}{processes}"
    )
    console.print(table)
    console.print(
        "Memory comes on top of libraries, module and data; for recording, also on top of the training. "
        f"{_basis(found)}"
    )
    console.print(escape(found.advice), style="bold")


def _figures(cost: Cost) -> tuple[str, str, str]:
    time = "not recorded" if cost.seconds is None else human_seconds(cost.seconds)
    memory = human_bytes(cost.memory) if cost.memory else "not recorded"
    return time, memory, human_bytes(cost.disk)


def _basis(found: Forecast) -> str:
    """Describe what the figures are extrapolated from."""
    extrapolated = ", ".join(
        f"{wanted:,} {what} from {there:,}"
        for what, wanted, there in (
            ("runs", found.runs, 1),
            ("steps", found.steps, found.recorded_steps),
            ("examples", found.examples, found.recorded_examples),
            ("queries", found.queries, found.given_queries),
        )
        if wanted != there
    )
    return "Measured on one run, a few examples and queries" + f"; extrapolated: {extrapolated}." * bool(extrapolated)
