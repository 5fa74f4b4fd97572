"""An attribution on disk that keeps the top of each query, stored in blocks of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution_store import OF_RUNS, Store
from lightning_dtda.attribution.kept import FIGURES, KNOWN, Figures, KeptResponses, number_kept
from lightning_dtda.attribution.responses import StoredTable
from lightning_dtda.errors import TrajectoryError
from lightning_dtda.trajectory.schema import FLOATS, INT64, Expected

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

_BESIDE = ("baseline", "kept", "responses", "reliability")
"""Tensors in a block's file besides the figures of every removal."""

_EXPECTED: dict[str, Expected] = {
    "baseline": (FLOATS, ("runs", "queries")),
    "kept": (INT64, ("queries", "kept")),
    "responses": (FLOATS, ("runs", "queries", "kept")),
    "reliability": ((torch.float64,), ("queries", "rankings")),
    "figures": (FLOATS, ("queries", "figures", "removals")),
}


class KeptStore(Store):
    """An answer stored in blocks of queries; ``about`` has ``keep_top``.

    Each file holds ``baseline`` ``(runs, queries)``, the positions ``kept`` ``(queries, kept)`` and ``responses``
    ``(runs, queries, kept)`` of the removals that are kept, ``reliability`` ``(queries, 2)``, ``figures``
    ``(queries, 5, removals)`` and their ``checksums`` ``(queries,)``. The trusted runs are final only when all blocks
    are known: under ``trusted``, the index has those used for the block added last, and each block has its own.

    More runs than before make another question, because the figures depend on all runs, in their order.
    """

    parts: ClassVar[str] = "blocks"

    @property
    def finished(self) -> tuple[int, ...]:
        """Positions of the first query of each block that is on disk, ascending."""
        return tuple(sorted(map(int, self._index["blocks"])))

    @property
    def current(self) -> tuple[int, ...]:
        """Those of ``finished`` that were reduced with the runs that are trusted now."""
        blocks, trusted = self._index["blocks"], self._index.get("trusted")
        return tuple(first for first in self.finished if blocks[str(first)]["trusted"] == trusted)

    def missing(self, blocks: Sequence[int]) -> list[range]:
        """Return the ranges of queries that are in none of the given blocks."""
        stretches, start = [], 0
        for first in (*blocks, len(self.queries)):
            if first > start:
                stretches.append(range(start, first))
            start = first + self._index["blocks"].get(str(first), {}).get("queries", 0)
        return stretches

    def add(self, first: int, block: Attribution) -> None:
        """Write the answer to a block of queries, replacing an older one.

        Args:
            first: Position of the first query.
            block: The attribution of these queries, reduced to its top.

        Raises:
            AttributionError: If the directory cannot be written to.
        """
        responses: Any = block.responses
        figures = responses.figures
        beside = (block.baseline, responses.kept, responses.table, figures.reliability)
        known = {key: block.about[key] for key in OF_RUNS if key in block.about}
        self._index["trusted"] = list(figures.runs)
        self._add(
            str(first),
            f"queries-{first:06d}",
            ("figures", figures.read().cpu()),
            {name: tensor.cpu().contiguous() for name, tensor in zip(_BESIDE, beside, strict=True)},
            {"queries": len(block.queries), "trusted": list(figures.runs), **known},
        )

    def block(self, first: int) -> tuple[Tensor, KeptResponses, tuple[str, ...], tuple[int, ...], dict[str, Any]]:
        """Return the arguments of an attribution of a block of queries; its figures stay on disk.

        Raises:
            TrajectoryError: If a file is missing or damaged.
        """
        index, entry = self._index, self._index["blocks"][str(first)]
        names = tuple(index["wanted"])
        trusted, removals, k = tuple(entry["trusted"]), index["removals"], index["about"].get("keep_top", 1)
        sizes = {
            "runs": len(names),
            "removals": removals,
            "queries": entry["queries"],
            "kept": number_kept(k, removals),
        }
        table = StoredTable.map(self.path, entry, "figures", _EXPECTED, sizes)
        if (table.table.shape[1], table.others["reliability"].shape[1]) != (len(FIGURES), len(KNOWN)):
            raise TrajectoryError(
                f"{table.path} has other figures than this version of lightning-dtda keeps. Attribute again."
            )
        baseline, kept, responses, reliability = (table.others[name] for name in _BESIDE)
        in_order = kept.diff(prepend=kept.new_full((len(kept), 1), -1), append=kept.new_full((len(kept), 1), removals))
        if bool((in_order <= 0).any()) or not {*trusted} <= {*names} or first + len(kept) > len(self.queries):
            raise TrajectoryError(f"{table.path} contradicts itself or the index. Attribute these queries again.")
        figures = Figures(trusted, reliability, tuple((table, row) for row in range(len(kept))))
        known = {key: entry[key] for key in OF_RUNS if key in entry}
        about = index["about"] | known | {"chaotic": [run for run in names if run not in trusted]}
        queries = self.queries[first : first + entry["queries"]]
        return baseline, KeptResponses(kept, responses, figures, removals, k), names, queries, about
