"""Gradient clipping, as Lightning's Trainer does it between the backward pass and the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_EPSILON = 1e-6
"""Constant that ``torch.nn.utils.clip_grad_norm_`` adds to the norm before dividing by it."""


class Clipping(ABC):
    """A function of the whole gradient ``(..., P)`` and its adjoint."""

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """Return the gradient that the optimizer receives."""

    @abstractmethod
    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Pull a cotangent of the clipped gradient ``(..., P)`` back to the gradient.

        Args:
            gradient: Gradient before clipping; may have one entry where the cotangent has many (queries).
            cotangent: Cotangent of the gradient after clipping.
        """

    def tangent(self, gradient: Tensor, tangent: Tensor) -> Tensor:
        """Push a tangent of the gradient ``(..., P)`` forward to the clipped gradient.

        The same as :meth:`adjoint`, because every clipping here has a symmetric Jacobian: diagonal for clipping by
        value; a multiple of the identity minus a multiple of the gradient's outer product with itself for clipping by
        norm.
        """
        return self.adjoint(gradient, tangent)


class NoClipping(Clipping):
    """No clipping: the gradient is left unchanged."""

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        return gradient

    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Return the cotangent."""
        return cotangent


class NormClipping(Clipping):
    r"""``torch.nn.utils.clip_grad_norm_`` (Pascanu et al., arXiv 1211.5063, algorithm 1).

    .. math:: \tilde g = \min\Big(1, \frac{M}{\lVert g\rVert + \epsilon}\Big)\, g

    Args:
        largest: M, the largest norm that is not clipped.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the scaled gradient."""
        return gradient * self._factor(torch.linalg.vector_norm(gradient, dim=-1, keepdim=True))

    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Return the scaled cotangent, minus its component along the gradient if the norm is clipped."""
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        factor = self._factor(norm)
        # the derivative of the factor is along the gradient, and zero if nothing is clipped
        slope = torch.where(factor < 1, factor / ((norm + _EPSILON) * norm), 0.0)
        along = (gradient * cotangent).sum(-1, keepdim=True)
        return torch.addcmul(factor * cotangent, slope * along, gradient, value=-1)

    def unclipped(self, gradient: Tensor, norm: Tensor) -> Tensor:
        """Return the gradient before clipping ``(..., P)``, from the clipped one and the original norm ``(..., 1)``."""
        return gradient / self._factor(norm)

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.largest / (norm + _EPSILON)).clamp(max=1.0)


class ValueClipping(Clipping):
    r"""``torch.nn.utils.clip_grad_value_``: :math:`\tilde g_p = \min(\max(g_p, -v), v)`.

    Args:
        largest: v, the largest absolute value of an entry.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the gradient with each entry clamped to the bounds."""
        return gradient.clamp(-self.largest, self.largest)

    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the entries within the bounds, and zero for the others.

        The clipped gradient can be given instead of the original one: an entry at a bound was clipped.
        """
        return cotangent * (gradient.abs() < self.largest)


def clipping(value: float | None, algorithm: str | None) -> Clipping:
    """Return the clipping for a Trainer's ``gradient_clip_val`` and ``gradient_clip_algorithm``.

    Example:
        >>> clipping(1.0, "norm").apply(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    if not value:
        return NoClipping()
    return ValueClipping(value) if algorithm == "value" else NormClipping(value)
