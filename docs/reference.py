"""A Sphinx extension that writes the reference from the code: the API, by what packages export, and commands' options.

It does so before each build, so that no list of names or options has to be kept up by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

ROOMS = {
    "lightning_dtda": "The main names",
    "lightning_dtda.recording": "Recording",
    "lightning_dtda.attribution": "Attribution",
    "lightning_dtda.statistics": "Statistics",
    "lightning_dtda.estimators": "Estimators",
    "lightning_dtda.retraining": "Retraining",
    "lightning_dtda.evaluation": "Evaluation",
    "lightning_dtda.reporting": "Reporting",
    "lightning_dtda.plot": "Figures",
    "lightning_dtda.execution": "Where work runs",
    "lightning_dtda.trajectory": "Recorded runs",
    "lightning_dtda.optimizers": "Optimizers",
    "lightning_dtda.errors": "Errors",
}
"""Packages whose exports are documented, and the title of each one's page."""

INTERNAL = {"is_being_written", "run_name", "RunWriter", "ThisProcess", "workers_of"}
"""What packages export for each other only."""

EXTENDING = (
    "lightning_dtda.estimators.forward.forward_sweep",
    "lightning_dtda.estimators.null_space.null_space_response",
    "lightning_dtda.estimators.null_space.range_share",
    "lightning_dtda.estimators.objective.Objective",
    "lightning_dtda.replay.Point",
    "lightning_dtda.replay.Position",
    "lightning_dtda.replay.Replay",
    "lightning_dtda.replay.StepBatch",
    "lightning_dtda.replay.Tangents",
    "lightning_dtda.replay.training_examples",
)
"""What is of use to those who write an estimator, but is not exported by the package of estimators."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for what there is to build."""
    write_api(Path(app.srcdir) / "api")
    write_commands(Path(app.srcdir) / "commands.md")
    app.connect("config-inited", _name_pages)
    return {"parallel_read_safe": True}


def _name_pages(app: Sphinx, config: Config) -> None:
    """Tell autosummary whose tables to make pages for: by itself it overlooks files that were not there before."""
    config.autosummary_generate = [f"api/{path.name}" for path in sorted((Path(app.srcdir) / "api").glob("*.md"))]


def write_api(folder: Path) -> None:
    """Write one page for each package, with a table of what it exports; autosummary makes the objects' pages."""
    folder.mkdir(exist_ok=True)
    written: set[int] = set()
    for room, title in ROOMS.items():
        package = importlib.import_module(room)
        found = {name: getattr(package, name) for name in getattr(package, "__all__", vars(package))}
        # each object once: on the page of the first package that exports it
        names = sorted(
            name
            for name, value in found.items()
            if name not in INTERNAL
            and id(value) not in written
            and callable(value)
            and getattr(value, "__module__", "").startswith("lightning_dtda")
        )
        written |= {id(found[name]) for name in names}
        summary = (package.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        page = folder / f"{room.removeprefix('lightning_dtda.')}.md"
        _write(page, _table(title, [f".. currentmodule:: {room}", "", summary], names))
    purpose = "What an :doc:`estimator of your own </extend>` may use."
    _write(folder / "extending.md", _table("Parts of estimators", [purpose], [f"~{name}" for name in EXTENDING]))


def _table(title: str, head: list[str], names: list[str]) -> str:
    """Return a page with a table of objects, each with its first sentence and a link to its own page."""
    body = [*head, "", ".. autosummary::", "   :toctree:", "   :nosignatures:", "", *(f"   {name}" for name in names)]
    return "\n".join([f"# {title}", "", "```{eval-rst}", *body, "```", ""])


def write_commands(path: Path) -> None:
    """Write each command's own options, as ``--help`` prints them."""
    from lightning_dtda.cli import COMMANDS, main

    os.environ["COLUMNS"] = "88"  # argparse wraps to it; wider lines would be cut off in a page
    parts = []
    for command, purpose in COMMANDS.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
        shown = "".join(character for character in printed.getvalue() if character.isprintable() or character == "\n")
        parts.append(f"## {command}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{shown.strip()}\n```\n")
    _write(path, "\n".join(parts))


def _write(path: Path, text: str) -> None:
    """Write a page if it changed, so that Sphinx does not build it again for nothing."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
