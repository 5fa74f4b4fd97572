"""A summary run of Weights & Biases: where it goes, what it is called, what it was made from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import wandb

from lightning_dtda.compatibility import log_as_input
from lightning_dtda.errors import AttributionError
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.trajectory.manifest import MANIFEST

MOST_SETTINGS = 40
"""Maximum number of values in a run's configuration: what the columns of W&B's table can hold."""

_PROJECT = "lightning-dtda"
_LONGEST_TAG = 64


@contextmanager
def summary_run(
    kind: str,
    name: str,
    config: Mapping[str, Any],
    tags: Iterable[str],
    notes: str,
    settings: Mapping[str, Any],
) -> Iterator[wandb.Run]:
    """Open a run beside the active one, if any.

    Project and group follow ``settings``, else W&B's environment variables ``WANDB_PROJECT`` and ``WANDB_RUN_GROUP``,
    else they are ``lightning-dtda`` and the name of the ensemble. W&B itself knows the others, such as
    ``WANDB_ENTITY``.

    Args:
        kind: What it shows; the run's job type and first tag.
        name: Name of the run: the question.
        config: Settings, the most important first; the first :data:`MOST_SETTINGS` are logged.
        tags: More tags; those of ``WANDB_TAGS`` are added.
        notes: What was found, in sentences.
        settings: Arguments of ``wandb.init``, which come before everything else.
    """
    of_user = filter(None, os.environ.get("WANDB_TAGS", "").split(","))
    chosen: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT") or _PROJECT,
        "group": os.environ.get("WANDB_RUN_GROUP") or config.get("ensemble"),
        "job_type": kind,
        "name": name,
        "config": dict(islice(((key, value) for key, value in config.items() if value is not None), MOST_SETTINGS)),
        "tags": list(dict.fromkeys(tag[:_LONGEST_TAG] for tag in (kind, *tags, *of_user))),
        "notes": notes,
        "reinit": "create_new",
        # the load of this machine and what other code prints meanwhile are no part of what was found
        "settings": {"x_disable_stats": True, "console": "off"},
    }
    with wandb.init(**chosen | {key: value for key, value in settings.items() if value is not None}) as run:
        yield run


def artifact(kind: str, name: object, directory: str | Path, metadata: Mapping[str, Any]) -> wandb.Artifact:
    """Return a directory as an artifact; the same content is the same version, whichever run logs or uses it.

    Raises:
        AttributionError: If there is no such directory.
    """
    if not Path(directory).is_dir():
        raise AttributionError(f"The directory {directory} does not exist. Save what is to be logged there first.")
    made = _artifact(kind, name, metadata)
    made.add_dir(str(directory))
    return made


def recording(ensemble: Ensemble) -> wandb.Artifact:
    """Return an artifact that stands for the recorded runs: their manifests, which have the checksums of all files."""
    metadata = {"directory": str(ensemble.root.resolve()), "runs": len(ensemble)}
    made = _artifact("recording", ensemble.root.name, metadata)
    for run in ensemble:
        made.add_file(str(run.path / MANIFEST), name=f"{run.name}/{MANIFEST}")
    return made


def use(run: wandb.Run, made: wandb.Artifact) -> None:
    """Log an artifact as an input of a run, which draws the line between them in W&B's graph of the lineage."""
    if run.offline:
        log_as_input(run, made)
    elif not run.disabled:
        run.use_artifact(made)


def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested settings, named ``prefix/key``; the one value of a list stands for the list."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from leaves(f"{prefix}/{key}", below)
    else:
        yield prefix, value[0] if isinstance(value, list) and len(value) == 1 else value


def known(value: float) -> float | None:
    """Return a number as W&B's JSON can hold it: ``None`` if it is NaN or infinite."""
    return value if math.isfinite(value) else None


def _artifact(kind: str, name: object, metadata: Mapping[str, Any]) -> wandb.Artifact:
    allowed = re.sub(r"[^\w.-]+", "-", f"{kind}-{name or 'ensemble'}", flags=re.ASCII)
    return wandb.Artifact(allowed, type=kind, metadata=dict(metadata))
