"""``lightning-dtda evaluate``: compare attributions with ground truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from lightning_dtda.cli import add_differences, say
from lightning_dtda.errors import AttributionError

if TYPE_CHECKING:
    from lightning_dtda.evaluation import Evaluation


def run(arguments: Sequence[str]) -> None:
    """Print the scores of attributions and their differences from the first, and write them to a file if requested.

    Raises:
        AttributionError: If an attribution and the truth do not match, or the file cannot be written.
    """
    parser = ArgumentParser(
        prog="lightning-dtda evaluate",
        description="Compare the predictions of attributions with retraining: linear datamodeling scores with "
        "intervals and the noise ceiling; for several attributions, also the differences from the first, with "
        "intervals.",
    )
    parser.add_argument("--attribution", type=str, nargs="+", required=True, help="Directories of attributions.")
    parser.add_argument("--truth", type=str, required=True, help="Directory of the ground truth.")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file to write all figures to.")
    add_differences(parser, "mean, variance and wasserstein")
    options = parser.parse_args(list(arguments))
    # imported here to keep --help fast
    from lightning_dtda import Attribution, GroundTruth, evaluate
    from lightning_dtda.evaluation import compare
    from lightning_dtda.reporting.evaluations import print_evaluations
    from lightning_dtda.trajectory.storage import replace_file

    truth = GroundTruth.load(options.truth)
    evaluations = {path: evaluate(Attribution.load(path), truth, options.differences) for path in options.attribution}
    print_evaluations(_by_short_name(evaluations))
    if options.output is not None:
        first = evaluations[options.attribution[0]]
        content = {
            path: evaluation.content()
            | {"less_first": {name: asdict(each) for name, each in compare(evaluation, first).items()}}
            for path, evaluation in evaluations.items()
        }
        try:
            replace_file(Path(options.output), json.dumps(content, indent=1).encode())
        except OSError as error:
            raise AttributionError(
                f"{options.output} cannot be written to ({error}). Choose another --output."
            ) from error
        say(f"All figures are in {options.output}.")


def _by_short_name(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Shorten the names of attributions to the last part of their path if that is unique, as table columns are few."""
    short = {Path(path).name: evaluation for path, evaluation in evaluations.items()}
    return short if len(short) == len(evaluations) else dict(evaluations)
