"""Command line: ``lightning-dtda plan | record | attribute | ...``, where each command calls one public function."""

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
    "plan": "estimate the disk space, memory and time for recording and attributing, and recommend settings",
    "record": "train a LightningCLI configuration over many seeds and record every step",
    "attribute": "predict how removing each training example changes the measurements of an ensemble",
    "retrain": "train without subsets of the examples, as ground truth for attributions",
    "evaluate": "compare the predictions of attributions with retraining",
    "check": "check whether attributions of an ensemble can be trusted",
    "suggest": "suggest examples whose removal improves a measurement or makes it depend less on the seed",
    "report": "write an attribution as one HTML file",
    "export": "write influences and their uncertainty to a Parquet, Zarr or netCDF file",
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
        arguments: Command line arguments without the program's name; ``None`` for those of ``sys.argv``.

    Raises:
        SystemExit: With code 0 after printing help or the version, 1 if the command failed, 2 if the arguments are
            wrong.
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
    # unlike python -m, a console script does not put the working directory, where class_paths may be, on sys.path
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        # import only the command's module: parsing the options of report does not need lightning
        importlib.import_module(f"lightning_dtda.cli.{command}").run(rest)
    except KeyboardInterrupt:
        print(f"lightning-dtda {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except DTDAError as error:
        print(f"lightning-dtda {command}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def add_differences(parser: ArgumentParser) -> None:
    """Add the option for the differences between distributions to show."""
    parser.add_argument(
        "--differences",
        type=str,
        nargs="+",
        default=None,
        help="Differences to show: mean, variance, wasserstein (these three by default), energy, quantile, tail, "
        "gaussian_kl, or import paths of your own classes.",
    )
