"""``lightning-dtda attribute``: influence of the training examples of an ensemble on measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lightning_dtda.attribution import attribute
from lightning_dtda.attribution.answering import damping_path
from lightning_dtda.attribution.attribution_store import AttributionStore, read_index
from lightning_dtda.attribution.scales import ScaleName
from lightning_dtda.cli import add_differences, say, stoppable
from lightning_dtda.cli.configuration_cli import read_json_option
from lightning_dtda.cli.question import QuestionCLI
from lightning_dtda.cli.weights_and_biases import add_wandb, logger_of
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator, UnrolledDifferentiation
from lightning_dtda.estimators.removals import LEAVE_ONE_OUT
from lightning_dtda.statistics.differences import resolve_difference
from lightning_dtda.trajectory import Ensemble


class AttributeCLI(QuestionCLI):
    """Parser for the ensemble's configuration and the options of ``attribute``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        self.add_draws_to_parser(parser)
        parser.add_argument("--output", type=str, required=True, help="Directory for the attribution.")
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace an existing attribution with other settings."
        )
        parser.add_argument(
            "--removals",
            type=str,
            default=LEAVE_ONE_OUT,
            help="What to remove: leave-one-out; column:KEY for one group per label, where KEY is the position or key "
            "of the label in the data set's items; or a JSON file with lists of indices, an object with lists of "
            "indices by name, or a list with a label for each example.",
        )
        parser.add_argument(
            "--step", type=int | None, default=None, help="Step to measure at; the end of training by default."
        )
        parser.add_argument(
            "--scale",
            type=ScaleName,
            default="linear",
            help="Scale of the predictions, which keeps them where the measurement can be: sqrt for losses, logit "
            "for probabilities. Another call changes it at once.",
        )
        parser.add_argument(
            "--keep_top",
            type=int | None,
            default=None,
            help="For more responses than can be stored: for each query, keep the responses to this many examples with "
            "the largest and smallest mean and variance influence, and mean, variance and spread of every example with "
            "standard errors.",
        )
        parser.add_argument(
            "--scratch_budget",
            type=float,
            default=2.0,
            help="For --keep_top: disk space in GiB for a block of queries until its top examples are known.",
        )
        parser.add_subclass_arguments(Estimator, "estimator", help="Estimator of the responses.")
        default = f"{UnrolledDifferentiation.__module__}.{UnrolledDifferentiation.__qualname__}"
        parser.set_defaults({"estimator": {"class_path": default}})
        parser.add_argument(
            "--dampings",
            type=list[float | Literal["auto"]] | None,
            default=None,
            help="Dampings of influence functions to compute from one fit of the curvature: --dampings=[0.01,0.1,auto] "
            "writes the attributions OUTPUT/damping-0.01 and so on.",
        )
        self.add_workers_to_parser(parser)
        add_differences(parser, "mean and spread")
        parser.add_argument(
            "--verbose", action="store_true", help="Print how the question was answered, and more of each query."
        )
        parser.add_argument(
            "--show",
            type=str | None,
            default=None,
            help="Import path of a function that shows an item of the data to people: it returns a PIL image, a tensor "
            "or array, a text, a dictionary, or a figure. Another call changes it at once.",
        )
        parser.add_argument(
            "--query_names",
            type=list[str] | str | None,
            default=None,
            help="Names of the queries for people, in their order: a list, or a JSON file with one.",
        )
        add_wandb(parser)


def run(arguments: Sequence[str]) -> None:
    """Attribute an ensemble, print a summary, and log it to W&B if requested.

    Raises:
        AttributionError: If neither the ensemble nor ``--config`` provides a configuration.
    """
    cli = AttributeCLI(
        "attribute",
        "Predict how removing each training example changes the measurements of an ensemble. The configuration is "
        "that of the recording unless --config is given.",
        arguments,
    )
    from lightning_dtda.reporting import print_summary  # imported here to keep --help fast
    from lightning_dtda.reporting.commands import Command, keep_command

    for difference in cli.config.differences or ():
        resolve_difference(difference)  # a wrong name is an error before the work, not after it
    config, output = cli.config, Path(cli.config.output)
    last = damping_path(output, config.dampings[-1]) if config.dampings else output
    with stoppable("attribute", lambda: _progress(last)):
        found: Any = attribute(
            **cli.question()
            | {
                "removals": read_removals(config.removals),
                "step": config.step,
                "scale": config.scale,
                "measurement_draws": config.measurement_draws,
                "measurement_seed": config.measurement_seed,
                "estimator": cli.config_init.estimator,
                "dampings": config.dampings,
                "output": output,
                "overwrite": config.overwrite,
                "keep_top": config.keep_top,
                "scratch_budget": config.scratch_budget,
                "workers": cli.workers(),
                "show": config.show,
                "query_names": read_names(config.query_names),
            }
        )
    answers = found if isinstance(found, dict) else {None: found}
    for damping, attribution in answers.items():
        path = output if damping is None else damping_path(output, damping)
        keep_command(path, Command(tuple(arguments), str(config.ensemble)))
        print_summary(attribution, differences=config.differences, verbose=config.verbose, progress=True)
        say(f"The attribution is in {path}; lightning-dtda report --attribution {path} shows it.")
        if config.wandb:
            from lightning_dtda.reporting import log_to_wandb

            ensemble = Ensemble.open(config.ensemble)
            log_to_wandb(attribution, path, ensemble=ensemble, differences=config.differences, **logger_of(ensemble))


def _progress(output: Path) -> str:
    """Return how much of an attribution is stored."""
    index = read_index(output) if AttributionStore.is_at(output) else {}
    if "blocks" in index:
        return f"{len(index['blocks'])} blocks of queries are finished in {output}"
    return f"{len(index.get('runs', ()))} of {len(index.get('wanted', ()))} runs are attributed in {output}"


def read_removals(removals: str) -> Any:
    """Return the ``removals`` argument of :func:`lightning_dtda.attribute`: the content of a JSON file, or the text.

    Raises:
        AttributionError: If the file cannot be read, or its content is invalid.
    """
    if not removals.endswith(".json") and not removals.lstrip().startswith(("[", "{")):
        return removals
    content = read_json_option("--removals", removals, AttributionError)
    if not isinstance(content, (dict, list)):
        raise AttributionError(
            f"--removals {removals} contains {content!r}. It must be a list of lists of indices, an object with lists "
            "of indices by name, or a list with a label for each example."
        )
    return content


def read_names(names: list[str] | str | None) -> Any:
    """Return the ``query_names`` argument of :func:`lightning_dtda.attribute`: a list as it is, or that of a JSON file.

    Raises:
        AttributionError: If the file cannot be read.
    """
    return read_json_option("--query_names", names, AttributionError) if isinstance(names, str) else names
