"""The responses that matter most, and summary figures of all removals, if there are too many responses to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.attribution.responses import StoredTable, of_each_dimension
from lightning_dtda.compatibility import plain_results, shaped
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import DIFFERENCES, Difference
from lightning_dtda.statistics.significance import of_any
from lightning_dtda.statistics.student import extended_to_zero, student_ends, student_p_values

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

KNOWN = ("mean", "variance", "spread")
"""Differences that are known for every removal."""

RANKED = ("mean", "variance")
"""Differences whose largest and smallest influences are kept; the spread has the order of the variance."""

FIGURES = (*(f"{name}_{what}" for name in KNOWN for what in ("influence", "standard_error")), "spread_p")
"""Figures that are kept for every removal, in this order; intervals and the p-value of the mean follow from them."""

_EVERYTHING = slice(None)


@dataclass(frozen=True, eq=False)
class Figures:
    """The :data:`FIGURES` of every removal, in the precision of the responses.

    Args:
        runs: Names of the runs that they are computed from, the trusted ones.
        reliability: Reliability of the ranking by each of :data:`KNOWN` ``(queries, 3)``, float64; NaN with too few
            runs.
        rows: For each query, a table ``(rows, 7, removals)`` in memory or on disk, and the query's row in it.
    """

    runs: tuple[str, ...]
    reliability: Tensor
    rows: tuple[tuple[Tensor | StoredTable, int], ...]

    def of(self, name: str) -> Tensor:
        """Read one of the figures ``(queries, removals)``, float64."""
        place = FIGURES.index(name)
        return torch.stack([table[row][place].double() for table, row in self.rows])

    def p_values(self, moments: Sequence[str]) -> Tensor:
        """Return the p-values of a change of any of the moments ``(queries, removals)``, float64."""
        return of_any([self._p_values(moment) for moment in moments])

    def _p_values(self, moment: str) -> Tensor:
        if moment == "variance":
            return self.of("spread_p")
        return student_p_values(self.of("mean_influence"), self.of("mean_standard_error"), len(self.runs) - 1)

    def inference(self, difference: Difference, level: float) -> Tensor:
        """Return estimate, standard error, p-values and interval of a known difference ``(5, queries, removals)``."""
        estimate, error = (self.of(f"{difference.name}_{what}") for what in ("influence", "standard_error"))
        p = torch.full_like(estimate, torch.nan)
        ends, number = torch.stack([p, p]), len(self.runs)
        if number >= difference.least_runs_to_test:
            p = self.p_values(difference.moments)
        if not difference.no_interval(number):
            ends = extended_to_zero(student_ends(estimate, error, difference.freedom(number), level), p, level)
        return torch.stack([estimate, error, p, *ends])

    def read(self) -> Tensor:
        """Read all figures ``(queries, 7, removals)``, without a copy if they are one table in memory."""
        table = self.rows[0][0]
        in_order = all(each is table and row == place for place, (each, row) in enumerate(self.rows))
        if isinstance(table, Tensor) and in_order and len(table) == len(self.rows):
            return table
        return torch.stack([each[row] for each, row in self.rows])

    def select(self, queries: Tensor) -> Figures:
        """Return the figures of some queries."""
        return replace(self, reliability=self.reliability[queries], rows=tuple(self.rows[q] for q in queries.tolist()))


class KeptResponses(Tensor):
    """Responses ``(runs, queries, removals)``, of which only a few removals are kept for each query, as a tensor.

    An index can read the kept responses of the queries it selects, or select runs and queries. Reading other responses,
    or all of them, raises an error.

    Args:
        kept: Positions of the removals that are kept for each query, ascending ``(queries, kept)``.
        table: Responses to the kept removals ``(runs, queries, kept)``.
        figures: Figures of every removal.
        removals: Number of all removals, K.
        k: Number of the largest, and of the smallest, influences that are kept by each of :data:`MOMENTS`.
    """

    kept: Tensor
    table: Tensor
    figures: Figures
    k: int

    @staticmethod
    def __new__(cls, kept: Tensor, table: Tensor, figures: Figures, removals: int, k: int) -> KeptResponses:
        """Make a tensor with the shape of all responses, but the memory of a few."""
        shape = (*table.shape[:2], removals)
        made = shaped(cls, shape, table)
        made.kept, made.table, made.figures, made.k = kept, table, figures, k
        return made

    @override
    def __getitem__(self, index: Any) -> Tensor:
        """Read the responses at an index, or select runs and queries."""
        parts = of_each_dimension(index)
        if parts is None or sum(isinstance(part, Tensor) for part in parts) > 1:
            raise self._missing("An index with several tensors, or a new dimension, needs all responses, which")
        runs, queries, removals = parts
        numbers = torch.arange(self.shape[1])[queries]
        if isinstance(removals, slice) and removals == _EVERYTHING and not isinstance(runs, int) and numbers.ndim:
            table = self.table[runs][:, numbers]
            return KeptResponses(self.kept[numbers], table, self.figures.select(numbers), self.shape[2], self.k)
        wanted = torch.arange(self.shape[2])[removals]
        kept = self.kept[numbers].reshape(-1, self.kept.shape[1])
        each = wanted.reshape(1, -1).expand(len(kept), -1).to(kept)
        places = torch.searchsorted(kept, each.contiguous()).clamp_max(kept.shape[1] - 1)
        if missing := (kept.gather(1, places) != each).nonzero().tolist():
            row, column = missing[0]
            removal, query = int(each[row, column]), int(numbers.reshape(-1)[row])
            raise self._missing(f"The responses to removal {removal} of the query at position {query}")
        some = self.table[runs][..., numbers.reshape(-1), :]
        found = some.gather(-1, places.expand(*some.shape[:-1], -1))
        return found.reshape((*some.shape[:-2], *numbers.shape, *wanted.shape))

    def _missing(self, what: str = "The responses to all removals") -> AttributionError:
        return AttributionError(
            f"{what} were not kept: for each query, keep_top={self.k} keeps the responses to the {self.kept.shape[1]} "
            "removals with the largest and smallest mean and variance influence. For every removal, only the "
            "influences on mean, variance and spread over the trusted runs are known, with standard errors and "
            "p-values. For anything else, use removals that were kept (responses.kept lists them for each query; "
            "select takes some queries), or attribute without keep_top, or with a larger one."
        )

    @classmethod
    @override
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        with plain_results():  # shape and other attributes are those of a tensor
            return function(*arguments, **(keywords or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its class
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Raise an error for functions of the whole tensor."""
        raise next(part for part in arguments if isinstance(part, cls))._missing()

    # methods that bypass torch's dispatcher

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KeptResponses({tuple(self.shape)}, {self.dtype}, {self.kept.shape[1]} removals per query)"

    @override
    def numpy(self, *, force: bool = False) -> Any:
        """Raise an error: not all responses were kept."""
        raise self._missing()

    @override
    def tolist(self) -> Any:
        """Raise an error: not all responses were kept."""
        raise self._missing()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return KeptResponses, (self.kept, self.table, self.figures, self.shape[2], self.k)

    def __deepcopy__(self, memo: Any) -> KeptResponses:
        return self


def known_as(difference: Difference) -> str | None:
    """Return which of :data:`KNOWN` a difference is; ``None`` for others, such as the change of the median."""
    name = difference.name
    return name if name in KNOWN and type(difference) is type(DIFFERENCES[name]) else None


def keep_top(attribution: Attribution, k: int) -> Attribution:
    """Return the result of :meth:`Attribution.keep_top <lightning_dtda.Attribution.keep_top>`, query by query."""
    trusted, removals = attribution.trusted(), attribution.responses.shape[2]
    runs, queries, size = len(attribution.runs), len(attribution.queries), number_kept(k, removals)
    responses = attribution.responses
    kept = torch.empty(queries, size, dtype=torch.int64, device=responses.device)
    table = torch.empty(runs, queries, size, dtype=responses.dtype, device=responses.device)
    figures = torch.full((queries, len(FIGURES), removals), torch.nan, dtype=responses.dtype, device=responses.device)
    reliability = torch.full((queries, len(KNOWN)), torch.nan, dtype=torch.float64, device=responses.device)
    for query in range(queries):
        one, ranked = trusted.select([query]), []
        for place, name in enumerate(KNOWN):
            difference = DIFFERENCES[name]
            if len(one.runs) < difference.least_runs:
                continue
            influence = one._influence(difference)[0]
            if name in RANKED:
                ranked.append(influence)
            figures[query, 2 * place] = influence
            figures[query, 2 * place + 1] = one._standard_error(difference)[0]
            if len(one.runs) >= 2 * max(difference.least_runs, 2):
                reliability[query, place] = one.reliability(difference)[0]
        if len(one.runs) >= DIFFERENCES["spread"].least_runs_to_test:
            figures[query, FIGURES.index("spread_p")] = one.p_values("spread")[0]
        kept[query] = _outermost(ranked, size)
        table[:, query] = responses[:, query, kept[query]]
    known = Figures(trusted.runs, reliability, tuple((figures, query) for query in range(queries)))
    return replace(
        attribution,
        responses=KeptResponses(kept, table, known, removals, k),
        about={**attribution.about, "keep_top": k},
    )


def check_keep_top(k: Any) -> int:
    """Check the ``keep_top`` argument.

    Raises:
        AttributionError: If it is not a positive integer.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise AttributionError(f"keep_top={k!r}; give the number of removals at each end to keep, at least 1.")
    return k


def number_kept(k: int, removals: int) -> int:
    """Return the number of removals kept for each query: k at each end by each of :data:`RANKED`, but at most all.

    Where the ends overlap, the next removals in order fill the places, so all queries keep the same number.
    """
    return min(removals, 2 * len(RANKED) * k)


def bytes_kept(k: int, runs: int, queries: int, removals: int, itemsize: int) -> int:
    """Return the bytes that are kept for a number of queries."""
    size = number_kept(k, removals)
    return queries * ((len(FIGURES) * removals + runs * size) * itemsize + size * torch.int64.itemsize)


def joined(parts: Sequence[Attribution]) -> Attribution:
    """Join attributions of different queries into one, in their order.

    Args:
        parts: Attributions with the same runs, removals, ``keep_top`` and trusted runs; at least one.
    """
    responses: Any = [part.responses for part in parts]
    figures = [each.figures for each in responses]
    everything = Figures(
        figures[0].runs, torch.cat([each.reliability for each in figures]), sum((each.rows for each in figures), ())
    )
    kept, table = torch.cat([each.kept for each in responses]), torch.cat([each.table for each in responses], 1)
    return replace(
        parts[0],
        baseline=torch.cat([part.baseline for part in parts], 1),
        responses=KeptResponses(kept, table, everything, responses[0].shape[2], responses[0].k),
        queries=sum((part.queries for part in parts), ()),
        about=parts[0].about | known_of_runs(parts),
    )


def known_of_runs(parts: Sequence[Attribution]) -> dict[str, Any]:
    """Combine the facts of the runs in ``about`` from attributions of different queries.

    The norm is over all responses; for the largest response and the drift it is the maximum. The diagnosis, which uses
    the first queries only, and the norms of the adjoints are taken from the first part.
    """
    weights = [len(part.queries) for part in parts]

    def norm(values: Sequence[float]) -> float:
        squares = (weight * value**2 for weight, value in zip(weights, values, strict=True))
        return math.sqrt(sum(squares) / sum(weights))

    of_values: dict[str, Any] = {
        "response_norm": norm,
        "largest_response": max,
        "drift": lambda values: max(values, key=lambda drift: drift.get("parameters", 0.0)),
    }
    return {
        key: {run: merge([part.about[key][run] for part in parts]) for run in parts[0].about[key]}
        for key, merge in of_values.items()
        if key in parts[0].about
    }


def _outermost(values: Sequence[Tensor], number: int) -> Tensor:
    """Return the positions of the largest and smallest values by several criteria, ascending.

    Among equal values, lower positions come first.

    Args:
        values: Values by each criterion ``(removals,)``.
        number: Number of positions.
    """
    best = torch.full_like(values[0], len(values[0]), dtype=torch.int64)
    places = torch.arange(len(best), device=best.device)
    for order in (one.argsort(descending=down, stable=True) for one in values for down in (False, True)):
        best[order] = torch.minimum(best[order], places)
    return best.argsort(stable=True)[:number].sort().values
