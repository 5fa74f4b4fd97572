"""Where the responses of all runs to all removals are too many: those that matter most, and figures of all."""

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
from lightning_dtda.statistics import significance
from lightning_dtda.statistics.differences import DIFFERENCES, Difference, Mean, Variance

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

MOMENTS = ("mean", "variance")
"""The differences that are known of every removal."""

FIGURES = ("mean_influence", "mean_standard_error", "variance_influence", "variance_standard_error", "variance_p")
"""What is kept of every removal, in this order; the p-value of the mean follows from the first two."""

_EVERYTHING = slice(None)


@dataclass(frozen=True, eq=False)
class Figures:
    """What is known of every removal: :data:`FIGURES`, in the precision of the responses.

    Args:
        runs: Names of the runs that they are of, the trusted ones.
        reliability: Of the ranking by each of :data:`MOMENTS` ``(queries, 2)``, float64; NaN with too few runs.
        rows: Of each query, a table ``(rows, 5, removals)`` in memory or on disk, and its row there.
    """

    runs: tuple[str, ...]
    reliability: Tensor
    rows: tuple[tuple[Tensor | StoredTable, int], ...]

    def of(self, name: str) -> Tensor:
        """Read one of the figures ``(queries, removals)``, float64."""
        place = FIGURES.index(name)
        return torch.stack([table[row][place].double() for table, row in self.rows])

    def p_values(self, moment: str) -> Tensor:
        """Return the p-values of a moment's test ``(queries, removals)``, float64."""
        if moment == "variance":
            return self.of("variance_p")
        return significance.student(self.of("mean_influence"), self.of("mean_standard_error"), len(self.runs))

    def read(self) -> Tensor:
        """Read all figures ``(queries, 5, removals)``; no copy is made where they are in one table in memory."""
        table = self.rows[0][0]
        in_order = all(each is table and row == place for place, (each, row) in enumerate(self.rows))
        if isinstance(table, Tensor) and in_order and len(table) == len(self.rows):
            return table
        return torch.stack([each[row] for each, row in self.rows])

    def select(self, queries: Tensor) -> Figures:
        """Return those of some queries."""
        return replace(self, reliability=self.reliability[queries], rows=tuple(self.rows[q] for q in queries.tolist()))


class KeptResponses(Tensor):
    """Responses ``(runs, queries, removals)`` of which a few removals' are kept for each query, as a tensor.

    An index reads those of removals that are kept for the queries that it selects, or takes some of the runs and
    queries. What is not kept, and functions of the whole, are an error.

    Args:
        kept: Positions of the removals that are kept for each query, ascending ``(queries, kept)``.
        table: Their responses ``(runs, queries, kept)``.
        figures: What is known of every removal.
        removals: K, the number of all removals.
        k: How many of the largest and of the smallest influences are among them, by each of :data:`MOMENTS`.
    """

    kept: Tensor
    table: Tensor
    figures: Figures
    k: int

    @staticmethod
    def __new__(cls, kept: Tensor, table: Tensor, figures: Figures, removals: int, k: int) -> KeptResponses:
        """Make a tensor that has the shape of all responses, and the memory of a few."""
        shape = (*table.shape[:2], removals)
        made = shaped(cls, shape, table)
        made.kept, made.table, made.figures, made.k = kept, table, figures, k
        return made

    @override
    def __getitem__(self, index: Any) -> Tensor:
        """Read the responses at an index, or take some of the runs and queries."""
        parts = of_each_dimension(index)
        if parts is None or sum(isinstance(part, Tensor) for part in parts) > 1:
            raise self._missing(
                "An index that goes together in pairs, or adds a dimension, takes all responses, and they"
            )
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
            f"{what} were not kept: keep_top={self.k} keeps, for each query, those to the {self.kept.shape[1]} "
            "removals of the largest and smallest mean and variance influence. Of every removal, the mean and the "
            "variance influence over the trusted runs are known, with standard errors and p-values. For anything else "
            "ask about removals that were kept (responses.kept has them for each query, select takes some queries), or "
            "attribute without keep_top, or with a larger one."
        )

    @classmethod
    @override
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        with plain_results():  # its shape and the like are those of a tensor
            return function(*arguments, **(keywords or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its class
        cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Refuse functions of the whole."""
        raise next(part for part in arguments if isinstance(part, cls))._missing()

    # what does not pass through torch's dispatcher

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KeptResponses({tuple(self.shape)}, {self.dtype}, {self.kept.shape[1]} of each query)"

    @override
    def numpy(self, *, force: bool = False) -> Any:
        """Refuse to read all of it."""
        raise self._missing()

    @override
    def tolist(self) -> Any:
        """Refuse to read all of it."""
        raise self._missing()

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return KeptResponses, (self.kept, self.table, self.figures, self.shape[2], self.k)

    def __deepcopy__(self, memo: Any) -> KeptResponses:
        return self


def moment_of(difference: Difference) -> str | None:
    """Return which of :data:`MOMENTS` a difference is; ``None`` for others, such as the change of the median."""
    is_mean = isinstance(difference, Mean) and difference.location == "mean"
    return "mean" if is_mean else "variance" if isinstance(difference, Variance) else None


def keep_top(attribution: Attribution, k: int) -> Attribution:
    """Return what :meth:`Attribution.keep_top <lightning_dtda.Attribution.keep_top>` does; query by query."""
    trusted, removals = attribution.trusted(), attribution.responses.shape[2]
    runs, queries, size = len(attribution.runs), len(attribution.queries), number_kept(k, removals)
    responses = attribution.responses
    kept = torch.empty(queries, size, dtype=torch.int64, device=responses.device)
    table = torch.empty(runs, queries, size, dtype=responses.dtype, device=responses.device)
    figures = torch.full((queries, len(FIGURES), removals), torch.nan, dtype=responses.dtype, device=responses.device)
    reliability = torch.full((queries, len(MOMENTS)), torch.nan, dtype=torch.float64, device=responses.device)
    for query in range(queries):
        one, ranked = trusted.select([query]), []
        for place, moment in enumerate(MOMENTS):
            difference = DIFFERENCES[moment]
            if len(one.runs) < difference.least_runs:
                continue
            influence = one._influence(difference)[0]
            ranked.append(influence)
            figures[query, 2 * place] = influence
            figures[query, 2 * place + 1] = one._standard_error(difference)[0]
            if len(one.runs) >= 2 * max(difference.least_runs, 2):
                reliability[query, place] = one.reliability(difference)[0]
        if len(one.runs) >= significance.least_runs(DIFFERENCES["variance"]):
            figures[query, FIGURES.index("variance_p")] = one.p_values("variance")[0]
        kept[query] = _outermost(ranked, size)
        table[:, query] = responses[:, query, kept[query]]
    known = Figures(trusted.runs, reliability, tuple((figures, query) for query in range(queries)))
    return replace(
        attribution,
        responses=KeptResponses(kept, table, known, removals, k),
        about={**attribution.about, "keep_top": k},
    )


def check_keep_top(k: Any) -> int:
    """Refuse what is no number of removals.

    Raises:
        AttributionError: If it is none.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise AttributionError(f"keep_top={k!r}; give the number of removals at each end to keep, at least 1.")
    return k


def number_kept(k: int, removals: int) -> int:
    """Return how many removals are kept of each query: k at each end, by each of :data:`MOMENTS`, or all there are.

    Where the ends overlap, the removals that come next take the places: all queries keep the same number.
    """
    return min(removals, 2 * len(MOMENTS) * k)


def bytes_kept(k: int, runs: int, queries: int, removals: int, itemsize: int) -> int:
    """Return how large the answer to some queries is."""
    size = number_kept(k, removals)
    return queries * ((len(FIGURES) * removals + runs * size) * itemsize + size * torch.int64.itemsize)


def joined(parts: Sequence[Attribution]) -> Attribution:
    """Return one attribution of the queries of several, in their order.

    Args:
        parts: Of the same runs and removals, with the same kept and the same trusted; at least one.
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
    """Return what is known of the runs from attributions of several parts of the queries, as ``about`` has it.

    The norm is that of all responses, the largest response and the drift the largest. The rest is that of the first
    part's queries: the diagnosis, which looks at the first queries only, and the adjoints' norms.
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
    """Return the positions, ascending, that come first in the orders by some values, upwards and downwards.

    Of equal values, the first ones come first.

    Args:
        values: Each ``(removals,)``.
        number: How many.
    """
    best = torch.full_like(values[0], len(values[0]), dtype=torch.int64)
    places = torch.arange(len(best), device=best.device)
    for order in (one.argsort(descending=down, stable=True) for one in values for down in (False, True)):
        best[order] = torch.minimum(best[order], places)
    return best.argsort(stable=True)[:number].sort().values
