"""What ``--help`` prints."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter
from typing_extensions import override

OTHERS = ("model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "ckpt_path", "weights_only")
"""Options of a LightningCLI configuration, which ``--help-all`` lists, too."""


class PlainHelp(DefaultHelpFormatter):
    """Help without the reST markup of the docstrings that it comes from."""

    @override
    def format_help(self) -> str:
        return re.sub(r":\w+:`~?([^`]*)`", r"\1", super().format_help()).replace("``", "")


class OwnHelp(PlainHelp):
    """Help on a command's own options only."""

    @override
    def add_argument(self, action: Action) -> None:
        if action.dest.split(".")[0] not in OTHERS:
            super().add_argument(action)
