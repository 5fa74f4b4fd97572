"""``lightning-dtda demo``: all steps on a real data set that needs no download."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_dtda.cli.weights_and_biases import add_wandb
from lightning_dtda.errors import DTDAError

QUERIES = 20
"""Number of queries, from the start of the validation set: enough to see differences, few enough for a minute."""


def run(arguments: Sequence[str]) -> None:
    """Record, attribute and report; another call continues where the first one stopped.

    Raises:
        DTDAError: If scikit-learn, which provides the data, is not installed.
    """
    parser = ArgumentParser(
        prog="lightning-dtda demo",
        description="Record 20 seeds of a small network on scikit-learn's diabetes data (442 patients), predict how "
        "removing each patient changes the loss on 20 others, and write the report.",
    )
    parser.add_argument("--directory", type=str, default="lightning-dtda-demo", help="Directory for all output.")
    parser.add_argument("--seeds", type=int, default=20, help="Number of runs.")
    parser.add_argument("--workers", type=int, default=1, help="Number of processes that train at the same time.")
    add_wandb(parser)
    options = parser.parse_args(list(arguments))
    if importlib.util.find_spec("sklearn") is None:
        raise DTDAError(
            'The demo needs scikit-learn for its data. Install it with: pip install "lightning-dtda[examples]"'
        )
    # imported here to keep --help fast
    from lightning_dtda.cli import attribute, record, report

    directory = Path(options.directory)
    ensemble, attribution = directory / "diabetes", directory / "attribution"
    configuration = files("lightning_dtda.demo") / "diabetes.yaml"
    seeds = ["--seeds", str(options.seeds), "--workers", str(options.workers)]
    record.run(["--config", str(configuration), "--ensemble", str(ensemble), *seeds])
    queries = f"--queries.indices={list(range(QUERIES))}"
    # a squared error, which the square root keeps from being predicted below zero
    asked = ["--ensemble", str(ensemble), "--output", str(attribution), queries, "--scale", "sqrt"]
    asked += ["--show", "lightning_dtda.demo.diabetes.show_patient"]
    attribute.run([*asked, *(["--wandb"] if options.wandb else [])])
    report.run(["--attribution", str(attribution), "--output", str(directory / "report.html")])
