"""``lightning-dtda evaluate``: compare attributions with ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_dtda.cli import add_differences, say
from lightning_dtda.cli.weights_and_biases import add_wandb, logger_of, recorded_runs
from lightning_dtda.errors import AttributionError


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
    add_wandb(parser)
    options = parser.parse_args(list(arguments))
    # imported here to keep --help fast
    from lightning_dtda import Attribution, GroundTruth, evaluate
    from lightning_dtda.evaluation import compare
    from lightning_dtda.reporting.evaluations import print_evaluations
    from lightning_dtda.trajectory.storage import replace_file

    truth = GroundTruth.load(options.truth)
    attributions = {path: Attribution.load(path).independent() for path in options.attribution}
    evaluations = {path: evaluate(each, truth, options.differences) for path, each in attributions.items()}
    short = _short_names(options.attribution)
    print_evaluations({short[path]: evaluation for path, evaluation in evaluations.items()})
    first = evaluations[options.attribution[0]]
    gains = {path: compare(evaluation, first) for path, evaluation in evaluations.items()}
    if options.output is not None:
        content = {
            path: evaluation.content() | {"less_first": {name: asdict(each) for name, each in gains[path].items()}}
            for path, evaluation in evaluations.items()
        }
        try:
            replace_file(Path(options.output), json.dumps(content, indent=1).encode())
        except OSError as error:
            raise AttributionError(
                f"{options.output} cannot be written to ({error}). Choose another --output."
            ) from error
        say(f"All figures are in {options.output}.")
    if options.wandb:
        from lightning_dtda.reporting import log_evaluation_to_wandb

        for path, evaluation in evaluations.items():
            log_evaluation_to_wandb(
                evaluation,
                short[path],
                attribution=path,
                truth=options.truth,
                gains=gains[path] if evaluation is not first else None,
                ensemble=attributions[path].about.get("ensemble"),
                **logger_of(recorded_runs(attributions[path])),
            )


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Shorten the paths of attributions to their last part if that is unique, as table columns are few."""
    short = {path: Path(path).name for path in paths}
    return short if len(set(short.values())) == len(short) else {path: path for path in paths}
