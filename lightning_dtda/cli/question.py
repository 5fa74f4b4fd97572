"""Options of all commands that measure an ensemble: its configuration, queries and measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from lightning_dtda.cli.configuration_cli import CONFIG, ConfigurationCLI
from lightning_dtda.errors import AttributionError
from lightning_dtda.execution.quiet import quiet_lightning
from lightning_dtda.replay import Draws
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.manifest import MANIFEST

Split = Literal["train", "validation", "test"]


class QuestionCLI(ConfigurationCLI):
    """Parser for the ensemble's saved configuration, unless another is given, and the options for measuring.

    Args:
        command: Name of the command.
        description: Description for ``--help``.
        arguments: Command line arguments.
        **kwargs: Keyword arguments for ``LightningCLI``.
    """

    def __init__(self, command: str, description: str, arguments: Sequence[str], **kwargs: Any) -> None:
        super().__init__(command, description, _with_configuration(list(arguments)), **kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ensemble", type=str, required=True, help="Directory of the recorded runs.")
        self.add_question_to_parser(parser)

    def add_question_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for measurement, queries and device."""
        parser.add_argument(
            "--measurement",
            type=str,
            default="loss",
            help="Quantity to measure: loss, margin, prediction, or the import path of a callable.",
        )
        parser.add_argument(
            "--queries.split", type=Split, default="validation", help="Data set to take the queries from."
        )
        parser.add_argument(
            "--queries.indices",
            type=int | list[int] | None,
            default=None,
            help="Indices of the queries in this data set; all by default.",
        )
        parser.add_argument("--device", type=str | None, default=None, help="Device to compute on, such as cuda.")

    def add_draws_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for measurements that draw random numbers."""
        parser.add_argument(
            "--measurement_draws",
            type=int,
            default=Draws.number,
            help="Number of draws to average over if the measurement draws random numbers.",
        )
        parser.add_argument("--measurement_seed", type=int, default=Draws.seed, help="Seed of these draws.")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Create no Trainer, because nothing is trained."""

    def question(self) -> dict[str, Any]:
        """Return the arguments that :func:`lightning_dtda.attribute` and ``check`` have in common."""
        ensemble = Ensemble.open(self.config.ensemble)
        with quiet_lightning():
            self.build()
        data = self.model if self.datamodule is None else self.datamodule
        return {
            "ensemble": ensemble,
            "module": self.model,
            "data": data,
            "queries": query_loader(data, self.config.queries.split, self.config.queries.indices),
            "measurement": self.config.measurement,
            "device": self.config.device,
        }


def query_loader(data: LightningDataModule | LightningModule, split: Split, indices: int | list[int] | None) -> Any:
    """Return a DataLoader over the queries, which are examples of one of the data module's data sets.

    Raises:
        AttributionError: If the split has no single DataLoader, or an index is out of range.
    """
    data.prepare_data()
    data.setup("test" if split == "test" else "fit")
    name = {"train": "train_dataloader", "validation": "val_dataloader", "test": "test_dataloader"}[split]
    if not is_overridden(name, data, LightningDataModule if isinstance(data, LightningDataModule) else LightningModule):
        raise AttributionError(f"{type(data).__name__} has no {name}. Define it, or choose another --queries.split.")
    loader = getattr(data, name)()
    if not isinstance(loader, DataLoader):
        raise AttributionError(
            f"The {split} split of {type(data).__name__} is a {type(loader).__name__}, not one DataLoader. Choose "
            "another --queries.split."
        )
    dataset: Dataset[Any] = loader.dataset
    length = len(dataset)  # type: ignore[arg-type]
    chosen = list(range(length)) if indices is None else [indices] if isinstance(indices, int) else indices
    if outside := [index for index in chosen if not 0 <= index < length]:
        raise AttributionError(
            f"--queries.indices contains {outside[0]}, but the {split} split has the examples 0 to {length - 1}."
        )
    if len(set(chosen)) != len(chosen):
        raise AttributionError(f"--queries.indices={chosen} contains an index twice. Give each index once.")
    return DataLoader(Subset(dataset, chosen), collate_fn=loader.collate_fn)


def _with_configuration(arguments: list[str]) -> list[str]:
    """Prepend the ensemble's saved configuration, unless one is given."""
    given = any(argument.split("=")[0] in ("--config", "-c", "-h", "--help", "--help-all") for argument in arguments)
    if given:
        return arguments
    root = option_value(arguments, "--ensemble")
    if root is None:
        raise AttributionError("Give --ensemble, the directory of the recorded runs. --help lists all options.")
    if not Path(root).is_dir():
        raise AttributionError(f"There is no directory {root}. Give the --ensemble of lightning-dtda record.")
    path = Path(root) / CONFIG
    if not path.exists():
        is_run = (Path(root) / MANIFEST).exists()
        raise AttributionError(
            f"{root} is a single run. Give its parent directory, that of the ensemble."
            if is_run
            else f"{root} has no {CONFIG}, so it was not recorded by lightning-dtda record. Give --config, or use "
            "lightning_dtda from Python."
        )
    return ["--config", str(path), *arguments]


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option on a command line; ``None`` if it is not given."""
    for number, argument in enumerate(arguments):
        if argument == option and number + 1 < len(arguments):
            return arguments[number + 1]
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return None
