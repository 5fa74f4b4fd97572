"""Measurements: functions of a trained model that return one number for each query."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_dtda.compatibility import overrides
from lightning_dtda.errors import AttributionError
from lightning_dtda.replay.replica import step_loss
from lightning_dtda.text import did_you_mean

Measurement: TypeAlias = Callable[[LightningModule, Any], Tensor]
"""Function ``(module, batch) -> (B,)``. The module is in evaluation mode and holds the run's parameters."""


def loss(module: LightningModule, batch: Any) -> Tensor:
    """The loss that ``training_step`` returns for a query ``(1,)``, with the module in evaluation mode."""
    return step_loss(module, batch).reshape(1)


def prediction(module: LightningModule, batch: Any) -> Tensor:
    """The module's scalar output for each query ``(B,)``.

    Raises:
        AttributionError: If the output is not one number for each query.
    """
    output = output_of(module, batch)
    if output.numel() != output.shape[0]:
        raise AttributionError(
            f'The measurement "prediction" needs one number for each query, but the module returns shape '
            f'{tuple(output.shape)}. Use "margin" for class scores, "loss", or a callable (module, batch) -> (B,).'
        )
    return output.reshape(output.shape[0])


def margin(module: LightningModule, batch: Any) -> Tensor:
    r"""The log-odds of the correct class of each query ``(B,)``.

    Computes :math:`\log p_y - \log(1 - p_y)` from class scores ``(B, C)`` and integer labels: the second element of the
    batch, or its entry ``labels``, ``label``, ``targets``, ``target`` or ``y`` (Park et al., *TRAK*, arXiv 2303.14186,
    section 3).

    Raises:
        AttributionError: If there are no class scores or no integer labels.
    """
    scores, labels = output_of(module, batch), labels_of(batch)
    if scores.ndim != 2 or not isinstance(labels, Tensor) or labels.is_floating_point():
        raise AttributionError(
            'The measurement "margin" needs class scores (B, C), and integer labels as the second element of the batch '
            f"or as its entry {' or '.join(LABELS)}. Give a callable (module, batch) -> (B,) instead."
        )
    # a comparison instead of one_hot, which reads the largest label and so cannot be vectorized
    correct = labels.reshape(-1, 1) == torch.arange(scores.shape[1], device=scores.device)
    # the lowest number instead of minus infinity keeps the derivative finite
    others = torch.where(correct, torch.finfo(scores.dtype).min, scores)
    return (scores * correct).sum(1) - torch.logsumexp(others, 1)


LABELS = ("labels", "label", "targets", "target", "y")
"""Names under which the labels are looked up, as entries or attributes of a batch."""

_OUTPUTS = ("logits", "prediction", "predictions", "preds", "output", "outputs")
"""Names under which the outputs are looked up, as entries or attributes of what a module returns."""


def labels_of(batch: Any) -> Any:
    """Return the second element of a batch, or its entry under one of :data:`LABELS`; ``None`` if there is neither."""
    if isinstance(batch, (tuple, list)):
        return batch[1] if len(batch) > 1 else None
    return _entry(batch, LABELS)


def output_of(module: LightningModule, batch: Any) -> Tensor:
    """Return what ``predict_step`` returns for a batch, or ``forward`` for its inputs.

    Raises:
        AttributionError: If that is no tensor.
    """
    if overrides(module, "predict_step"):
        takes_index = is_param_in_hook_signature(module.predict_step, "batch_idx", min_args=2)
        output = module.predict_step(batch, 0) if takes_index else module.predict_step(batch)
    elif isinstance(batch, Mapping):
        # keyword arguments, like a Hugging Face model; a module with a single argument gets the batch itself
        takes_names = len(inspect.signature(module.forward).parameters) != 1
        output = module(**batch) if takes_names else module(batch)
    else:
        output = module(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if not isinstance(output, Tensor):
        found = _entry(output, _OUTPUTS)
        if not isinstance(found, Tensor) and isinstance(output, (tuple, list)) and output:
            found = output[0]
        if not isinstance(found, Tensor):
            raise AttributionError(
                f"{type(module).__name__} returned {type(output).__name__} for a query instead of a tensor. Give a "
                "callable (module, batch) -> (B,) as the measurement."
            )
        output = found
    return output


def _entry(value: Any, names: Sequence[str]) -> Any:
    """Return the first entry of a dictionary, or attribute of an object, that exists under one of these names."""
    for name in names:
        found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if found is not None:
            return found
    return None


MEASUREMENTS: dict[str, Measurement] = {"loss": loss, "margin": margin, "prediction": prediction}


def resolve_measurement(measurement: str | Measurement) -> tuple[str, Measurement]:
    """Return the name and the function of a measurement.

    Args:
        measurement: ``loss``, ``margin``, ``prediction``, the import path of a callable, or a callable.

    Raises:
        AttributionError: If the name or import path is unknown.

    Example:
        >>> resolve_measurement("margin")[0]
        'margin'
    """
    if not isinstance(measurement, str):
        # an instance has no name that distinguishes it from others of its class; <...> marks this
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
            f"Unknown measurement {measurement!r}. Choose from {', '.join(MEASUREMENTS)}, or give the import path of a "
            f"callable (module, batch) -> (B,).{did_you_mean(measurement, MEASUREMENTS)}"
        )
    return measurement, found() if isinstance(found, type) else found
