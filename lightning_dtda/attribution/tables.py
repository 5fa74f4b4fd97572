"""What an attribution says, as tables: the top removals, data sets with named dimensions, data frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_dtda.attribution.inference import Runs
from lightning_dtda.attribution.kept import MOMENTS, Figures, KeptResponses, moment_of
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import DIFFERENCES, PAPERS, Difference
from lightning_dtda.statistics.resampling import standard_error_of

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from typing_extensions import Self


class Tables:
    """The part of :class:`~lightning_dtda.Attribution` that makes tables."""

    if TYPE_CHECKING:
        baseline: Tensor
        responses: Tensor
        runs: tuple[str, ...]
        queries: tuple[int, ...]
        about: dict[str, Any]

        @property
        def chaotic(self) -> tuple[str, ...]: ...  # noqa: D102
        @property
        def removals(self) -> tuple[str, ...] | None: ...  # noqa: D102
        @property
        def members(self) -> tuple[tuple[int, ...], ...] | None: ...  # noqa: D102
        @property
        def _figures(self) -> Figures | None: ...

        def select(self, queries: Sequence[int]) -> Self:
            """Return the attribution of some queries."""
            ...

        def influence(self, difference: str | Difference) -> Tensor:
            """Return influences."""
            ...

        def standard_error(self, difference: str | Difference) -> Tensor:
            """Return their standard errors."""
            ...

        def _selected(self, runs: Runs) -> Self: ...
        def _positions(self, queries: Sequence[int]) -> list[int]: ...
        def _difference(self, difference: str | Difference) -> Difference: ...
        def _influence(self, difference: Difference) -> Tensor: ...

    @property
    def available_differences(self) -> list[str]:
        """Names of the paper's differences for which there are enough runs: those that tables and reports have.

        :meth:`influence` takes others too. With :meth:`keep_top` they are those that are known of every removal.
        """
        runs = len(self.runs) - len(self.chaotic)
        names = MOMENTS if isinstance(self.responses, KeptResponses) else PAPERS
        return [name for name in names if runs >= DIFFERENCES[name].least_runs]

    def top(
        self, k: int = 10, difference: str | Difference = "mean", query: int | None = None, runs: Runs = "trusted"
    ) -> pd.DataFrame:
        """Return the removals of the largest absolute influence on each query.

        Args:
            k: Number of removals for each query.
            difference: What to rank by.
            query: Position of one query; ``None`` is all of them.
            runs: As for :meth:`influence`.

        Returns:
            One row for each of these, with ``query``, ``rank`` (1 first), ``example`` (with groups ``removal``, the
            name, and ``size``, the number of examples), ``influence``, ``standard_error``, ``mean_influence``
            and ``variance_influence`` (NaN with a single run).

        Raises:
            AttributionError: If the difference needs more runs, there is no such query, or ``k`` is less than 1, or
                more than the top that was kept.
        """
        import pandas as pd

        if k < 1:
            raise AttributionError(f"k={k}; give the number of removals to list, at least 1.")
        if self.most_listed < min(k, self.responses.shape[2]):
            raise AttributionError(
                f"k={k}; keep_top={self.most_listed} says how many are listed at the most. to_dataframe has the mean "
                "and variance influence of every removal."
            )
        positions = range(len(self.queries)) if query is None else self._positions([query])
        selected = self._selected(runs)
        chosen = selected._difference(difference)
        rows: list[dict[str, Any]] = []
        for q in positions:
            candidates, influence = selected.select([q])._candidates(chosen)
            first = influence.abs().argsort(descending=True)[:k]
            order, influence = candidates[first], influence[first]
            of_query = selected.baseline[:, q, None].double()
            samples = of_query, of_query + selected.responses[:, q, order].double()
            variance = DIFFERENCES["variance"](*samples) if len(selected.runs) > 1 else influence * torch.nan
            columns = {
                "influence": influence,
                "standard_error": standard_error_of(chosen)(*samples),
                "mean_influence": DIFFERENCES["mean"](*samples),
                "variance_influence": variance,
            }
            values = zip(*(column.tolist() for column in columns.values()), strict=True)
            for rank, (n, figures) in enumerate(zip(order.tolist(), values, strict=True), start=1):
                named = {"query": self.queries[q], "rank": rank, **self._named(n)}
                rows.append(named | dict(zip(columns, figures, strict=True)))
        return pd.DataFrame(rows)

    @property
    def most_listed(self) -> int:
        """How many removals :meth:`top` can list: all of them, or with :meth:`keep_top` its k."""
        responses = self.responses
        if isinstance(responses, KeptResponses) and responses.kept.shape[1] < responses.shape[2]:
            return responses.k
        return responses.shape[2]

    def to_xarray(self) -> xr.Dataset:
        """Return baseline, responses, influences and standard errors with named dimensions, all of them in memory.

        They are ``run``, ``query`` and ``example``; with groups ``removal`` in place of the last, along which ``size``
        is the number of examples. With :meth:`keep_top`, ``kept`` says of which removals ``responses`` are, along
        ``place``.
        """
        import xarray as xr

        removal = "example" if self.removals is None else "removal"
        data: dict[str, Any] = {"baseline": (("run", "query"), self.baseline.cpu().numpy())}
        if isinstance(self.responses, KeptResponses):
            data["kept"] = ("query", "place"), self.responses.kept.cpu().numpy()
            data["responses"] = ("run", "query", "place"), self.responses.table.cpu().numpy()
        else:
            data["responses"] = ("run", "query", removal), self.responses.cpu().numpy()
        for name in self.available_differences:
            data[f"{name}_influence"] = (("query", removal), self.influence(name).cpu().numpy())
            data[f"{name}_standard_error"] = (("query", removal), self.standard_error(name).cpu().numpy())
        coordinates: dict[str, Any] = {
            "run": list(self.runs),
            "query": list(self.queries),
            removal: range(self.responses.shape[2]) if self.removals is None else list(self.removals),
        }
        if self.members is not None:
            coordinates["size"] = removal, [len(group) for group in self.members]
        attributes = {key: str(value) for key, value in self.about.items()}
        return xr.Dataset(data, coordinates, attributes)

    def to_dataframe(self) -> pd.DataFrame:
        """Return influences and standard errors, one row for each query and removal."""
        dataset = self.to_xarray().drop_vars(["baseline", "responses", "kept", "run"], errors="ignore")
        return dataset.to_dataframe().reset_index()

    def _candidates(self, difference: Difference) -> tuple[Tensor, Tensor]:
        """Return positions of removals of a single query, those at the top among them, and their influence."""
        if self._figures is not None and moment_of(difference) and isinstance(self.responses, KeptResponses):
            # from responses: figures are rounded, which may change an order
            samples = self.baseline.double()
            return self.responses.kept[0], difference(samples, samples + self.responses.table[:, 0].double())
        influence = self._influence(difference)[0]
        return torch.arange(len(influence), device=influence.device), influence

    def _named(self, position: int) -> dict[str, Any]:
        """Return what a table says of the removal at a position."""
        if self.removals is None:
            return {"example": position}
        group = self.about["removals"][position]
        return {"removal": group["name"], "size": len(group["examples"])}
