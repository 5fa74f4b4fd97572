"""One training of a ground truth: the removed subset and the seed."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """One training.

    Args:
        subset: Position of the removed subset; ``None`` for a training on all examples.
        seed: Argument of ``seed_everything``.

    Example:
        >>> str(Task(3, 17)), str(Task(None, 4))
        ('subset 3 seed 17', 'all data seed 4')
    """

    subset: int | None
    seed: int

    def __str__(self) -> str:
        return f"{'all data' if self.subset is None else f'subset {self.subset}'} seed {self.seed}"
