"""``lightning-dtda report``: an attribution as one HTML file, or its findings as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser

from lightning_dtda.cli import add_differences, say
from lightning_dtda.cli.weights_and_biases import add_wandb, logger_of, recorded_runs


def run(arguments: Sequence[str]) -> None:
    """Write the report and print its path."""
    parser = ArgumentParser(
        prog="lightning-dtda report",
        description="Write an attribution as one HTML file that opens without a network, what was found as JSON, or a "
        "section of Markdown for a model card.",
    )
    parser.add_argument("--attribution", type=str, required=True, help="Directory of the attribution.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="File to write; by default report.html, report.json or stability-card.md, after the format.",
    )
    parser.add_argument(
        "--format",
        type=Literal["html", "json", "card"] | None,
        default=None,
        help="html: a page for people; json: for programs; card: Markdown for a model card. By default after the "
        "ending of the output.",
    )
    parser.add_argument(
        "--k", type=int, default=10, help="Least number of examples to list for each query and difference."
    )
    parser.add_argument(
        "--truth", type=str | None, default=None, help="Directory of a ground truth to show the predictions beside."
    )
    add_differences(parser)
    add_wandb(parser)
    options = parser.parse_args(list(arguments))
    # imported here to keep --help fast
    from lightning_dtda import Attribution, GroundTruth, report

    attribution = Attribution.load(options.attribution)
    truth = None if options.truth is None else GroundTruth.load(options.truth)
    output = options.output or {"json": "report.json", "card": "stability-card.md"}.get(options.format, "report.html")
    path = report(attribution, output, k=options.k, differences=options.differences, truth=truth, format=options.format)
    say(f"The report is {path}{'; open it in a browser' if path.suffix == '.html' else ''}.")
    if options.wandb:
        from lightning_dtda.reporting import log_to_wandb

        ensemble = recorded_runs(attribution)
        settings = logger_of(ensemble)
        log_to_wandb(attribution, ensemble=ensemble, k=options.k, differences=options.differences, **settings)
