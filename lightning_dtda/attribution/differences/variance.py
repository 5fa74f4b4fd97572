"""Whether the measurement depends more, or less, on the seed."""

from __future__ import annotations

from torch import Tensor


class Variance:
    r"""Change of the variance, :math:`\mathrm{Var}\, Y - \mathrm{Var}\, X`, unbiased (arXiv 2506.12965, section 3).

    In the square of the measurement's unit. Positive: removing the examples makes training less reproducible.

    Example:
        >>> import torch
        >>> Variance()(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]))
        tensor(6.)
    """

    name = "variance"
    least_runs = 2
    moments = ("variance",)

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``Var Y - Var X`` with divisor S - 1."""
        return predicted.var(0) - baseline.var(0)
