"""``lightning-dtda check``: can attributions of an ensemble be trusted?"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.markup import escape
from typing_extensions import override

from lightning_dtda.attribution.checking import check
from lightning_dtda.cli.question import QuestionCLI

_QUERIES = 5
"""Examples of the validation set that are checked where no others are asked for."""


class CheckCLI(QuestionCLI):
    """What is checked."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"queries.indices": list(range(_QUERIES))})
        parser.add_argument(
            "--examples", type=int, default=3, help="Training examples whose responses are compared with retraining."
        )


def run(arguments: Sequence[str]) -> None:
    """Check an ensemble and print what was found.

    Raises:
        SystemExit: With code 1 if something is not as it should be.
    """
    cli = CheckCLI(
        "check",
        "Replay the runs of an ensemble, compare responses with finite differences of retraining, and see whether the "
        "runs agree. Exit code 1 if something is not as it should be.",
        arguments,
    )
    found = check(**cli.question(), examples=cli.config.examples)
    console = Console(highlight=False)
    for finding in found.findings:
        mark = "[green]passed[/]" if finding.passed else "[red]failed[/]"
        console.print(f"{mark}  [bold]{finding.name}[/]: {escape(finding.figure)}. {escape(finding.advice)}")
    console.print(
        f"metasmoothness: {found.metasmoothness:.2f}. Of a fifth of the examples, taking away the second half of the "
        "weight moves the parameters as taking away the first did: 1 in every parameter, 0 in as many as not. Where it "
        "is low, predictions of large removals are rough."
    )
    if not found.passed:
        raise SystemExit(1)
