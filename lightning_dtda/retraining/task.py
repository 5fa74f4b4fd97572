"""One training of a ground truth: which subset is removed, and the seed."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """One training.

    Args:
        subset: Position of the subset that is removed; ``None`` for a training on everything.
        seed: What ``seed_everything`` is called with.

    Example:
        >>> str(Task(3, 17)), str(Task(None, 4))
        ('subset 3 seed 17', 'all data seed 4')
    """

    subset: int | None
    seed: int

    def __str__(self) -> str:
        return f"{'all data' if self.subset is None else f'subset {self.subset}'} seed {self.seed}"
