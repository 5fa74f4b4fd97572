"""Ground truth: measurements of models that were actually trained without some examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor

from lightning_dtda.errors import RetrainingError
from lightning_dtda.retraining.task import Task
from lightning_dtda.retraining.truth_store import About, TruthStore
from lightning_dtda.statistics.differences import Difference, resolve_difference
from lightning_dtda.statistics.samples import as_array
from lightning_dtda.trajectory.schema import FLOATS, Count, Expected, check_tensors, conform

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False)
class GroundTruth:
    r"""Measurements of models trained on all data, and of models trained without subsets of it.

    ``about["removal"]`` says what removal means. With ``"drop"``, the examples are deleted, and order and batches are
    those of the smaller data set; each seed is a new training. With ``"reweight"``, recorded trainings are repeated
    with the weights of the examples set to zero; the measurements of a seed with and without the examples are a pair.

    Args:
        measurements: Measurement m of the models trained without each subset ``(subsets, seeds, queries)``; NaN if a
            training is missing, see :attr:`unfinished`.
        baseline: Measurement m of the models trained on all examples ``(baseline_seeds, queries)``.
        removed: Indices of the training examples in each subset.
        queries: Names of the queries: their indices in the original data set.
        seeds: Seeds of the trainings with removed subsets.
        baseline_seeds: Seeds of the trainings on all examples.
        about: What was trained and how, as JSON: removal, measurement, engine, module, data, versions.

    Raises:
        RetrainingError: If the shapes, data types or ``about`` do not fit.

    Example:
        >>> measurements = torch.tensor([[[1.0], [3.0]], [[0.0], [8.0]]])
        >>> truth = GroundTruth(measurements, torch.tensor([[2.0], [4.0]]), ((0, 5), (3,)), (7,), (0, 1), (0, 1))
        >>> truth.influence("mean")
        tensor([[-1.,  1.]], dtype=torch.float64)
        >>> truth.influence("variance")
        tensor([[ 0., 30.]], dtype=torch.float64)
    """

    measurements: Tensor
    baseline: Tensor
    removed: tuple[tuple[int, ...], ...]
    queries: tuple[int, ...]
    seeds: tuple[int, ...]
    baseline_seeds: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        conform(self.about, About, "about", RetrainingError)
        queries = Annotated[list[int], msgspec.Meta(min_length=1)]
        conform(self.queries, queries, "queries", RetrainingError)
        conform(self.removed, list[list[Count]], "removed", RetrainingError)
        conform(self.seeds, list[Count], "seeds", RetrainingError)
        conform(self.baseline_seeds, list[Count], "baseline_seeds", RetrainingError)
        sizes = {"subsets": len(self.removed), "seeds": len(self.seeds), "baseline seeds": len(self.baseline_seeds)}
        expected: dict[str, Expected] = {
            "measurements": (FLOATS, ("subsets", "seeds", "queries")),
            "baseline": (FLOATS, ("baseline seeds", "queries")),
        }
        tensors = {name: getattr(self, name) for name in expected}
        check_tensors(tensors, expected, "GroundTruth", sizes | {"queries": len(self.queries)}, RetrainingError)

    def __repr__(self) -> str:
        subsets, seeds, queries = self.measurements.shape
        return f"GroundTruth({subsets} subsets, {seeds} seeds, {queries} queries, {self.measurement}, {self.removal})"

    @property
    def removal(self) -> str:
        """How examples were removed: ``"drop"`` or ``"reweight"``."""
        return str(self.about.get("removal", "drop"))

    @property
    def measurement(self) -> str:
        """Name of the measurement."""
        return str(self.about.get("measurement", "measurement"))

    @property
    def unfinished(self) -> tuple[Task, ...]:
        """Missing trainings, which are not done yet, failed, or diverged."""
        of_all = [Task(None, self.baseline_seeds[s]) for s in self.baseline.isnan().any(1).nonzero()[:, 0].tolist()]
        missing = self.measurements.isnan().any(2).nonzero().tolist()
        return (*of_all, *(Task(subset, self.seeds[s]) for subset, s in missing))

    def finished(self) -> GroundTruth:
        """Return the complete part of the ground truth: the subsets and seeds that keep the most trainings.

        Raises:
            RetrainingError: If no part is complete.
        """
        there = ~self.measurements.isnan().any(2)
        order = there.sum(1).argsort(descending=True, stable=True).tolist()
        # take subsets in order of their number of trainings, up to where the seeds they all have leave most trainings
        common = [there[order[: number + 1]].all(0) for number in range(len(order))]
        kept = [(number + 1) * int(seeds.sum()) for number, seeds in enumerate(common)]
        best = max(range(len(order)), key=lambda number: (kept[number], number), default=-1)
        subsets = sorted(order[: best + 1])
        seeds = common[best].nonzero()[:, 0].tolist() if subsets else []
        baseline_seeds = (~self.baseline.isnan().any(1)).nonzero()[:, 0].tolist()
        if self.removal == "reweight":  # pairs stay pairs
            seeds = baseline_seeds = sorted(set(seeds) & set(baseline_seeds))
        if not (subsets and seeds and baseline_seeds):
            raise RetrainingError(
                f"{len(self.unfinished)} trainings are missing, and no part of the ground truth is complete. "
                "Call retrain again with the same output to continue."
            )
        return replace(
            self,
            measurements=self.measurements[subsets][:, seeds],
            baseline=self.baseline[baseline_seeds],
            removed=tuple(self.removed[k] for k in subsets),
            seeds=tuple(self.seeds[s] for s in seeds),
            baseline_seeds=tuple(self.baseline_seeds[s] for s in baseline_seeds),
        )

    def influence(self, difference: str | Difference) -> Tensor:
        """Return the actual distributional influence of each subset ``(queries, subsets)``, float64.

        Args:
            difference: ``mean``, ``variance``, ``wasserstein``, the import path of a class, or a
                :class:`~lightning_dtda.statistics.differences.Difference` between X, measured with all data, and Y,
                measured without the subset.

        Raises:
            RetrainingError: If trainings are missing or too few, or if the difference compares run by run and the
                numbers of seeds and baseline seeds differ.
        """
        chosen = resolve_difference(difference)
        if self.unfinished:
            raise RetrainingError(
                f"{len(self.unfinished)} trainings are missing ({some_tasks(self.unfinished)}). Call retrain again "
                "with the same output to continue, or use the complete part: truth.finished()."
            )
        if (seeds := min(len(self.seeds), len(self.baseline_seeds))) < chosen.least_runs:
            raise RetrainingError(
                f"The {chosen.name} influence needs at least {chosen.least_runs} seeds and baseline seeds, but there "
                f"are only {seeds}. Retrain with more."
            )
        if chosen.paired and len(self.seeds) != len(self.baseline_seeds):
            raise RetrainingError(
                f"The {chosen.name} influence compares run by run, but there are {len(self.baseline_seeds)} baseline "
                f"seeds for {len(self.seeds)} seeds. Retrain with equal numbers of both."
            )
        # in double precision: a change of the variance is a small difference of large squares
        of_queries = [
            chosen(self.baseline[:, q, None].double(), self.measurements[:, :, q].T.double())
            for q in range(len(self.queries))
        ]
        return torch.stack(of_queries)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the ground truth to a directory.

        Args:
            path: Directory to write to, which is created if it does not exist.
            overwrite: Whether to replace an existing ground truth.

        Raises:
            RetrainingError: If the directory holds a ground truth that may not be replaced, or anything else.
        """
        if not overwrite and TruthStore.is_at(path):
            raise RetrainingError(f"{path} holds a ground truth. Choose another path, or save with overwrite=True.")
        store = TruthStore.create(
            path, self.about, self.queries, self.removed, self.seeds, self.baseline_seeds, overwrite
        )
        missing = set(self.unfinished)
        for subset, seeds, values in (
            (None, self.baseline_seeds, self.baseline),
            *((k, self.seeds, values) for k, values in enumerate(self.measurements)),
        ):
            rows = [row for row, seed in enumerate(seeds) if Task(subset, seed) not in missing]
            if rows:
                store.add([Task(subset, seeds[row]) for row in rows], values[rows])

    @classmethod
    def load(cls, path: str | Path) -> GroundTruth:
        """Read a ground truth; if it is unfinished, missing trainings are NaN, with a warning.

        Raises:
            TrajectoryError: If files are missing or damaged.
        """
        store = TruthStore.open(path)
        truth = cls(
            *store.read(store.removed, store.seeds, store.baseline_seeds),
            removed=store.removed,
            queries=store.queries,
            seeds=store.seeds,
            baseline_seeds=store.baseline_seeds,
            about=store.about,
        )
        if truth.unfinished:
            warnings.warn(
                f"{path} is unfinished: {len(truth.unfinished)} trainings are missing "
                f"({some_tasks(truth.unfinished)}). Call retrain again with this output to continue.",
                stacklevel=2,
            )
        return truth

    def to_xarray(self) -> xr.Dataset:
        """Return measurements and baseline with the dimensions ``subset``, ``seed``, ``baseline_seed`` and ``query``.

        ``size`` is the number of examples in each subset.
        """
        import xarray as xr

        return xr.Dataset(
            {
                "measurements": (("subset", "seed", "query"), as_array(self.measurements)),
                "baseline": (("baseline_seed", "query"), as_array(self.baseline)),
            },
            {
                "subset": range(len(self.removed)),
                "seed": list(self.seeds),
                "baseline_seed": list(self.baseline_seeds),
                "query": list(self.queries),
                "size": ("subset", [len(subset) for subset in self.removed]),
            },
            {key: str(value) for key, value in self.about.items()} | {"removed": str(self.removed)},
        )


def some_tasks(tasks: Sequence[Task], most: int = 5) -> str:
    """Name the first few trainings for an error message."""
    return ", ".join(map(str, tasks[:most])) + (f" and {len(tasks) - most} others" if len(tasks) > most else "")
