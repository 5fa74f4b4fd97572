"""Gradient clipping, as Lightning's Trainer does it between the backward pass and the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_EPSILON = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm before it divides by it."""


class Clipping(ABC):
    """A function of the whole gradient ``(..., P)`` and its adjoint."""

    @abstractmethod
    def apply(self, gradient: Tensor) -> Tensor:
        """Return the gradient that the optimizer gets."""

    @abstractmethod
    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Pull a cotangent of the clipped gradient ``(..., P)`` back to the gradient.

        Args:
            gradient: Before clipping; may have one entry where the cotangent has many (queries).
            cotangent: Of the gradient after clipping.
        """

    def tangent(self, gradient: Tensor, tangent: Tensor) -> Tensor:
        """Push a tangent of the gradient ``(..., P)`` forward to the clipped gradient.

        The same as :meth:`adjoint`: each of the clippings here has a symmetric Jacobian. That of values is diagonal;
        that of the norm, a multiple of the identity less one of the gradient's outer product with itself.
        """
        return self.adjoint(gradient, tangent)


class NoClipping(Clipping):
    """The gradient as it is."""

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
        largest: M, the largest norm that is let through.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the scaled gradient."""
        return gradient * self._factor(torch.linalg.vector_norm(gradient, dim=-1, keepdim=True))

    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Return the scaled cotangent, less its share along the gradient where the norm is clipped."""
        norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
        factor = self._factor(norm)
        # the derivative of the factor is along the gradient; where nothing is clipped, it is zero
        slope = torch.where(factor < 1, factor / ((norm + _EPSILON) * norm), 0.0)
        along = (gradient * cotangent).sum(-1, keepdim=True)
        return torch.addcmul(factor * cotangent, slope * along, gradient, value=-1)

    def unclipped(self, gradient: Tensor, norm: Tensor) -> Tensor:
        """Return a gradient before clipping ``(..., P)``, from the one after and the norm ``(..., 1)`` before."""
        return gradient / self._factor(norm)

    def _factor(self, norm: Tensor) -> Tensor:
        return (self.largest / (norm + _EPSILON)).clamp(max=1.0)


class ValueClipping(Clipping):
    r"""``torch.nn.utils.clip_grad_value_``: :math:`\tilde g_p = \min(\max(g_p, -v), v)`.

    Args:
        largest: v.
    """

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def apply(self, gradient: Tensor) -> Tensor:
        """Return the gradient with each entry brought within the bounds."""
        return gradient.clamp(-self.largest, self.largest)

    def adjoint(self, gradient: Tensor, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the entries that are within the bounds, zero for the others.

        The clipped gradient does as well as the one before: an entry at a bound says that it was beyond.
        """
        return cotangent * (gradient.abs() < self.largest)


def clipping(value: float | None, algorithm: str | None) -> Clipping:
    """Return the clipping that a Trainer does with its ``gradient_clip_val`` and ``gradient_clip_algorithm``.

    Example:
        >>> clipping(1.0, "norm").apply(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    if not value:
        return NoClipping()
    return ValueClipping(value) if algorithm == "value" else NormClipping(value)
