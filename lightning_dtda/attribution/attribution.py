"""The result of an attribution: baseline, responses, and the influences they imply."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_dtda.attribution import inference, predicting, sources, tables
from lightning_dtda.attribution.about import About
from lightning_dtda.attribution.attribution_store import (
    OF_RUNS,
    AttributionStore,
    read_index,
    store_gallery,
    warn_unfinished,
)
from lightning_dtda.attribution.gallery import Gallery
from lightning_dtda.attribution.gallery.store import read_gallery
from lightning_dtda.attribution.inference import Runs
from lightning_dtda.attribution.kept import Figures, KeptResponses, check_keep_top, joined, keep_top, known_as
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.attribution.removed import positions_of_examples, positions_of_groups
from lightning_dtda.attribution.responses import AT_ONCE, in_parts
from lightning_dtda.attribution.scales import predicted
from lightning_dtda.attribution.trust import ill_conditioned, sizes
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.statistics.differences import Difference, resolve_joint
from lightning_dtda.statistics.resampling import jackknife
from lightning_dtda.trajectory.schema import FLOATS, Expected, FileName, check_tensors, conform

ENOUGH_RUNS = 8
"""Number of runs below which the standard error itself is uncertain by more than a quarter (1 / sqrt(2 (S - 1))), so it
does not reliably show whether an influence differs from zero; a warning says so."""


@dataclass(frozen=True, eq=False)
class Attribution:
    r"""Measurements of an ensemble and their predicted changes under removal.

    Removing an example means giving it weight zero: batch order, batch size and the loss's denominator stay the same
    (``"reweight"``). A removal is a single training example, or a group of them; see :attr:`removals`.

    Args:
        baseline: Measurements as trained, :math:`m(\theta_t)` ``(runs, queries)``.
        responses: Predicted change of m with each removal ``(runs, queries, removals)``, in m's unit. For a stored
            attribution, a :class:`~lightning_dtda.attribution.responses.StoredResponses`, which acts as a tensor; with
            :meth:`keep_top`, a :class:`~lightning_dtda.attribution.kept.KeptResponses`, which holds only a few of them.
        runs: Names of the runs.
        queries: Names of the queries: their indices in the data set they came from.
        about: Description of the attribution, as JSON: measurement, estimator, removals, drift, versions.
        gallery: The queries, and the examples with the largest influences, as people see them.
        path: Directory from which the attribution was loaded, if it was.

    Raises:
        AttributionError: If names, shapes or data types do not fit, or the number of groups in ``about`` differs from
            the number of removals. NaN is allowed; what is computed from it is NaN.

    Example:
        >>> responses = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
        >>> attribution = Attribution(torch.tensor([[5.0], [7.0]]), responses, ("seed-0000", "seed-0001"), (0,))
        >>> attribution.predict(removed=[0])
        tensor([[ 6.],
                [10.]])
        >>> attribution.influence("variance")
        tensor([[6., 0.]], dtype=torch.float64)
    """

    baseline: Tensor
    responses: Tensor
    runs: tuple[str, ...]
    queries: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict)
    gallery: Gallery = field(default_factory=Gallery)
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        conform(self.runs, list[FileName], "runs", AttributionError)
        conform(self.queries, list[int], "queries", AttributionError)
        conform(self.about, About, "about", AttributionError)
        if len(set(self.runs)) < len(self.runs):
            raise AttributionError(f"runs={self.runs} has a name twice. Give each run a name of its own.")
        expected: dict[str, Expected] = {
            "baseline": (FLOATS, ("runs", "queries")),
            "responses": (FLOATS, ("runs", "queries", "removals")),
        }
        tensors, sizes = {name: getattr(self, name) for name in expected}, {"runs": len(self.runs)}
        check_tensors(tensors, expected, "Attribution", sizes | {"queries": len(self.queries)}, AttributionError)
        if not all(self.responses.shape):
            raise AttributionError("An attribution needs at least one run, one query and one removal.")
        if self.removals is not None and len(self.removals) != self.responses.shape[2]:
            raise AttributionError(
                f"about names {len(self.removals)} groups; there are responses to {self.responses.shape[2]}."
            )

    def __repr__(self) -> str:
        runs, queries, removals = self.responses.shape
        what = "examples" if self.removals is None else "groups"
        step = "" if self.step is None else f" after step {self.step}"
        return f"Attribution({runs} runs, {queries} queries, {removals} {what}, {self.measurement}{step})"

    @property
    def removals(self) -> tuple[str, ...] | None:
        """Names of the groups of examples that are removed; ``None`` if each example is removed on its own."""
        groups = self.about.get("removals")
        return tuple(group["name"] for group in groups) if isinstance(groups, list) else None

    @property
    def members(self) -> tuple[tuple[int, ...], ...] | None:
        """Indices of each group's training examples, in the order of :attr:`removals`; ``None`` without groups."""
        groups = self.about.get("removals")
        return tuple(tuple(group["examples"]) for group in groups) if isinstance(groups, list) else None

    @property
    def step(self) -> int | None:
        """Step after which m was measured; ``None`` means the end of each run."""
        return self.about.get("step")

    @property
    def measurement(self) -> str:
        """Name of the measurement."""
        return str(self.about.get("measurement", "measurement"))

    @property
    def scale(self) -> str:
        """Scale on which predictions are made; see :meth:`on_scale`."""
        return str(self.about.get("scale", "linear"))

    @property
    def known_range(self) -> tuple[float, float]:
        """Lowest and highest value that the measurement can take; infinite where none is known.

        It follows from the operations that compute it, such as a squared error, or from the measurement's own attribute
        ``range``. It is unknown if a measurement as trained contradicts it.
        """
        low, high = self.about.get("range") or (None, None)
        ends = -math.inf if low is None else low, math.inf if high is None else high
        holds = bool(((self.baseline >= ends[0]) & (self.baseline <= ends[1])).all())
        return ends if holds else (-math.inf, math.inf)

    @property
    def chaotic(self) -> tuple[str, ...]:
        """Names of the runs whose responses are out of proportion to those of the others.

        :func:`~lightning_dtda.attribution.trust.chaotic` has the rule; it is applied when the runs are attributed.
        """
        named = self.about.get("chaotic", ())
        return tuple(run for run in self.runs if run in named)

    @property
    def ill_conditioned(self) -> tuple[str, ...]:
        """Names of the runs whose responses are dominated by rounding in the precision they were computed in.

        Empty if they were computed in double precision, or were not diagnosed.
        """
        estimator = self.about.get("estimator")
        if isinstance(estimator, dict) and estimator.get("precision") == "float64":
            return ()
        named = ill_conditioned(self.about.get("diagnosis", {}))
        return tuple(run for run in self.runs if run in named)

    def select(self, queries: Sequence[int]) -> Attribution:
        """Return the attribution of some queries, with their responses in memory.

        Args:
            queries: Positions of the queries.

        Raises:
            AttributionError: If a query does not exist, or is given twice.
        """
        positions = self._positions(queries)
        return replace(
            self,
            baseline=self.baseline[:, positions],
            responses=self.responses[:, positions],
            queries=tuple(self.queries[position] for position in positions),
        )

    def trusted(self) -> Attribution:
        """Return the attribution without the :attr:`chaotic` runs."""
        if not self.chaotic:
            return self
        return self._of([position for position, run in enumerate(self.runs) if run not in self.chaotic])

    def without_runs(self, runs: Sequence[str]) -> Attribution:
        """Return the attribution without some runs, such as one that diverged.

        Args:
            runs: Names of the runs.

        Raises:
            AttributionError: If a run does not exist, or none is left.
        """
        if unknown := set(runs) - set(self.runs):
            raise AttributionError(f"There is no run {min(unknown)}; the runs are {', '.join(self.runs)}.")
        kept = [position for position, run in enumerate(self.runs) if run not in runs]
        if not kept:
            raise AttributionError("No run would be left. Keep at least one.")
        return self._of(kept)

    def keep_top(self, k: int) -> Attribution:
        """Return an attribution that keeps the responses to a few removals for each query, and summary figures of all.

        For each query it keeps the responses of all runs to ``4 k`` removals: those with the k largest and the k
        smallest influences on the mean, and on the variance, over the trusted runs. Where these overlap, the next
        removals in order fill the places. For every removal it keeps the influence on mean, variance and spread, with
        standard errors, in the precision of the responses. So for ``"mean"``, ``"variance"`` and ``"spread"``,
        :meth:`influence`, :meth:`standard_error`, :meth:`p_values`, :meth:`significant`,
        :meth:`runs_for_significance` and :meth:`reliability` are the same as with all responses, as are
        :meth:`interval` for ``"mean"`` and ``"spread"``, and :meth:`top` up to k.
        :meth:`retrainings_needed`, and :meth:`interval` of other differences, are available for the removals that are
        kept. Anything that needs other responses raises an error.

        Args:
            k: Number of removals to keep at each end.

        Raises:
            AttributionError: If k is less than 1.
        """
        sources.refuse_crossed(self, "keep_top")
        return keep_top(self, check_keep_top(k))

    on_scale = predicting.on_scale
    out_of_range = predicting.out_of_range

    def predict(self, removed: Sequence[int | str]) -> Tensor:
        r"""Return samples ``(runs, queries)`` of the measurement's distribution without some examples.

        .. math:: m(\theta_t) + \sum_{k \in S} r_k

        or the same on another scale; see :meth:`on_scale`. For a group that is large, the real change may be larger:
        :class:`~lightning_dtda.estimators.ExactRemoval` computes it.

        Args:
            removed: Indices of the training examples, each at most once; with groups, their names or positions.

        Raises:
            AttributionError: If an example or group does not exist, or an example would be removed twice.
        """
        return self._predicted(self.baseline, self._response(removed))

    def influence(
        self, difference: str | Difference, removed: Sequence[int | str] | None = None, runs: Runs = "trusted"
    ) -> Tensor:
        """Return the distributional influence of each removal, or of several made together.

        Args:
            difference: Difference between the distributions: ``"mean"``, ``"spread"``, ``"variance"``,
                ``"wasserstein"``, ``"energy"``, ``"quantile"``, ``"tail"``, ``"gaussian_kl"``, the import path of a
                class, or a :class:`~lightning_dtda.statistics.differences.Difference`, such as ``Mean("median")`` or
                ``Tail(0.8)``.
            removed: Training examples, or groups, that are removed together, as for :meth:`predict`; ``None`` means
                each on its own.
            runs: Runs to use: ``"trusted"``, those that are not :attr:`chaotic`; or ``"all"``.

        Returns:
            Change of the property if the examples are removed ``(queries, removals)``, or ``(queries,)`` for removals
            made together; float64.

        Raises:
            AttributionError: If the difference needs more runs, or the removals cannot be made together.
        """
        selected = self._selected(runs)
        return selected._influence(selected._difference(difference), removed)

    def standard_error(
        self, difference: str | Difference, removed: Sequence[int | str] | None = None, runs: Runs = "trusted"
    ) -> Tensor:
        """Return the standard error of :meth:`influence` over runs; same arguments and shape.

        It shows how much the influence depends on the seeds, not how good the linear prediction is. It comes from the
        jackknife, or for quantiles from the bootstrap, because leaving out one run hardly changes a quantile; see
        :meth:`Difference.standard_error <lightning_dtda.statistics.Difference.standard_error>`.
        """
        selected = self._selected(runs)
        return selected._standard_error(selected._difference(difference, infers=True), removed)

    interval = inference.interval
    p_values = inference.p_values
    significant = inference.significant
    runs_for_significance = inference.runs_for_significance
    retrainings_needed = inference.retrainings_needed
    reliability = inference.reliability
    runs_for_stable_top = inference.runs_for_stable_top

    variance_by_source = sources.variance_by_source
    independent = sources.independent

    top = tables.top
    to_xarray = tables.to_xarray
    to_dataframe = tables.to_dataframe

    @property
    def available_differences(self) -> list[str]:
        """Names of the differences that tables and reports show: mean, spread, Wasserstein, if there are enough runs.

        For a crossed ensemble, whose runs are not independent, the mean and the parts of the variance.
        :meth:`influence` accepts others too. With :meth:`keep_top`, these are the ones known for every removal.
        """
        return tables.available_differences(self)

    @property
    def most_listed(self) -> int:
        """Maximum number of removals that :meth:`top` can list: all, or with :meth:`keep_top` its k."""
        return tables.most_listed(self)

    def joint_influence(
        self,
        difference: Difference | None = None,
        queries: Sequence[int] | None = None,
        removed: Sequence[int | str] | None = None,
        runs: Runs = "trusted",
    ) -> Tensor:
        """Return the influence of removals on the joint distribution of the measurements of several queries.

        The measurements of a run on several queries are one multivariate sample. Their dependence may change while the
        distribution of each stays the same.

        Args:
            difference: Difference between joint distributions; ``None`` means
                :class:`~lightning_dtda.statistics.differences.SlicedWasserstein`.
            queries: Positions of the queries; ``None`` means all.
            removed: As for :meth:`influence`.
            runs: As for :meth:`influence`.

        Returns:
            Influences ``(removals,)``, or ``()`` for removals made together; float64.

        Raises:
            AttributionError: If the difference is not joint, a query does not exist, or the removals cannot be made
                together.
        """
        selected = self._selected(runs)
        sources.refuse_crossed(selected, "a joint distribution")
        return selected._jointly(resolve_joint(difference), queries, removed)

    def joint_standard_error(
        self,
        difference: Difference | None = None,
        queries: Sequence[int] | None = None,
        removed: Sequence[int | str] | None = None,
        runs: Runs = "trusted",
    ) -> Tensor:
        """Return the jackknife standard error of :meth:`joint_influence`; same arguments and shape."""
        selected = self._selected(runs)
        sources.refuse_crossed(selected, "a standard error over runs")
        return selected._jointly(partial(jackknife, resolve_joint(difference)), queries, removed)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the attribution to a directory: a safetensors file for each run, ``attribution.json``, and the gallery.

        Args:
            path: Directory; it is created if it does not exist.
            overwrite: Whether to replace an attribution in the directory.

        Raises:
            AttributionError: If the directory holds an attribution and ``overwrite`` is false, or other files.
        """
        if not overwrite and AttributionStore.is_at(path):
            raise AttributionError(
                f"{path} already holds an attribution. Choose another path, or save with overwrite=True."
            )
        wanted = dict.fromkeys(self.runs)
        if isinstance(self.responses, KeptResponses):
            kept = KeptStore.create(path, self.about, self.queries, self.responses.shape[2], wanted, overwrite)
            for start in range(0, len(self.queries), size := max(1, AT_ONCE // self.responses.shape[2])):
                numbers = range(start, min(start + size, len(self.queries)))
                kept.add(numbers.start, self.select(numbers))
        else:
            store = AttributionStore.create(path, self.about, self.queries, self.responses.shape[2], wanted, overwrite)
            for number, run in enumerate(self.runs):
                known = {key: self.about[key][run] for key in OF_RUNS if run in self.about.get(key, {})}
                facts = {key: {} for key in OF_RUNS} | sizes(self.responses[number]) | known
                store.add(run, self.baseline[number], self.responses[number], facts)
        if self.gallery != Gallery():
            store_gallery(Path(path), self.gallery)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Open a stored attribution. If it is unfinished, the result has the finished runs, and a warning says so.

        The responses stay on disk. Each computation reads the part that it needs, and verifies its checksum.

        Raises:
            TrajectoryError: If files are missing or damaged. Damaged responses raise it later, when they are read.
        """
        index = read_index(path)
        if "blocks" in index:
            kept = KeptStore(Path(path), index)
            missing = [str(kept.queries[n]) for stretch in kept.missing(kept.current) for n in stretch]
            warn_unfinished(path, "queries", missing)
            if not kept.current:
                raise TrajectoryError(f"{path} has no finished query. Call attribute again with this output.")
            answer = joined([cls(*kept.block(first)) for first in kept.current])
            return replace(answer, gallery=read_gallery(kept.path), path=kept.path)
        store = AttributionStore(Path(path), index)
        warn_unfinished(path, "runs", store.unfinished)
        baseline, responses = store.read()
        gallery = read_gallery(store.path)
        return cls(baseline, responses, store.finished, store.queries, store.about, gallery, store.path)

    def _predicted(self, baseline: Tensor, response: Tensor) -> Tensor:
        return predicted(self.scale, baseline, response)

    def _selected(self, runs: Runs) -> Attribution:
        if runs not in get_args(Runs):
            raise AttributionError(f"runs={runs!r}; choose from {', '.join(get_args(Runs))}.")
        return self.trusted() if runs == "trusted" else self

    def _of(self, positions: Sequence[int]) -> Attribution:
        names = tuple(self.runs[position] for position in positions)
        return replace(self, baseline=self.baseline[positions], responses=self.responses[positions], runs=names)

    def _influence(self, difference: Difference, removed: Sequence[int | str] | None = None) -> Tensor:
        if removed is None and (name := known_as(difference)) and self._figures is not None:
            return self._figures.of(f"{name}_influence")
        return self._each_query(difference, removed)

    def _standard_error(self, difference: Difference, removed: Sequence[int | str] | None = None) -> Tensor:
        if removed is None and (name := known_as(difference)) and self._figures is not None:
            return self._figures.of(f"{name}_standard_error")
        return self._each_query(difference.standard_error, removed, copies=4)

    @property
    def _figures(self) -> Figures | None:
        """The figures of every removal over these runs, if :meth:`keep_top` was used."""
        responses = self.responses
        return (
            responses.figures if isinstance(responses, KeptResponses) and responses.figures.runs == self.runs else None
        )

    def _enough(self, difference: Difference, least: int, what: str = "") -> None:
        subject = f"{what} of the {difference.name}" if what else difference.name
        if len(self.runs) < least:
            raise AttributionError(
                f"The {subject} influence needs {least} runs; there are {len(self.runs)}. Record more seeds."
            )

    _resolved = sources.resolved

    def _difference(self, difference: str | Difference, infers: bool = False) -> Difference:
        chosen, runs = self._resolved(difference, infers), len(self.runs)
        self._enough(chosen, chosen.least_runs)
        if runs < ENOUGH_RUNS:
            warnings.warn(
                f"Influences of {runs} runs: with fewer than {ENOUGH_RUNS}, the standard errors are themselves "
                "uncertain. Record more seeds.",
                stacklevel=3,
            )
        return chosen

    def _each_query(
        self,
        function: Any,
        removed: Sequence[int | str] | None,
        outputs: tuple[int, ...] = (),
        copies: int = 1,
        kept: bool = False,
    ) -> Tensor:
        """Apply a function of samples and predictions to all queries, ``outputs`` ``(*outputs, queries, removals)``.

        ``copies`` is the memory that the function needs, as a multiple of its argument. With ``kept``, only removals
        whose responses were kept are computed; the others are NaN.
        """
        responses = self.responses if removed is None else self._response(removed)[..., None]
        queries, removals = responses.shape[1:]
        found = torch.full((*outputs, queries, removals), torch.nan, dtype=torch.float64, device=responses.device)
        some = responses if kept and isinstance(responses, KeptResponses) else None
        table = responses if some is None else some.table
        size = max(1, AT_ONCE // (table.shape[0] * table.shape[2] * copies))  # many queries at once if they are small
        for start in range(0, queries, size):
            block = slice(start, min(start + size, queries))
            into = found[..., block, :]
            if some is None:
                in_parts(function, self.baseline, table, block, into, self.scale, copies)
                continue
            places = some.kept[block].expand(*outputs, -1, -1)
            known = into.gather(-1, places)
            in_parts(function, self.baseline, table, block, known, self.scale, copies)
            into.scatter_(-1, places, known)
        return found if removed is None else found.squeeze(-1)

    def _jointly(self, function: Any, queries: Sequence[int] | None, removed: Sequence[int | str] | None) -> Tensor:
        responses = self.responses if removed is None else self._response(removed)[..., None]
        positions = slice(None) if queries is None else self._positions(queries)
        found = torch.empty(responses.shape[2], dtype=torch.float64, device=responses.device)
        in_parts(function, self.baseline, responses, positions, found, self.scale)
        return found if removed is None else found.squeeze(-1)

    def _positions(self, queries: Sequence[int]) -> list[int]:
        positions = list(queries)
        if outside := [query for query in positions if not 0 <= query < len(self.queries)]:
            raise AttributionError(
                f"There is no query at position {outside[0]}; positions are 0 to {len(self.queries) - 1}."
            )
        if not positions or len(set(positions)) < len(positions):
            raise AttributionError(f"queries={positions}; give the positions of one or more queries, each only once.")
        return positions

    def _response(self, removed: Sequence[int | str]) -> Tensor:
        """Return the response ``(runs, queries)`` to removals that are made together."""
        names, members = self.removals, self.members
        if names is None or members is None:
            chosen = positions_of_examples(removed, self.responses.shape[2])
        else:
            chosen = positions_of_groups(removed, names, members)
        at_once = max(1, AT_ONCE // max(1, len(self.runs) * len(chosen)))
        queries = range(0, len(self.queries), at_once)
        return torch.cat([self.responses[:, start : start + at_once, chosen].sum(-1) for start in queries], 1)
