"""The values that a measurement can take, as far as they are certain: a squared error is never negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.compatibility import saved_for_backward
from lightning_dtda.errors import AttributionError

Range = tuple[float, float]
"""Lowest and highest possible value; infinite where there is none, or none is known."""

EVERYTHING: Range = (-math.inf, math.inf)

_OF_FUNCTIONS: dict[str, Range] = {
    **dict.fromkeys(("MseLoss", "SmoothL1Loss", "HuberLoss", "Abs", "Softplus", "Relu"), (0.0, math.inf)),
    **dict.fromkeys(("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "LinalgVectorNorm"), (0.0, math.inf)),
    **dict.fromkeys(("Sigmoid", "Softmax"), (0.0, 1.0)),
    **dict.fromkeys(("LogSigmoid", "LogSoftmax"), (-math.inf, 0.0)),
}
"""Ranges of functions; the names are those of autograd. Those of cross-entropies hold for targets that are
probabilities and class weights of at least zero."""

_WITHIN = (
    *("Mean", "Select", "Slice", "Index", "Gather", "View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze"),
    *("Expand", "Permute", "T", "Transpose", "Clone", "Alias", "ToCopy"),
)
"""Functions whose values lie in the range of their argument."""


def known_range(measurement: Callable[..., Any], value: Tensor) -> Range:
    """Return the range of a measurement: its attribute ``range``, or what the operations that compute it imply.

    Only operations on the way to the value are known, such as a squared error, a cross-entropy or a softmax, their
    means, sums and multiples by a constant. For everything else the range is :data:`EVERYTHING`.

    Args:
        measurement: The measurement.
        value: A value of it, with its graph.

    Raises:
        AttributionError: If the attribute ``range`` is not a pair of numbers in order.

    Example:
        >>> import torch
        >>> outputs = torch.zeros(4, 3, requires_grad=True)
        >>> known_range(print, torch.nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 2, 0])))
        (0.0, inf)
        >>> known_range(print, outputs.sum())
        (-inf, inf)
    """
    declared = getattr(measurement, "range", None)
    if declared is None:
        return _range_of(getattr(value, "grad_fn", None))  # a wrong type is reported when the measurement is taken
    try:
        low, high = (float(end) for end in declared)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high:
        raise AttributionError(
            f"The measurement's range is {declared!r}. Give its lowest and highest value, such as (0, math.inf)."
        )
    return low, high


def _range_of(node: Any) -> Range:
    if node is None:  # a constant, whose value the graph does not have
        return EVERYTHING
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    if name in _OF_FUNCTIONS:
        return _OF_FUNCTIONS[name]
    if name == "Pow" and saved_for_backward(node, "exponent") in (2, 4):
        return 0.0, math.inf
    arguments = [following for following, _ in node.next_functions]
    if name in _WITHIN:
        return _range_of(arguments[0])
    if name == "Exp":
        low, high = _range_of(arguments[0])
        return math.exp(min(low, 0.0)), math.exp(high) if high <= 0 else math.inf
    if name in ("Neg", "NllLoss", "NllLoss2D"):  # the latter two add up the negatives of log-probabilities
        low, high = _range_of(arguments[0])
        return _multiples((-high, -low))
    if name == "Sum":
        return _multiples(_range_of(arguments[0]))
    if name == "Add" and (saved_for_backward(node, "alpha") or 1) > 0:
        ranges = [_multiples(_range_of(argument)) for argument in arguments]
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)
    if name == "Mul" or (name == "Div" and arguments[0] is not None):
        constants = [saved_for_backward(node, operand) for operand in ("self", "other")]
        varying = [argument for argument in arguments if argument is not None]
        factor = torch.as_tensor(next((each for each in constants if each is not None), -1))
        # a factor of several numbers may come from the data, such as an advantage, and change its sign with the query
        if len(varying) == 1 and factor.ndim == 0 and factor >= 0:
            return _multiples(_range_of(varying[0]))
    return EVERYTHING


def _multiples(of: Range) -> Range:
    """Return the range of sums of multiples, with factors that are not negative, of values in a range."""
    low, high = of
    return (0.0 if low >= 0 else -math.inf), (0.0 if high <= 0 else math.inf)
