"""The runs of one configuration: samples of the distribution of trained models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory.example_checksums import list_examples
from lightning_dtda.trajectory.manifest import MANIFEST, mismatch
from lightning_dtda.trajectory.run import Run, changed_examples


class Ensemble(Sequence[Run]):
    """Seeded runs of the same configuration.

    Args:
        runs: Complete runs.
        root: Directory that holds them.

    Raises:
        TrajectoryError: If there are no runs, or their configurations differ; the message lists the differing fields.
    """

    def __init__(self, runs: Sequence[Run], root: str | Path) -> None:
        if not runs:
            raise TrajectoryError(
                f"{root} holds no complete run. Record some with Trainer(callbacks=[TrajectoryRecorder(root)]) or "
                "lightning-dtda record."
            )
        self.root = Path(root)
        self.runs = tuple(runs)
        first = self.runs[0].manifest.comparable
        for run in self.runs[1:]:
            if found := mismatch(first, run.manifest.comparable):
                raise TrajectoryError(
                    f"{self.runs[0].path} and {run.path} have different configurations, so they are not samples of "
                    f"one distribution:\n{found}\nKeep each configuration in a separate directory."
                )
            if changed := changed_examples(self.runs[0], run):
                raise TrajectoryError(
                    f"{self.runs[0].path} and {run.path} were trained on different data, so they are not samples of "
                    f"one distribution. Different: example {list_examples(changed)}. Keep runs on different data in "
                    "separate directories."
                )

    @classmethod
    def open(cls, root: str | Path) -> Ensemble:
        """Open the complete runs in a directory; incomplete ones are left out with a warning that names them.

        Args:
            root: ``root`` of the recorder.

        Raises:
            TrajectoryError: If there is no complete run, a file is damaged, or configurations differ.
        """
        root = Path(root)
        if not root.is_dir():
            raise TrajectoryError(f"{root} is not a directory. Pass the root directory of the recorded runs.")
        if (root / MANIFEST).exists():
            raise TrajectoryError(f"{root} is a single run. Pass its parent, the root directory of the recorded runs.")
        runs = [Run(path.parent) for path in sorted(root.glob(f"*/{MANIFEST}"))]
        incomplete = [run for run in runs if not run.complete]
        if incomplete:
            warnings.warn(
                "Incomplete runs were left out: "
                + ", ".join(f"{run.name} ({run.steps} steps, {_how_it_ended(run)})" for run in incomplete),
                stacklevel=2,
            )
        return cls([run for run in runs if run.complete], root)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: Any) -> Any:
        return Ensemble(self.runs[index], self.root) if isinstance(index, slice) else self.runs[index]

    def __repr__(self) -> str:
        return f"Ensemble({str(self.root)!r}, runs={len(self)}, steps={sorted({run.steps for run in self})})"

    @property
    def examples(self) -> int:
        """N, the number of training examples."""
        return self.runs[0].manifest.configuration["dataset"]["length"]


def _how_it_ended(run: Run) -> str:
    manifest = next(process.manifest for process in run.processes if process.manifest.status != "complete")
    return "still recording or killed" if manifest.status == "recording" else str(manifest.reason)
