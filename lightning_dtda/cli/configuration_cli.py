"""The user's ordinary LightningCLI configuration, with a command's own options beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_dtda.errors import DTDAError
from lightning_dtda.execution import Workers
from lightning_dtda.stacking.choice import Stacked
from lightning_dtda.trajectory.manifest import MANIFEST, changed_leaves

CONFIG = "config.yaml"

_METHOD_OPTIONS = ("ckpt_path", "weights_only")
"""What ``fit --print_config`` and ``SaveConfigCallback`` add to a configuration: options of ``Trainer.fit``."""


class ConfigurationCLI(LightningCLI):
    """Parses ``model``, ``data``, ``trainer``, ``optimizer``, ``lr_scheduler`` and builds them only when asked.

    Args:
        command: The command's name, for help texts.
        description: One sentence for ``--help``.
        arguments: Command line arguments.
        **kwargs: To ``LightningCLI``.
    """

    usage = "--ensemble DIR [--config FILE]"
    """The options that matter, for ``--help``."""

    def __init__(self, command: str, description: str, arguments: Sequence[str], **kwargs: Any) -> None:
        super().__init__(
            args=list(arguments),
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            # an own usage: the list of all options is longer than a screen and hides the error below it
            parser_kwargs={
                "prog": f"lightning-dtda {command}",
                "usage": f"lightning-dtda {command} {self.usage} [options]; --help lists them",
                "description": description,
            },
            **kwargs,
        )

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        for option in _METHOD_OPTIONS:
            parser.add_argument(f"--{option}", type=Any, default=None, help="Every run trains from the start.")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # LightningCLI's own warns whenever sys.argv is not empty
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        if self.config.get("ckpt_path"):
            raise DTDAError(
                "ckpt_path is set: a training that starts from a checkpoint has steps that are in no record. Set it to "
                "null."
            )

    def add_workers_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where work is done."""
        parser.add_argument(
            "--workers",
            type=int | Workers,
            default=1,
            help="Where: a number of processes of this machine; or RayCluster, with --workers.gpus 0.5 and the like.",
        )

    def add_stacked_to_parser(self, parser: LightningArgumentParser, default: Stacked) -> None:
        """Add how trainings are done."""
        parser.add_argument(
            "--stacked",
            type=Stacked,
            default=default,
            help="false: one by one, by the Trainer. true: many at once on one device, after the Trainer has done the "
            "first. auto: at once where that can be.",
        )
        parser.add_argument(
            "--compile",
            type=bool | None,
            default=None,
            help="Whether stacks are compiled; if not given, where there is enough to do.",
        )

    def workers(self) -> int | Workers:
        """Return who works, without making anything else."""
        parser = ArgumentParser()
        parser.add_argument("--workers", type=int | Workers)
        return parser.instantiate(parser.parse_object({"workers": self.config.workers})).workers

    @override
    def instantiate_classes(self) -> None:
        """Do nothing yet: commands build the classes themselves, once a seed."""

    def build(self) -> None:
        """Make ``model``, ``datamodule`` and ``trainer`` afresh."""
        super().instantiate_classes()

    def dump(self, without: Sequence[str]) -> dict[str, Any]:
        """Return the configuration in plain types, without the command's own options, which are named."""
        text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False)
        content: dict[str, Any] = yaml.safe_load(text)
        for option in ("config", *_METHOD_OPTIONS, *without):
            content.pop(option, None)
        return content


def save_configuration(root: Path, content: dict[str, Any]) -> None:
    """Write an ensemble's configuration, or make sure that it is the one that is there.

    Raises:
        DTDAError: If the ensemble was recorded with another configuration; the message lists what differs.
    """
    path = root / CONFIG
    # what seeds the ensemble is the command's business, not the configuration's
    content = {key: value for key, value in content.items() if key != "seed_everything"}
    if path.exists():
        changes = list(changed_leaves(yaml.safe_load(path.read_text()), content))
        if not changes:  # and not written once more, while another job may be reading it
            return
        if any(root.glob(f"*/{MANIFEST}")):  # what was refused before it recorded anything is no matter
            listed = "\n".join(f"  {where}: {before!r} there, {now!r} now" for where, before, now in changes)
            raise DTDAError(
                f"{root} was recorded with another configuration:\n{listed}\nChoose another --ensemble, or delete that "
                "one."
            )
    try:
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise DTDAError(f"{root} cannot be written ({error}). Choose another --ensemble.") from error


def read_json_option(option: str, path: str, error: type[DTDAError]) -> Any:
    """Return the content of the JSON file that an option names.

    Args:
        option: The option.
        path: The file.
        error: Raised if it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{option} {path} cannot be read ({reason}). Give a JSON file.") from reason
