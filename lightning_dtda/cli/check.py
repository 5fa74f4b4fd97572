"""``lightning-dtda check``: can attributions of an ensemble be trusted?"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from typing_extensions import override

from lightning_dtda.attribution.attribution_store import AttributionStore
from lightning_dtda.cli.question import QuestionCLI
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator
from lightning_dtda.evaluation.checking import check
from lightning_dtda.evaluation.ranking import Ranking
from lightning_dtda.reporting.formatting import escape
from lightning_dtda.units import human_seconds

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
        parser.add_argument(
            "--estimators",
            type=list[Estimator] | None,
            default=None,
            help="Estimators to compare, at least two: which one predicts replays without random tenths of the data?",
        )
        parser.add_argument(
            "--attribution",
            type=str | None,
            default=None,
            help="Directory of an attribution of these runs to store the results with, for the verdict of its reports.",
        )
        parser.add_argument("--sets", type=int, default=20, help="For --estimators: number of random tenths.")


def run(arguments: Sequence[str]) -> None:
    """Check an ensemble and print the results.

    Raises:
        SystemExit: With code 1 if a check fails.
    """
    cli = CheckCLI(
        "check",
        "Replay the runs of an ensemble, compare responses with finite differences of retraining, and check whether "
        "the runs agree. The exit code is 1 if a check fails.",
        arguments,
    )
    question, config = cli.question(), cli.config
    estimators = cli.config_init.estimators or ()
    if config.attribution is not None and not AttributionStore.is_at(config.attribution):
        raise AttributionError(f"--attribution {config.attribution} holds no attribution. Give the directory of one.")
    found = check(**question, examples=config.examples, estimators=estimators, sets=config.sets)
    if config.attribution is not None:
        found.save(config.attribution)
    console = Console(highlight=False)
    for result in found.results:
        mark = "[green]passed[/]" if result.passed else "[red]failed[/]"
        console.print(f"{mark}  [bold]{result.name}[/]: {escape(result.figure)}. {escape(result.advice)}")
    console.print(
        f"metasmoothness: {found.metasmoothness:.2f}. The weight of a fifth of the examples was lowered in two "
        "equal steps: 1 if the parameters move in the same direction both times, 0 if the second change is unrelated "
        "to the first. If it is low, predictions of large removals are rough."
    )
    if found.ranking is not None:
        _print(found.ranking, console)
    if not found.passed:
        raise SystemExit(1)


def _print(ranking: Ranking, console: Console) -> None:
    first = next(iter(ranking.evaluations.values()))
    console.print(
        f"estimators: rank correlation of predicted and real mean influence over {first.subsets} random tenths, with "
        f"its 95% interval. {first.runs} runs were repeated with the weights of these examples set to zero."
    )
    for name, evaluation in ranking.evaluations.items():
        score = evaluation.scores["mean"]
        console.print(
            f"{score.score:6.3f} [{score.low:.2f}, {score.high:.2f}]  {name}, {human_seconds(ranking.seconds[name])}",
            markup=False,
        )
    console.print(ranking.advice, markup=False)
