"""Distance between joint distributions of several measurements."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.differences.distances import Wasserstein
from lightning_dtda.units import is_quantity


class SlicedWasserstein(Difference):
    r"""Sliced 2-Wasserstein distance between joint distributions.

    .. math::
        SW_2^2 = \frac1P \sum_p W_2^2(\langle u_p, X \rangle, \langle u_p, Y \rangle)

    over P directions drawn uniformly on the sphere (Bonneel et al., *Journal of Mathematical Imaging and Vision* 51,
    2015), the same in every call. It detects what no single measurement shows: two measurements becoming dependent. In
    the measurement's unit, never negative; for a single measurement it is the Wasserstein distance.

    Args:
        projections: Number of directions P. The relative error of the distance is about ``1 / sqrt(2 P)``, the same for
            all removals.

    Raises:
        AttributionError: If ``projections`` is less than 1.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # two measurements that are equal in both runs
        >>> y = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # opposite, and each as before
        >>> SlicedWasserstein()(x, y) > 0.5
        tensor(True)
    """

    name = "sliced_wasserstein"
    title = "sliced Wasserstein influence"
    formula = "SW₂(X, Y)"
    meaning = "distance by which the joint distribution of the {measurement} over queries moves"
    unit = "the {measurement}'s unit"
    signed = False
    joint = True

    def __init__(self, projections: int = 64) -> None:
        if not (is_quantity(projections, whole=True) and projections >= 1):
            raise AttributionError(f"projections={projections}; give the number of directions, at least 1.")
        self.projections = projections

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``SW_2(X, Y)``."""
        distance, squares = Wasserstein(), torch.zeros_like(predicted[0, 0])
        for direction in self.directions(predicted.shape[1]).to(predicted):
            projected = (torch.tensordot(samples, direction, ([1], [0])) for samples in (baseline, predicted))
            squares += distance(*projected).square()
        return (squares / self.projections).sqrt()

    def directions(self, dimensions: int) -> Tensor:
        """Return unit vectors ``(projections, dimensions)``, float64."""
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(self.projections, dimensions, generator=generator, dtype=torch.float64)
        return normal / normal.norm(dim=1, keepdim=True)
