"""Predictions where a removal is large: the scale they are made on, and whether the measurement can take their values.

Functions of an attribution, and methods of :class:`~lightning_dtda.Attribution` by the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_dtda.attribution.inference import Runs
from lightning_dtda.attribution.kept import KeptResponses
from lightning_dtda.attribution.scales import ScaleName, check_scale
from lightning_dtda.errors import AttributionError

if TYPE_CHECKING:
    from lightning_dtda.attribution.attribution import Attribution


def on_scale(attribution: Attribution, scale: ScaleName) -> Attribution:
    r"""Return the attribution with predictions on another scale g. Responses, the derivatives, stay as they are.

    .. math:: y = g^{-1}\Bigl(g(m) + g'(m) \sum_{k \in S} r_k\Bigr)

    ``"linear"`` is m plus the responses, and may leave the range of the measurement: it predicts a squared error
    below zero if a removal changes the output by more than the error. The others never do:

    - ``"sqrt"`` for losses that are never negative. Of a squared error it takes the residual to be linear in the
      weights, so for a scalar output it is the squared error of the linearly predicted output;
    - ``"logit"`` for probabilities, takes their log-odds to be linear.

    Args:
        attribution: The attribution.
        scale: Name of the scale.

    Raises:
        AttributionError: If the scale is unknown or does not suit the measurements, or the attribution keeps only
            the top responses (:meth:`Attribution.keep_top`), whose figures are on the old scale.

    Example:
        >>> from lightning_dtda import Attribution
        >>> residual, change = torch.tensor([[0.5], [-0.2]]), torch.tensor([[[-0.6]], [[0.3]]])
        >>> loss = Attribution(residual**2, 2 * residual[..., None] * change, ("a", "b"), (0,))
        >>> loss.predict([0])
        tensor([[-0.3500],
                [-0.0800]])
        >>> loss.on_scale("sqrt").predict([0])
        tensor([[0.0100],
                [0.0100]])
    """
    check_scale(scale, attribution.baseline, attribution.measurement)
    if isinstance(attribution.responses, KeptResponses) and scale != attribution.scale:
        raise AttributionError(
            f"The figures that keep_top kept are on the scale {attribution.scale!r}. Attribute again with "
            f"scale={scale!r}."
        )
    return replace(attribution, about={**attribution.about, "scale": scale})


def out_of_range(
    attribution: Attribution, removed: Sequence[int | str] | None = None, runs: Runs = "trusted"
) -> Tensor:
    """Return the share of runs whose prediction without the examples is outside :attr:`Attribution.known_range`.

    There, the removal is too large for the linear prediction; predict on another scale (:func:`on_scale`).

    Args:
        attribution: The attribution.
        removed: As for :meth:`Attribution.influence`.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        Shares ``(queries, removals)``, or ``(queries,)`` for removals made together; float64. Zero if no range is
        known, NaN for removals whose responses were not kept.
    """
    selected = attribution._selected(runs)
    return selected._each_query(lambda _, predicted: share_outside(selected, predicted), removed, kept=True)


def share_outside(attribution: Attribution, predicted: Tensor) -> Tensor:
    """Return the share of runs whose predictions ``(runs, ...)`` are outside :attr:`Attribution.known_range`."""
    low, high = attribution.known_range
    rounding = torch.finfo(attribution.baseline.dtype).eps  # a probability of one may be predicted as 1 + 1e-9
    return ((predicted < low - rounding) | (predicted > high + rounding)).double().mean(0)
