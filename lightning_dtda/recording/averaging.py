"""Averages of the parameters during training: which steps they include, and with which coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dtda.compatibility import average_function, averaged_model, averages_buffers, is_a
from lightning_dtda.errors import RecordingError
from lightning_dtda.replay.running_statistics import batch_norm_layers
from lightning_dtda.trajectory import ParameterLayout

_SWA = "callbacks.StochasticWeightAveraging"


@dataclass(frozen=True)
class Average:
    r"""The averaged parameters that a training ends with instead of its last ones.

    .. math:: \bar\theta = \sum_j c_j \theta_{t_j}

    Args:
        facts: Steps :math:`t_j`, coefficients :math:`c_j` and how buffers were treated, as JSON.
        tensors: Parameters and buffers of the average, named as in a checkpoint.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def averaging_callback(trainer: pl.Trainer) -> Any:
    """Return the Trainer's callback that averages parameters, or ``None``.

    Raises:
        RecordingError: If there are several.
    """
    found = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if is_a(callback, "callbacks.WeightAveraging") or is_a(callback, _SWA)
    ]
    if len(found) > 1:
        names = ", ".join(type(callback).__name__ for callback in found)
        raise RecordingError(f"The Trainer has several callbacks that average parameters ({names}). Keep one of them.")
    return found[0] if found else None


class AveragingTap:
    """Notes what an averaging callback does, and closes the record before the average is copied into the module.

    Args:
        callback: The callback.
        module: The module.
        steps: Function that returns the number of steps taken so far.
        before_end: Function that is called before the average is copied into the module.

    Raises:
        RecordingError: If this kind of average is not supported.
    """

    def __init__(
        self, callback: Any, module: pl.LightningModule, steps: Callable[[], int], before_end: Callable[[], None]
    ) -> None:
        self._callback = callback
        self._steps = steps
        self._updates: list[tuple[int, float, float]] = []
        self._is_swa = is_a(callback, _SWA)
        if self._is_swa and batch_norm_layers(module):
            raise RecordingError(
                "StochasticWeightAveraging recomputes the statistics of BatchNorm in an extra epoch, which cannot be "
                "replayed. Use Lightning's EMAWeightAveraging or WeightAveraging, which average them too, or GroupNorm."
            )
        self._model = averaged_model(callback)
        # instance attributes shadow the methods; `remove` deletes them again
        self._owner = callback if self._is_swa else self._model
        original = self._owner.update_parameters

        def update(*arguments: Any, **named: Any) -> None:
            self._note()
            original(*arguments, **named)

        self._owner.update_parameters = update
        end = callback.on_train_end

        def on_train_end(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before_end()
            end(trainer, pl_module)

        callback.on_train_end = on_train_end

    def remove(self) -> None:
        """Restore the callback."""
        vars(self._callback).pop("on_train_end", None)
        vars(self._owner).pop("update_parameters", None)

    def average(self, layout: ParameterLayout) -> Average | None:
        """Return the average so far; ``None`` if nothing was averaged yet, so that the last parameters stay."""
        if not self._updates:
            return None
        coefficients, kept = [], 1.0
        for step, old, new in reversed(self._updates):
            coefficients.append((step, kept * new))
            kept *= old
        model = self._model if self._is_swa else self._model.module
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {f"parameters.{name}": parameters[name] for name in layout.names}
        tensors |= {f"buffers.{name}": buffer for name, buffer in buffers.items()}
        facts = {
            "callback": type(self._callback).__name__,
            "steps": [step for step, _ in reversed(coefficients)],
            "coefficients": [coefficient for _, coefficient in reversed(coefficients)],
            # "last": the module keeps its own buffers; "updated": they are copied at each update of the average
            "buffers": "last" if self._is_swa else ("averaged" if averages_buffers(self._callback) else "updated"),
        }
        return Average(facts, {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})

    def _note(self) -> None:
        """Note the step and the coefficients of the old and the new parameters, found by averaging test numbers."""
        count = self._callback.n_averaged if self._is_swa else self._model.n_averaged
        if int(count) == 0:
            self._updates.append((self._steps(), 0.0, 1.0))
            return
        rates = [self._averaged(old, new, count) for old, new in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0))]
        if abs(rates[2] - 2 * rates[0] - 3 * rates[1]) > 1e-6:
            raise RecordingError(
                "The average of the parameters is not linear in them, which is not supported. Use an average with "
                "fixed weights, such as EMAWeightAveraging or the default averaging function."
            )
        self._updates.append((self._steps(), rates[0], rates[1]))

    def _averaged(self, old: float, new: float, count: Tensor) -> float:
        one, other = torch.tensor(old, dtype=torch.float64), torch.tensor(new, dtype=torch.float64)
        if self._is_swa:
            return float(average_function(self._callback)(one, other, count))
        if self._model.multi_avg_fn is not None:
            self._model.multi_avg_fn([one], [other], count)
            return float(one)
        if self._model.avg_fn is not None:
            return float(self._model.avg_fn(one, other, count))
        return old + (new - old) / (float(count) + 1)
