"""Whether the worst seeds get better or worse."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

Side = Literal["upper", "lower"]


class Tail:
    r"""Change of the expected shortfall, :math:`ES_a(Y) - ES_a(X)`: of the mean over a tail.

    .. math::
        ES_a(X) = \frac{1}{1 - a} \int_a^1 Q_u(X)\, du

    of the empirical distribution, a run on the border counting with its share (Acerbi and Tasche, *Journal of Banking &
    Finance* 26, 2002; also called conditional value at risk). In the measurement's unit. Positive: removing the
    examples raises the tail's mean. With S runs the tail holds (1 - a) S of them.

    Args:
        level: a, where the tail begins; 0.9 is the mean over the most extreme tenth.
        side: The ``"upper"`` tail, of large values, or the ``"lower"`` one.

    Raises:
        AttributionError: If the level or the side is none.

    Example:
        >>> Tail(0.5)(torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.0, 0.0, 4.0, 6.0]))
        tensor(1.)
    """

    name = "tail"
    least_runs = 1

    def __init__(self, level: float = 0.9, side: Side = "upper") -> None:
        if not 0 <= level < 1:
            raise AttributionError(f"level={level}; give where the tail begins, from 0 to less than 1.")
        if side not in get_args(Side):
            raise AttributionError(f"side={side!r}; choose from {', '.join(get_args(Side))}.")
        self.level, self.side = level, side

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``ES(Y) - ES(X)``."""
        return self._shortfall(predicted) - self._shortfall(baseline)

    def _shortfall(self, samples: Tensor) -> Tensor:
        runs = len(samples)
        above = torch.linspace(0, 1, runs + 1, dtype=samples.dtype, device=samples.device).clamp_min(self.level)
        weights = above.diff() / (1 - self.level)
        # the lower tail begins at the largest value that belongs to it
        ordered = samples.sort(0, descending=self.side == "lower").values
        return torch.tensordot(weights, ordered, 1)
