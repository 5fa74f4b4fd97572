"""The user's LightningCLI configuration, together with a command's own options."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_dtda import estimators
from lightning_dtda.cli import find_own_modules
from lightning_dtda.cli.help import OwnHelp, PlainHelp
from lightning_dtda.errors import DTDAError
from lightning_dtda.estimators import curvatures
from lightning_dtda.execution import Workers
from lightning_dtda.stacking.choice import Stacked
from lightning_dtda.text import did_you_mean
from lightning_dtda.trajectory.manifest import MANIFEST, changed_leaves
from lightning_dtda.trajectory.storage import replace_file

CONFIG = "config.yaml"

_METHOD_OPTIONS = ("ckpt_path", "weights_only")
"""Options of ``Trainer.fit`` that ``fit --print_config`` and ``SaveConfigCallback`` add to a configuration."""


class ConfigurationParser(LightningArgumentParser):
    """Suggests a class where the name of one is misspelt."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        suggestion = ""
        if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
            suggestion = did_you_mean(found[2], dir(sys.modules.get(found[1])))
        elif found := re.search(r"Expected a dot import path string: (\w+)", message):
            suggestion = did_you_mean(found[1], [*estimators.__all__, *curvatures.__all__])
        super().error(f"{message}\n{suggestion.strip()}".rstrip(), ex)


class ConfigurationCLI(LightningCLI):
    """Parses ``model``, ``data``, ``trainer``, ``optimizer`` and ``lr_scheduler``, and builds them only on request.

    Args:
        command: Name of the command, for help texts.
        description: Description for ``--help``.
        arguments: Command line arguments.
        **kwargs: Keyword arguments for ``LightningCLI``.
    """

    usage = "--ensemble DIR [--config FILE]"
    """Main options, for ``--help``."""

    def __init__(self, command: str, description: str, arguments: Sequence[str], **kwargs: Any) -> None:
        find_own_modules()  # the configuration may name classes there
        everything = "--help-all" in arguments
        super().__init__(
            args=["--help" if argument == "--help-all" else argument for argument in arguments],
            run=False,
            save_config_callback=None,
            parser_class=ConfigurationParser,
            seed_everything_default=False,
            # a usage of our own: the list of all options is longer than a screen and hides the error below it
            parser_kwargs={
                "prog": f"lightning-dtda {command}",
                "usage": f"lightning-dtda {command} {self.usage} [options]; --help lists them",
                "description": f"{description} The options of the configuration, --model, --data, --trainer, "
                "--optimizer and --lr_scheduler, are listed by --help-all.",
                "formatter_class": PlainHelp if everything else OwnHelp,
            },
            **kwargs,
        )

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        for option in _METHOD_OPTIONS:
            parser.add_argument(
                f"--{option}", type=Any, default=None, help="Must be null, because every run trains from the start."
            )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI's method warns whenever sys.argv is not empty
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        if self.config.get("ckpt_path"):
            raise DTDAError(
                "ckpt_path is set, but the steps before a checkpoint are in no record. Remove it, or set it to null, "
                "to train from the start."
            )

    def add_workers_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the option for where to run the work."""
        parser.add_argument(
            "--workers",
            type=int | Workers,
            default=1,
            help="Where to run: a number of processes on this machine; or RayCluster, with options such as "
            "--workers.gpus 0.5.",
        )

    def add_stacked_to_parser(self, parser: LightningArgumentParser, default: Stacked) -> None:
        """Add the options for stacking trainings."""
        parser.add_argument(
            "--stacked",
            type=Stacked,
            default=default,
            help="How to train: false, one by one with the Trainer; true, many at once on one device, after the "
            "Trainer has run the first; auto, many at once if possible.",
        )
        parser.add_argument(
            "--compile",
            type=bool | None,
            default=None,
            help="Whether to compile stacked trainings with torch.compile; by default, if there is enough work.",
        )

    def workers(self) -> int | Workers:
        """Build and return the workers only."""
        parser = ArgumentParser()
        parser.add_argument("--workers", type=int | Workers)
        return parser.instantiate(parser.parse_object({"workers": self.config.workers})).workers

    @override
    def instantiate_classes(self) -> None:
        """Do nothing yet: commands build the classes themselves, once per seed."""

    def build(self) -> None:
        """Create new ``model``, ``datamodule`` and ``trainer``.

        Raises:
            DTDAError: If Lightning rejects the configuration.
        """
        try:
            super().instantiate_classes()
        except MisconfigurationException as error:
            raise DTDAError(f"Lightning rejects the configuration: {error}") from error

    def dump(self, without: Sequence[str]) -> dict[str, Any]:
        """Return the configuration in plain types, without the given options of the command."""
        text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False)
        content: dict[str, Any] = yaml.safe_load(text)
        for option in ("config", *_METHOD_OPTIONS, *without):
            content.pop(option, None)
        return content


def save_configuration(root: Path, content: dict[str, Any]) -> None:
    """Write an ensemble's configuration, or check that it is the same as the existing one.

    Raises:
        DTDAError: If the ensemble was recorded with another configuration, or the file cannot be written. The message
            lists what differs.
    """
    path = root / CONFIG
    # the command chooses the seeds, not the configuration
    content = {key: value for key, value in content.items() if key != "seed_everything"}
    if path.exists():
        changes = list(changed_leaves(read_configuration(path), content))
        if not changes:  # and do not write it again while another job may be reading it
            return
        if any(root.glob(f"*/{MANIFEST}")):  # otherwise nothing was recorded with it
            listed = "\n".join(f"  {where}: {before!r} there, {now!r} now" for where, before, now in changes)
            raise DTDAError(
                f"{root} was recorded with another configuration:\n{listed}\nChoose another --ensemble, or delete this "
                "one."
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        replace_file(path, yaml.safe_dump(content, sort_keys=False).encode())
    except OSError as error:
        raise DTDAError(f"{root} cannot be written to ({error}). Choose another --ensemble.") from error


def read_configuration(path: Path) -> dict[str, Any]:
    """Read an ensemble's configuration.

    Raises:
        DTDAError: If it cannot be read.
    """
    try:
        if not path.is_file():  # reading a pipe may never end
            raise ValueError("it is not a regular file")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a configuration")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DTDAError(f"{path} cannot be read ({error}). Delete it, or put the recorded one back.") from error
    return content


def read_json_option(option: str, path: str, error: type[DTDAError]) -> Any:
    """Return the content of the JSON file that an option names, or of JSON that is given in its place.

    Args:
        option: Name of the option.
        path: Path of the file, or a list or object in JSON.
        error: Type of error to raise if it cannot be read.
    """
    try:
        return json.loads(path if path.lstrip().startswith(("[", "{")) else Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{option} {path} cannot be read ({reason}). Give a JSON file.") from reason
