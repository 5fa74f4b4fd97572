"""``lightning-dtda evaluate``: attributions against ground truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.cli import add_differences
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import Evaluation, compare, evaluate
from lightning_dtda.reporting.evaluations import print_evaluations
from lightning_dtda.retraining.ground_truth import GroundTruth


def run(arguments: Sequence[str]) -> None:
    """Print the scores of attributions and how far they are from the first's, and write them to a file if asked.

    Raises:
        AttributionError: If attribution and truth are not about the same, or the file cannot be written.
    """
    parser = ArgumentParser(
        prog="lightning-dtda evaluate",
        description="Compare what attributions predict with what retraining shows: linear datamodeling scores, with "
        "intervals and the noise ceiling; of several attributions, the "
        "differences to the first with intervals of their own.",
    )
    parser.add_argument("--attribution", type=str, nargs="+", required=True, help="Directories of attributions.")
    parser.add_argument("--truth", type=str, required=True, help="Directory of the ground truth.")
    parser.add_argument("--output", type=str | None, default=None, help="A JSON file for all figures.")
    add_differences(parser)
    options = parser.parse_args(list(arguments))
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
            Path(options.output).write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            raise AttributionError(f"{options.output} cannot be written ({error}). Choose another output.") from error
        print(f"All figures are in {options.output}.")


def _by_short_name(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Call attributions by the last part of their path where that tells them apart: a table has few columns."""
    short = {Path(path).name: evaluation for path, evaluation in evaluations.items()}
    return short if len(short) == len(evaluations) else dict(evaluations)
