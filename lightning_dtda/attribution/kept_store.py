"""An attribution on disk that keeps the top of each query, block of queries by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_dtda.attribution.attribution_store import OF_RUNS, Store
from lightning_dtda.attribution.kept import Figures, KeptResponses
from lightning_dtda.attribution.responses import StoredTable

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution

_BESIDE = ("baseline", "kept", "responses", "reliability")
"""What a block's file holds beside the figures of every removal."""


class KeptStore(Store):
    """An answer block by block of queries; ``about`` has ``keep_top``.

    Each file holds ``baseline`` ``(runs, queries)``, ``kept`` and ``responses`` of the removals that are kept
    ``(queries, kept)`` and ``(runs, queries, kept)``, ``reliability`` ``(queries, 2)``, ``figures``
    ``(queries, 5, removals)`` and their ``checksums`` ``(queries,)``. Which runs are trusted is known when all blocks
    are: the index has those that the block added last was reduced with, ``trusted``, and of each block its own.

    More runs than the last time are another question, since figures are over all of them, in their order.
    """

    parts: ClassVar[str] = "blocks"

    @property
    def finished(self) -> tuple[int, ...]:
        """Positions of the first query of each block that is on disk, ascending."""
        return tuple(sorted(map(int, self._index["blocks"])))

    @property
    def current(self) -> tuple[int, ...]:
        """Those of ``finished`` that were reduced with the runs that were trusted at last."""
        blocks, trusted = self._index["blocks"], self._index.get("trusted")
        return tuple(first for first in self.finished if blocks[str(first)]["trusted"] == trusted)

    def missing(self, blocks: Sequence[int]) -> list[range]:
        """Return the stretches of queries that are in none of some blocks."""
        stretches, start = [], 0
        for first in (*blocks, len(self.queries)):
            if first > start:
                stretches.append(range(start, first))
            start = first + self._index["blocks"].get(str(first), {}).get("queries", 0)
        return stretches

    def add(self, first: int, block: Attribution) -> None:
        """Write the answer to some queries, in place of what is there of them.

        Args:
            first: Position of the first of them.
            block: What was kept.
        """
        responses: Any = block.responses
        figures = responses.figures
        beside = (block.baseline, responses.kept, responses.table, figures.reliability)
        entry = StoredTable.write(
            self.path / f"queries-{first:06d}.safetensors",
            "figures",
            figures.read().cpu(),
            {name: tensor.cpu().contiguous() for name, tensor in zip(_BESIDE, beside, strict=True)},
        )
        known = {key: block.about[key] for key in OF_RUNS if key in block.about}
        self._index["trusted"] = list(figures.runs)
        self._add(str(first), entry | {"queries": len(block.queries), "trusted": list(figures.runs), **known})

    def block(self, first: int) -> tuple[Tensor, KeptResponses, tuple[str, ...], tuple[int, ...], dict[str, Any]]:
        """Return an attribution's arguments for the queries of a block, whose figures stay on disk.

        Raises:
            TrajectoryError: If a file is missing or damaged.
        """
        index, entry = self._index, self._index["blocks"][str(first)]
        table = StoredTable.map(self.path, entry, "figures", _BESIDE)
        baseline, kept, responses, reliability = (table.others[name] for name in _BESIDE)
        names = tuple(index["wanted"])
        trusted, removals, k = tuple(entry["trusted"]), index["removals"], index["about"]["keep_top"]
        figures = Figures(trusted, reliability, tuple((table, row) for row in range(len(kept))))
        known = {key: entry[key] for key in OF_RUNS if key in entry}
        about = index["about"] | known | {"chaotic": [run for run in names if run not in trusted]}
        queries = self.queries[first : first + entry["queries"]]
        return baseline, KeptResponses(kept, responses, figures, removals, k), names, queries, about
