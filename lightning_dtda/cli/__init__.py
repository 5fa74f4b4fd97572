"""Command line: ``lightning-dtda plan | record | attribute | ...``, where each command calls one public function."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dtda.errors import DTDAError
from lightning_dtda.interruption import Terminated, ended_by_sigterm
from lightning_dtda.text import did_you_mean, printable
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
            wrong, 130 after Ctrl+C, 143 after SIGTERM.
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
        print(_USAGE, file=sys.stderr)
        _complain("lightning-dtda: error", f"there is no command {command!r}.{did_you_mean(command, COMMANDS)}")
        raise SystemExit(2)
    try:
        with ended_by_sigterm(), stoppable(command), _printable_warnings():
            # import only the command's module: most commands need lightning, which takes seconds to import
            importlib.import_module(f"lightning_dtda.cli.{command}").run(rest)
    except (DTDAError, OSError) as error:
        _complain(f"lightning-dtda {command}: error", str(error))
        raise SystemExit(1) from error


@contextmanager
def stoppable(command: str, progress: Callable[[], str] | None = None) -> Iterator[None]:
    """End a command with one line after Ctrl+C and SIGTERM, and with the exit code that other programs have then.

    Args:
        command: Name of the command.
        progress: Function that says how far the command has come, if the same command continues from there.

    Raises:
        SystemExit: With code 130 after Ctrl+C, 143 after SIGTERM.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as end:
        by, code = ("Ctrl+C", 130) if isinstance(end, KeyboardInterrupt) else ("SIGTERM", end.code)
        far = "nothing was written" if progress is None else f"{progress()}; the same command continues"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a training speaks for all
            _complain(f"lightning-dtda {command}", f"stopped by {by}: {far}.")
        raise SystemExit(code) from None


def say(text: str) -> None:
    """Print a line to standard output."""
    print(printable(text))


def _complain(who: str, text: str) -> None:
    print(printable(f"{who}: {text}"), file=sys.stderr)


@contextmanager
def _printable_warnings() -> Iterator[None]:
    """Escape what names in warnings could do to the terminal."""
    original = warnings.formatwarning
    warnings.formatwarning = lambda *of_warning, **more: printable(original(*of_warning, **more))
    try:
        yield
    finally:
        warnings.formatwarning = original


def find_own_modules() -> None:
    """Let import paths name modules in the working directory, which a console script does not see.

    They come last: a file beside the data that happens to be called ``html.py`` must not replace Python's module.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def add_differences(parser: ArgumentParser, shown: str = "mean, spread and wasserstein") -> None:
    """Add the option for the differences between distributions to show.

    Args:
        parser: Parser of a command.
        shown: Differences that the command shows by default.
    """
    parser.add_argument(
        "--differences",
        type=_difference,
        nargs="+",
        default=None,
        help="Differences to show: mean, spread, variance, wasserstein, energy, quantile, tail, gaussian_kl, or import "
        f"paths of your own classes. Default: {shown}.",
    )


def _difference(name: str) -> str:
    """Return the name, or import path, of a difference."""
    if "." in name:
        find_own_modules()
    return name
