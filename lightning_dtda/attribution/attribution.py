"""What the data did to the distribution of models: baseline, responses, and the influences they imply."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_dtda.attribution import inference
from lightning_dtda.attribution.attribution_store import OF_RUNS, AttributionStore, read_index, warn_unfinished
from lightning_dtda.attribution.inference import Runs
from lightning_dtda.attribution.kept import Figures, KeptResponses, check_keep_top, joined, keep_top, moment_of
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.attribution.removed import positions_of_examples, positions_of_groups
from lightning_dtda.attribution.responses import AT_ONCE, in_parts
from lightning_dtda.attribution.tables import Tables
from lightning_dtda.attribution.trust import ill_conditioned, sizes
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.statistics.differences import Difference, resolve_difference, resolve_joint
from lightning_dtda.statistics.resampling import jackknife, standard_error_of

ENOUGH_RUNS = 8
"""Below this the standard error itself is uncertain by more than a quarter (1 / sqrt(2 (S - 1))), so that an
influence and its error cannot be told apart reliably; a warning says so."""


@dataclass(frozen=True, eq=False)
class Attribution(Tables):
    r"""Measurements of an ensemble and their predicted changes under removal.

    Removal means weight zero: the example keeps its slot in the batches and the loss's divisor stays
    (``"reweight"``). The removals are every training example on its own, or groups of them; see :attr:`removals`.

    Args:
        baseline: :math:`m(\theta_t)` ``(runs, queries)``.
        responses: Predicted change of m with each removal ``(runs, queries, removals)``, in m's unit; of a stored
            attribution a :class:`~lightning_dtda.attribution.responses.StoredResponses`, which acts as a tensor; with
            :meth:`keep_top` a :class:`~lightning_dtda.attribution.kept.KeptResponses`, of which a few can be read.
        runs: Names of the runs.
        queries: What the queries are called: their indices in the data set they came from.
        about: What was asked and how it was answered, in JSON: measurement, estimator, removals, drift, versions.

    Raises:
        AttributionError: If ``about`` names another number of groups than there are responses.

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

    def __post_init__(self) -> None:
        if self.removals is not None and len(self.removals) != self.responses.shape[2]:
            raise AttributionError(
                f"about names {len(self.removals)} groups of removals; responses are of {self.responses.shape[2]}."
            )

    def __repr__(self) -> str:
        runs, queries, removals = self.responses.shape
        what = "examples" if self.removals is None else "groups"
        step = "" if self.step is None else f" after step {self.step}"
        return f"Attribution({runs} runs, {queries} queries, {removals} {what}, {self.measurement}{step})"

    @property
    def removals(self) -> tuple[str, ...] | None:
        """Names of the groups of examples that are removed; ``None`` where each example is a removal of its own."""
        groups = self.about.get("removals")
        return tuple(group["name"] for group in groups) if isinstance(groups, list) else None

    @property
    def members(self) -> tuple[tuple[int, ...], ...] | None:
        """Indices of each group's training examples, in the order of :attr:`removals`; ``None`` without groups."""
        groups = self.about.get("removals")
        return tuple(tuple(group["examples"]) for group in groups) if isinstance(groups, list) else None

    @property
    def step(self) -> int | None:
        """The step after which m was measured; ``None`` is the end of each run."""
        return self.about.get("step")

    @property
    def measurement(self) -> str:
        """The name of the measurement."""
        return str(self.about.get("measurement", "measurement"))

    @property
    def chaotic(self) -> tuple[str, ...]:
        """Names of the runs whose responses are out of proportion to the others'.

        The rule is that of :func:`~lightning_dtda.attribution.trust.chaotic`, applied when the runs were attributed.
        """
        named = self.about.get("chaotic", ())
        return tuple(run for run in self.runs if run in named)

    @property
    def ill_conditioned(self) -> tuple[str, ...]:
        """Names of the runs whose responses are lost to rounding in the precision they were computed in.

        None if they were computed in double precision, or were not diagnosed.
        """
        estimator = self.about.get("estimator")
        if isinstance(estimator, dict) and estimator.get("precision") == "float64":
            return ()
        named = ill_conditioned(self.about.get("diagnosis", {}))
        return tuple(run for run in self.runs if run in named)

    def select(self, queries: Sequence[int]) -> Attribution:
        """Return the attribution of some queries, in memory: what is asked of it costs these alone.

        Args:
            queries: Their positions.

        Raises:
            AttributionError: If there is no such query, or one is given twice.
        """
        positions = self._positions(queries)
        return replace(
            self,
            baseline=self.baseline[:, positions],
            responses=self.responses[:, positions],
            queries=tuple(self.queries[position] for position in positions),
        )

    def trusted(self) -> Attribution:
        """Return the attribution without the runs that :attr:`chaotic` names."""
        if not self.chaotic:
            return self
        return self._of([position for position, run in enumerate(self.runs) if run not in self.chaotic])

    def keep_top(self, k: int) -> Attribution:
        """Return an attribution with the responses to a few removals for each query, and what must be known of all.

        Of each query, the responses of all runs are kept to the k removals of the largest and the k of the smallest
        influence on the mean, and as many on the variance, of the trusted runs: ``4 k`` removals, since where these
        overlap those that come next take the places. Of every removal there are the influence on mean and variance,
        their standard errors and p-values, in the precision of the responses. So :meth:`influence`,
        :meth:`standard_error`, :meth:`p_values`, :meth:`significant` and :meth:`reliability` of ``"mean"`` and
        ``"variance"`` are those of all responses, and so is :meth:`top` up to k; :meth:`interval` and
        :meth:`retrainings_needed` are known of what is kept. What needs other responses is an error.

        Args:
            k: How many.

        Raises:
            AttributionError: If k is less than 1.
        """
        return keep_top(self, check_keep_top(k))

    def predict(self, removed: Sequence[int | str]) -> Tensor:
        r"""Return samples of the measurement's distribution without some examples ``(runs, queries)``.

        .. math:: m(\theta_t) + \sum_{k \in S} r_k

        Args:
            removed: Indices of training examples, each at most once; with groups, their names or positions.

        Raises:
            AttributionError: If there is no such example or group, or an example would be removed twice.
        """
        return self.baseline + self._response(removed)

    def influence(
        self, difference: str | Difference, removed: Sequence[int | str] | None = None, runs: Runs = "trusted"
    ) -> Tensor:
        """Return the distributional influence of every single removal, or of some that are made together.

        Args:
            difference: ``mean``, ``variance``, ``wasserstein``, ``energy``, ``quantile``, ``tail``, ``gaussian_kl``, a
                class's import path, or a :class:`~lightning_dtda.statistics.differences.Difference`, such as
                ``Mean("median")`` or ``Tail(0.8)``.
            removed: Training examples, or groups, as for :meth:`predict`; ``None`` is each on its own.
            runs: The ``"trusted"`` ones, without those that :attr:`chaotic` names; or ``"all"``.

        Returns:
            ``(queries, removals)``, or ``(queries,)`` for those made together; float64: the change
            if they are removed.

        Raises:
            AttributionError: If the difference needs more runs, or the removals cannot be made together.
        """
        selected = self._selected(runs)
        return selected._influence(selected._difference(difference), removed)

    def standard_error(
        self, difference: str | Difference, removed: Sequence[int | str] | None = None, runs: Runs = "trusted"
    ) -> Tensor:
        """Return the standard error over runs of :meth:`influence`, by the jackknife; same arguments and shape.

        It says how far the influence would move with other seeds, not how good the linear prediction is. For
        ``Mean("median")``, which hardly moves when one run is left out, it comes from the bootstrap.
        """
        selected = self._selected(runs)
        return selected._standard_error(selected._difference(difference), removed)

    interval = inference.interval
    p_values = inference.p_values
    significant = inference.significant
    runs_for_significance = inference.runs_for_significance
    retrainings_needed = inference.retrainings_needed
    reliability = inference.reliability
    runs_for_stable_top = inference.runs_for_stable_top

    def joint_influence(
        self,
        difference: Difference | None = None,
        queries: Sequence[int] | None = None,
        removed: Sequence[int | str] | None = None,
        runs: Runs = "trusted",
    ) -> Tensor:
        """Return the influence of removals on the joint distribution of the measurements of several queries.

        The measurements of a run, one on each query, are one sample of several dimensions. How they go together may
        change while each of them is distributed as before.

        Args:
            difference: Between joint distributions; ``None`` is
                :class:`~lightning_dtda.statistics.differences.SlicedWasserstein`.
            queries: Positions of the queries; ``None`` is all of them.
            removed: As for :meth:`influence`.
            runs: As for :meth:`influence`.

        Returns:
            ``(removals,)``, or ``()`` for those made together; float64.

        Raises:
            AttributionError: If the difference is not joint, there is no such query, or the removals cannot be made
                together.
        """
        return self._selected(runs)._jointly(resolve_joint(difference), queries, removed)

    def joint_standard_error(
        self,
        difference: Difference | None = None,
        queries: Sequence[int] | None = None,
        removed: Sequence[int | str] | None = None,
        runs: Runs = "trusted",
    ) -> Tensor:
        """Return the jackknife's standard error of :meth:`joint_influence`; same arguments and shape."""
        return self._selected(runs)._jointly(partial(jackknife, resolve_joint(difference)), queries, removed)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the attribution to a directory: a safetensors file for each run, and ``attribution.json``.

        Args:
            path: The directory; it is made if it does not exist.
            overwrite: Whether an attribution that is there is replaced.

        Raises:
            AttributionError: If the directory holds an attribution that may not be replaced, or something else.
        """
        if not overwrite and AttributionStore.is_at(path):
            raise AttributionError(f"{path} holds an attribution. Choose another path, or save with overwrite=True.")
        wanted = dict.fromkeys(self.runs)
        if isinstance(self.responses, KeptResponses):
            kept = KeptStore.create(path, self.about, self.queries, self.responses.shape[2], wanted, overwrite)
            for start in range(0, len(self.queries), size := max(1, AT_ONCE // self.responses.shape[2])):
                numbers = range(start, min(start + size, len(self.queries)))
                kept.add(numbers.start, self.select(numbers))
            return
        store = AttributionStore.create(path, self.about, self.queries, self.responses.shape[2], wanted, overwrite)
        for number, run in enumerate(self.runs):
            known = {key: self.about[key][run] for key in OF_RUNS if run in self.about.get(key, {})}
            facts = {key: {} for key in OF_RUNS} | sizes(self.responses[number]) | known
            store.add(run, self.baseline[number], self.responses[number], facts)

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Open an attribution; one that was broken off holds the runs that were finished, with a warning.

        Its responses stay on disk. Whatever is asked reads the part that it needs, and compares it with its checksum.

        Raises:
            TrajectoryError: If files are missing or damaged; or later, when damaged responses are read.
        """
        index = read_index(path)
        if "blocks" in index:
            kept = KeptStore(Path(path), index)
            missing = [str(kept.queries[n]) for stretch in kept.missing(kept.current) for n in stretch]
            warn_unfinished(path, "queries", missing)
            if not kept.current:
                raise TrajectoryError(f"{path} holds no finished query. Call attribute again with this output.")
            return joined([cls(*kept.block(first)) for first in kept.current])
        store = AttributionStore(Path(path), index)
        warn_unfinished(path, "runs", store.unfinished)
        return cls(*store.read(), runs=store.finished, queries=store.queries, about=store.about)

    def _selected(self, runs: Runs) -> Attribution:
        if runs not in get_args(Runs):
            raise AttributionError(f"runs={runs!r}; choose from {', '.join(get_args(Runs))}.")
        return self.trusted() if runs == "trusted" else self

    def _of(self, positions: Sequence[int]) -> Attribution:
        names = tuple(self.runs[position] for position in positions)
        return replace(self, baseline=self.baseline[positions], responses=self.responses[positions], runs=names)

    def _influence(self, difference: Difference, removed: Sequence[int | str] | None = None) -> Tensor:
        if removed is None and (moment := moment_of(difference)) and self._figures is not None:
            return self._figures.of(f"{moment}_influence")
        return self._each_query(difference, removed)

    def _standard_error(self, difference: Difference, removed: Sequence[int | str] | None = None) -> Tensor:
        if removed is None and (moment := moment_of(difference)) and self._figures is not None:
            return self._figures.of(f"{moment}_standard_error")
        return self._each_query(standard_error_of(difference), removed)

    @property
    def _figures(self) -> Figures | None:
        """What is known of every removal over these runs where not all responses were kept."""
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

    def _difference(self, difference: str | Difference) -> Difference:
        chosen, runs = resolve_difference(difference), len(self.runs)
        self._enough(chosen, chosen.least_runs)
        if runs < ENOUGH_RUNS:
            warnings.warn(
                f"Influences of {runs} runs: with fewer than {ENOUGH_RUNS} the standard errors are themselves "
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
        """Apply a function ``(runs, removals) -> (*outputs, removals)`` that needs some copies of its argument.

        Of each removal, or of those whose responses are ``kept``; the others are then NaN.
        """
        responses = self.responses if removed is None else self._response(removed)[..., None]
        found = torch.full(
            (len(self.queries), *outputs, responses.shape[2]), torch.nan, dtype=torch.float64, device=responses.device
        )
        for query, into in enumerate(found):
            if kept and isinstance(responses, KeptResponses):
                known = into[..., responses.kept[query]]
                in_parts(function, self.baseline, responses.table, query, known, copies)
                into[..., responses.kept[query]] = known
            else:
                in_parts(function, self.baseline, responses, query, into, copies)
        return found if removed is None else found.squeeze(-1)

    def _jointly(self, function: Any, queries: Sequence[int] | None, removed: Sequence[int | str] | None) -> Tensor:
        responses = self.responses if removed is None else self._response(removed)[..., None]
        positions = slice(None) if queries is None else self._positions(queries)
        found = torch.empty(responses.shape[2], dtype=torch.float64, device=responses.device)
        in_parts(function, self.baseline, responses, positions, found)
        return found if removed is None else found.squeeze(-1)

    def _positions(self, queries: Sequence[int]) -> list[int]:
        positions = list(queries)
        if outside := [query for query in positions if not 0 <= query < len(self.queries)]:
            raise AttributionError(
                f"There is no query at position {outside[0]}; they are 0 to {len(self.queries) - 1}."
            )
        if not positions or len(set(positions)) < len(positions):
            raise AttributionError(f"queries={positions}; give positions of queries, at least one, each once.")
        return positions

    def _response(self, removed: Sequence[int | str]) -> Tensor:
        """Return the response to removals that are made together ``(runs, queries)``."""
        names, members = self.removals, self.members
        if names is None or members is None:
            chosen = positions_of_examples(removed, self.responses.shape[2])
        else:
            chosen = positions_of_groups(removed, names, members)
        at_once = max(1, AT_ONCE // max(1, len(self.runs) * len(chosen)))
        queries = range(0, len(self.queries), at_once)
        return torch.cat([self.responses[:, start : start + at_once, chosen].sum(-1) for start in queries], 1)
