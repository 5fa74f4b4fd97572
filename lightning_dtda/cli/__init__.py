"""The command line: ``lightning-dtda plan | record | attribute | ...``, each a call of one function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dtda.errors import DTDAError
from lightning_dtda.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {
    "plan": "say what disk, memory and time recording and attributing will take, and what to choose",
    "record": "train a LightningCLI configuration over many seeds and record every step",
    "attribute": "predict what removing each training example does to the measurements of an ensemble",
    "retrain": "train without subsets of the examples, as ground truth for attributions",
    "evaluate": "compare what attributions predict with what retraining shows",
    "check": "see whether attributions of an ensemble can be trusted",
    "suggest": "suggest examples whose removal together makes a measurement better or less dependent on the seed",
    "report": "write an attribution as one HTML file",
    "export": "write influences, and how sure they are, to a Parquet, Zarr or netCDF file",
    "demo": "record, attribute and report 20 seeds on scikit-learn's diabetes data",
}

_USAGE = "\n".join(
    [
        "usage: lightning-dtda COMMAND [--help] ...",
        "",
        "Distributional training data attribution for PyTorch Lightning.",
        "",
        *(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()),
        "",
        "lightning-dtda COMMAND --help lists a command's options.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: As on the command line, without the program's name; ``None`` takes ``sys.argv``.

    Raises:
        SystemExit: With code 0 where only help or the version was asked for, 1 where the command failed, 2 where the
            arguments are wrong.
    """
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    rest = rest[:-1]
    if command in ("", "-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if command else 2)
    if command == "--version":
        print(f"lightning-dtda {__version__}")
        raise SystemExit(0)
    if command not in COMMANDS:
        print(f"{_USAGE}\n\nlightning-dtda: error: there is no command {command!r}", file=sys.stderr)
        raise SystemExit(2)
    # a console script, unlike python -m, leaves the working directory out of sys.path, where class_paths are looked up
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        # each command's module on its own: reading a report's options need not import lightning
        importlib.import_module(f"lightning_dtda.cli.{command}").run(rest)
    except KeyboardInterrupt:
        print(f"lightning-dtda {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except DTDAError as error:
        print(f"lightning-dtda {command}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def add_differences(parser: ArgumentParser) -> None:
    """Add the option that says by which differences between distributions influences are shown."""
    parser.add_argument(
        "--differences",
        type=str,
        nargs="+",
        default=None,
        help="mean, variance, wasserstein (the paper's, if not given), energy, quantile, tail, gaussian_kl, or import "
        "paths of your own.",
    )
