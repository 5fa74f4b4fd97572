"""``lightning-dtda check``: can attributions of an ensemble be trusted?"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from typing_extensions import override

from lightning_dtda.attribution.checking import check
from lightning_dtda.cli.question import QuestionCLI
from lightning_dtda.reporting.formatting import escape

_QUERIES = 5
"""Number of validation examples to check by default."""


class CheckCLI(QuestionCLI):
    """Parser for the ensemble's configuration and the options of ``check``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"queries.indices": list(range(_QUERIES))})
        parser.add_argument(
            "--examples",
            type=int,
            default=3,
            help="Number of training examples whose responses are compared with retraining.",
        )


def run(arguments: Sequence[str]) -> None:
    """Check an ensemble and print the findings.

    Raises:
        SystemExit: With code 1 if a check fails.
    """
    cli = CheckCLI(
        "check",
        "Replay the runs of an ensemble, compare responses with finite differences of retraining, and check whether "
        "the runs agree. The exit code is 1 if a check fails.",
        arguments,
    )
    found = check(**cli.question(), examples=cli.config.examples)
    console = Console(highlight=False)
    for finding in found.findings:
        mark = "[green]passed[/]" if finding.passed else "[red]failed[/]"
        console.print(f"{mark}  [bold]{finding.name}[/]: {escape(finding.figure)}. {escape(finding.advice)}")
    console.print(
        f"metasmoothness: {found.metasmoothness:.2f}. The weight of a fifth of the examples was lowered in two "
        "equal steps: 1 if the parameters move in the same direction both times, 0 if the second change is unrelated "
        "to the first. If it is low, predictions of large removals are rough."
    )
    if not found.passed:
        raise SystemExit(1)
