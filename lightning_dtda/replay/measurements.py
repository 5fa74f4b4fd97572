"""Measurements: what of a trained model is looked at, one number for each query."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.replay.losses import example_losses

Measurement: TypeAlias = Callable[[LightningModule, Any], Tensor]
"""``(module, batch) -> (B,)``; the module is in evaluation mode and holds the run's parameters."""


def loss(module: LightningModule, batch: Any) -> Tensor:
    """The training loss of each query ``(B,)``, with the module in evaluation mode."""
    return example_losses(module, batch)


def prediction(module: LightningModule, batch: Any) -> Tensor:
    """The module's scalar output for each query ``(B,)``.

    Raises:
        AttributionError: If the output is not one number for each query.
    """
    output = _forward(module, batch)
    if output.numel() != output.shape[0]:
        raise AttributionError(
            f'The measurement "prediction" needs one number for each query; the module returns shape '
            f'{tuple(output.shape)}. Use "margin" for class scores, "loss", or a callable (module, batch) -> (B,).'
        )
    return output.reshape(output.shape[0])


def margin(module: LightningModule, batch: Any) -> Tensor:
    r"""The log-odds of the correct class of each query ``(B,)``.

    :math:`\log p_y - \log(1 - p_y)`, from class scores ``(B, C)`` and the integer label that is the batch's second
    element (Park et al., *TRAK*, arXiv 2303.14186, section 3).

    Raises:
        AttributionError: If there are no class scores or no integer labels.
    """
    scores, labels = _forward(module, batch), batch[1] if isinstance(batch, (tuple, list)) else None
    if scores.ndim != 2 or labels is None or labels.is_floating_point():
        raise AttributionError(
            'The measurement "margin" needs class scores (B, C) and integer labels as the batch\'s second element. '
            "Give a callable (module, batch) -> (B,) instead."
        )
    # a comparison, not one_hot, which reads its argument's largest entry: nothing that vmap could do
    correct = labels.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
    # the lowest number, not minus infinity: its derivative stays finite
    others = torch.where(correct, torch.finfo(scores.dtype).min, scores)
    return (scores * correct).sum(1) - torch.logsumexp(others, 1)


def _forward(module: LightningModule, batch: Any) -> Tensor:
    if is_overridden("predict_step", module, LightningModule):
        output = module.predict_step(batch, 0)
    else:
        output = module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if not isinstance(output, Tensor):
        raise AttributionError(
            f"{type(module).__name__} returns {type(output).__name__} for a query, not a tensor. Give a callable "
            "(module, batch) -> (B,) as the measurement."
        )
    return output


MEASUREMENTS: dict[str, Measurement] = {"loss": loss, "margin": margin, "prediction": prediction}


def resolve_measurement(measurement: str | Measurement) -> tuple[str, Measurement]:
    """Return a measurement's name and function.

    Args:
        measurement: ``loss``, ``margin``, ``prediction``, the import path of a callable, or a callable.

    Raises:
        AttributionError: If a name stands for nothing.

    Example:
        >>> resolve_measurement("margin")[0]
        'margin'
    """
    if not isinstance(measurement, str):
        # an instance is known by its arguments only to itself: <...> marks what has no name of its own
        name = getattr(measurement, "__qualname__", f"<{type(measurement).__qualname__}>")
        return f"{getattr(measurement, '__module__', '')}.{name}", measurement
    if measurement in MEASUREMENTS:
        return measurement, MEASUREMENTS[measurement]
    module_name, _, attribute = measurement.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute) if module_name else None
    except (ImportError, AttributeError):
        found = None
    if not callable(found):
        raise AttributionError(
            f"{measurement!r} is no measurement. Choose from {', '.join(MEASUREMENTS)}, or give the import path of a "
            "callable (module, batch) -> (B,)."
        )
    return measurement, found() if isinstance(found, type) else found
