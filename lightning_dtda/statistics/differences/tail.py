"""Change of the mean over a tail: do the worst seeds get better or worse?"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference, percent
from lightning_dtda.units import is_quantity

Side = Literal["upper", "lower"]

DEFAULT = 0.9
"""Level at which the tail begins that the name ``tail`` stands for."""


class Tail(Difference):
    r"""Change of the expected shortfall, the mean over a tail: :math:`ES_a(Y) - ES_a(X)`.

    .. math::
        ES_a(X) = \frac{1}{1 - a} \int_a^1 Q_u(X)\, du

    for the empirical distribution, where a run on the border counts in part (Acerbi and Tasche, *Journal of Banking &
    Finance* 26, 2002; also called conditional value at risk). In the measurement's unit. Positive: removing the
    examples raises the tail's mean. With S runs, the tail contains (1 - a) S of them.

    Args:
        level: Level a at which the tail begins; 0.9 is the mean over the most extreme tenth.
        side: ``"upper"`` for the tail of large values, ``"lower"`` for that of small ones.

    Raises:
        AttributionError: If the level or the side is invalid.

    Example:
        >>> Tail(0.5)(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.0, 0.0, 4.0, 6.0]))
        tensor(1.)
    """

    name = "tail"
    formula = "ES(Y) \N{MINUS SIGN} ES(X)"
    meaning = "change of the mean {measurement} over a tail of the runs"
    unit = "the {measurement}'s unit"

    def __init__(self, level: float = DEFAULT, side: Side = "upper") -> None:
        if not (is_quantity(level) and 0 <= level < 1):
            raise AttributionError(f"level={level!r}; it must be at least 0 and less than 1.")
        if side not in get_args(Side):
            raise AttributionError(f"side={side!r}; choose from {', '.join(get_args(Side))}.")
        self.level, self.side = level, side
        end, share = "highest" if side == "upper" else "lowest", percent(1 - level)
        if (level, side) != (DEFAULT, "upper"):
            self.name = f"tail({level:g}, {side})"
        self.title = f"influence on the {side} tail, {share}"
        self.meaning = f"change of the mean {{measurement}} over the {end} {share} of the runs"

    def freedom(self, runs: int) -> float:
        """Return 0: it is tested by exchange. The few runs in the tail say too little about their own spread."""
        return 0

    def no_interval(self, runs: int) -> str:
        """Return why there is none: Student's t held 67 to 89 % where it promised 95 (8 to 64 runs)."""
        return "no method holds its level with the few runs in a tail. Use the p-value, or the interval of a quantile."

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``ES(Y) - ES(X)``."""
        return self._shortfall(predicted) - self._shortfall(baseline)

    def _shortfall(self, samples: Tensor) -> Tensor:
        runs = len(samples)
        above = torch.linspace(0, 1, runs + 1, dtype=samples.dtype, device=samples.device).clamp_min(self.level)
        weights = above.diff() / (1 - self.level)
        # in descending order, the lower tail comes last
        ordered = samples.sort(0, descending=self.side == "lower").values
        return torch.tensordot(weights, ordered, 1)
