"""Attributing without room for all responses: queries are answered block by block, and of each the top is kept.

What decides which responses are kept, and most of what must be known of all, is over runs: it is known only when every
run has answered. So a block of queries is answered by all runs, into a scratch store of its own, reduced, and dropped.
"""

from __future__ import annotations

import logging
import shutil
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
"""Answers a stretch of queries by all runs, in a directory or in memory."""


def block_size(ensemble: Ensemble, question: Question, estimator: Estimator, budget: float) -> int:
    """Return how many queries are answered at a time.

    Args:
        ensemble: The runs.
        question: The whole question.
        estimator: Whose chunks of queries are not to be cut where whole ones fit: a part takes as long as a whole.
        budget: In GiB, for a block's responses, and its figures.

    Raises:
        AttributionError: If the estimator cannot answer.
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
    """Answer all queries, and keep the top of each.

    Args:
        ensemble: The runs.
        question: The whole question.
        estimator: What answers it.
        k: As for :meth:`Attribution.keep_top <lightning_dtda.Attribution.keep_top>`.
        budget: As for :func:`block_size`.
        store: Where blocks are kept, and found if they were finished before; ``None`` is in memory.
        answer: Answers a block.

    Raises:
        AttributionError: As :func:`block_size`, or if there is no room for what is kept.
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
    """Blocks of queries that are answered.

    Args:
        k: As for :func:`attribute_in_blocks`, as all of them.
        store: Where they are kept.
        answer: Answers one.
    """

    def __init__(self, k: int, store: KeptStore | None, answer: Answer) -> None:
        self._k, self._store, self._answer = k, store, answer
        self._kept: dict[int, Attribution] = {}
        if store is not None:
            self._kept = {first: Attribution(*store.block(first)) for first in store.finished}

    def add(self, numbers: range) -> None:
        """Answer the queries of a block and keep their top, over the runs that are trusted by what is known so far."""
        scratch = None if self._store is None else self._store.path / f"scratch-{numbers.start}-{numbers.stop}"
        self._clear(but=scratch)
        _log.info("Queries %d to %d, of which the top %d are kept.", numbers.start, numbers.stop - 1, self._k)
        found = self._answer(numbers, scratch)
        left_out = self._chaotic({**self._kept, numbers.start: found})
        block = keep_top(replace(found, about={**found.about, "chaotic": left_out}), self._k)
        if self._store is not None:
            self._store.add(numbers.start, block)
            block = Attribution(*self._store.block(numbers.start))
        self._kept[numbers.start] = block
        del found  # a mapped file may not be removed everywhere
        self._clear()

    def finish(self) -> Attribution:
        """Return the answer to all queries, once those are done again whose runs were trusted too soon, or not."""
        left_out = self._chaotic(self._kept)
        for first, block in list(self._kept.items()):
            if list(block.chaotic) != left_out:
                _log.info("Which runs are chaotic turned out differently: %s.", ", ".join(left_out) or "none is")
                self.add(range(first, first + len(block.queries)))
        self._clear()
        return joined([self._kept[first] for first in sorted(self._kept)])

    @staticmethod
    def _chaotic(blocks: dict[int, Attribution]) -> list[str]:
        known: dict[str, Any] = known_of_runs([blocks[first] for first in sorted(blocks)])
        return chaotic(known["response_norm"])

    def _clear(self, but: Path | None = None) -> None:
        """Remove what was answered and is not needed any more, such as parts of blocks of another size."""
        for left in () if self._store is None else self._store.path.glob("scratch-*"):
            if left != but:
                shutil.rmtree(left)
