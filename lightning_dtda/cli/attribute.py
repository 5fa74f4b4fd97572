"""``lightning-dtda attribute``: what the training examples of an ensemble do to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, Dataset, Subset
from typing_extensions import override

from lightning_dtda.attribution import attribute
from lightning_dtda.cli.configuration import CONFIG, ConfigurationCLI, quiet_lightning
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Estimator, UnrolledDifferentiation
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.manifest import MANIFEST

Split = Literal["train", "validation", "test"]


class AttributeCLI(ConfigurationCLI):
    """The ensemble's configuration and what is asked of it."""

    own_options = ("ensemble", "output", "overwrite", "estimator", "measurement", "queries", "device", "wandb")

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ensemble", type=str, required=True, help="Directory of the recorded runs.")
        parser.add_argument("--output", type=str, required=True, help="Directory for the attribution.")
        parser.add_argument("--overwrite", action="store_true", help="Replace the answer to another question.")
        parser.add_subclass_arguments(Estimator, "estimator", help="How responses are computed.")
        parser.set_defaults({"estimator": {"class_path": _class_path(UnrolledDifferentiation)}})
        parser.add_argument(
            "--measurement", type=str, default="loss", help="loss, margin, prediction, or a callable's import path."
        )
        parser.add_argument(
            "--queries.split", type=Split, default="validation", help="The data set that queries are taken from."
        )
        parser.add_argument(
            "--queries.indices",
            type=int | list[int] | None,
            default=None,
            help="Which of its examples; all if not given.",
        )
        parser.add_argument("--device", type=str | None, default=None, help="Where to compute, e.g. cuda.")
        parser.add_argument("--wandb", action="store_true", help="Log the result as one summary run to W&B.")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Make no Trainer: nothing is trained."""


def run(arguments: Sequence[str]) -> None:
    """Attribute an ensemble, print a summary, and log it to W&B if asked.

    Raises:
        AttributionError: If the ensemble has no configuration of its own and none is given.
    """
    cli = AttributeCLI(
        "attribute",
        "Predict what removing each training example does to the measurements of an ensemble. The configuration is "
        "the one that the ensemble was recorded with.",
        _with_configuration(list(arguments)),
    )
    config = cli.config
    ensemble = Ensemble.open(config.ensemble)
    with quiet_lightning():
        cli.build()
    data = cli.model if cli.datamodule is None else cli.datamodule
    attribution = attribute(
        ensemble,
        cli.model,
        data,
        queries=query_loader(data, config.queries.split, config.queries.indices),
        measurement=config.measurement,
        estimator=cli.config_init.estimator,
        output=config.output,
        overwrite=config.overwrite,
        device=config.device,
    )
    from lightning_dtda.reporting import log_to_wandb, print_summary

    print_summary(attribution)
    print(f"The attribution is in {config.output}; lightning-dtda report --attribution {config.output} shows it.")
    if config.wandb:
        log_to_wandb(attribution, config.output, project=_project(Path(config.ensemble)))


def query_loader(data: LightningDataModule | LightningModule, split: Split, indices: int | list[int] | None) -> Any:
    """Return a DataLoader over the queries: examples of one of the data module's own data sets.

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
            f"--queries.indices has {outside[0]}; the {split} split has the examples 0 to {length - 1}."
        )
    if len(set(chosen)) != len(chosen):
        raise AttributionError(f"--queries.indices={chosen} has a query twice.")
    return DataLoader(Subset(dataset, chosen), collate_fn=loader.collate_fn)


def _with_configuration(arguments: list[str]) -> list[str]:
    """Put the ensemble's own saved configuration in front, unless one is given."""
    given = any(argument.split("=")[0] in ("--config", "-c", "-h", "--help") for argument in arguments)
    root = _value(arguments, "--ensemble")
    if given:
        return arguments
    if root is None:
        raise AttributionError("Give --ensemble, the directory of the recorded runs. --help lists all options.")
    if not Path(root).is_dir():
        raise AttributionError(f"There is no directory {root}. Give the --ensemble of lightning-dtda record.")
    path = Path(root) / CONFIG
    if not path.exists():
        is_run = (Path(root) / MANIFEST).exists()
        raise AttributionError(
            f"{root} is a single run. Give its parent, the ensemble."
            if is_run
            else f"{root} has no {CONFIG}: it was not recorded by lightning-dtda record. Give --config, or call "
            "lightning_dtda.attribute from Python."
        )
    return ["--config", str(path), *arguments]


def _value(arguments: list[str], option: str) -> str | None:
    for number, argument in enumerate(arguments):
        if argument == option and number + 1 < len(arguments):
            return arguments[number + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _project(root: Path) -> str | None:
    """Return the W&B project that the runs were logged to, so that the summary stands beside them."""
    path = root / CONFIG
    loggers = yaml.safe_load(path.read_text())["trainer"].get("logger") if path.exists() else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict) and logger.get("class_path", "").endswith("WandbLogger"):
            project: str | None = logger.get("init_args", {}).get("project")
            return project
    return None


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
