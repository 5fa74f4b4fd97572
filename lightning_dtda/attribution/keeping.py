"""``attribute(keep_top=...)``: queries are processed in blocks, and only the top of each query is kept.

Which responses to keep, and most figures of all removals, depend on all runs: they are known only when every run is
attributed. So all runs are attributed for one block of queries, into a scratch store; the result is reduced, and the
scratch store deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.kept import FIGURES, bytes_kept, joined, keep_top, known_of_runs
from lightning_dtda.attribution.kept_store import KeptStore
from lightning_dtda.attribution.resources import check_room, response_bytes
from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.estimators import Estimator, Question
from lightning_dtda.trajectory import Ensemble
from lightning_dtda.units import GIB

_log = logging.getLogger(__name__)

Answer = Callable[[range, Path | None], Attribution]
"""Attributes a range of queries over all runs, in a directory or in memory."""


def block_size(ensemble: Ensemble, question: Question, estimator: Estimator, budget: float) -> int:
    """Return the number of queries in a block.

    Args:
        ensemble: The runs.
        question: The question, for all queries.
        estimator: The estimator. A block holds a multiple of its chunks of queries if one fits, because a part of a
            chunk takes as long as a whole one.
        budget: Space for the responses and figures of a block, in GiB.

    Raises:
        AttributionError: If the estimator cannot answer the question.
    """
    runs = list(ensemble)
    each = (len(runs) + len(FIGURES)) * len(question.removals) * response_bytes(ensemble[0], estimator)
    most = max(1, int(budget * GIB / each))
    if most >= len(question.queries):
        return len(question.queries)
    chunk = estimator.plan(runs, question).queries_per_chunk
    return most - most % chunk if chunk < most else most


def attribute_in_blocks(
    ensemble: Ensemble,
    question: Question,
    estimator: Estimator,
    k: int,
    budget: float,
    store: KeptStore | None,
    answer: Answer,
) -> Attribution:
    """Attribute all queries, and keep the top of each.

    Args:
        ensemble: The runs.
        question: The question, for all queries.
        estimator: The estimator.
        k: As for :meth:`Attribution.keep_top <lightning_dtda.Attribution.keep_top>`.
        budget: As for :func:`block_size`.
        store: Store for finished blocks, including those of an earlier call; ``None`` keeps them in memory.
        answer: Function that attributes a block.

    Raises:
        AttributionError: As for :func:`block_size`, or if there is not enough space for the result.
    """
    blocks, queries = _Blocks(k, store, answer), len(question.queries)
    stretches = [range(queries)] if store is None else store.missing(store.finished)
    if left := sum(map(len, stretches)):
        size = block_size(ensemble, question, estimator, budget)
        needed = bytes_kept(k, len(ensemble), left, len(question.removals), response_bytes(ensemble[0], estimator))
        check_room(needed, None if store is None else store.path)
        for stretch in stretches:
            for start in range(stretch.start, stretch.stop, size):
                blocks.add(range(start, min(start + size, stretch.stop)))
    return blocks.finish()


class _Blocks:
    """The finished blocks of queries.

    Args:
        k: As for :func:`attribute_in_blocks`.
        store: As for :func:`attribute_in_blocks`.
        answer: As for :func:`attribute_in_blocks`.
    """

    def __init__(self, k: int, store: KeptStore | None, answer: Answer) -> None:
        self._k, self._store, self._answer = k, store, answer
        self._kept: dict[int, Attribution] = {}
        if store is not None:
            self._kept = {first: Attribution(*store.block(first)) for first in store.finished}

    def add(self, numbers: range) -> None:
        """Attribute a block of queries and keep their top, over the runs that are trusted so far."""
        scratch = None if self._store is None else self._store.path / f"scratch-{numbers.start}-{numbers.stop}"
        self._clear(but=scratch)
        _log.info("Queries %d to %d, keeping the top %d of each.", numbers.start, numbers.stop - 1, self._k)
        found = self._answer(numbers, scratch)
        left_out = self._chaotic({**self._kept, numbers.start: found})
        block = keep_top(replace(found, about={**found.about, "chaotic": left_out}), self._k)
        if self._store is not None:
            self._store.add(numbers.start, block)
            block = Attribution(*self._store.block(numbers.start))
        self._kept[numbers.start] = block
        del found  # not every system can delete a file that is still mapped
        self._clear()

    def finish(self) -> Attribution:
        """Return the answer to all queries, after repeating the blocks for which other runs were trusted."""
        left_out = self._chaotic(self._kept)
        for first, block in list(self._kept.items()):
            if list(block.chaotic) != left_out:
                _log.info(
                    "Repeating a block of queries without the chaotic runs: %s.",
                    ", ".join(left_out) or "none",
                )
                self.add(range(first, first + len(block.queries)))
        self._clear()
        return joined([self._kept[first] for first in sorted(self._kept)])

    @staticmethod
    def _chaotic(blocks: dict[int, Attribution]) -> list[str]:
        known: dict[str, Any] = known_of_runs([blocks[first] for first in sorted(blocks)])
        return chaotic(known["response_norm"])

    def _clear(self, but: Path | None = None) -> None:
        """Delete scratch stores that are no longer needed, such as those of blocks of another size."""
        if self._store is not None:
            self._store.clear_scratch(self._store.path, but)
