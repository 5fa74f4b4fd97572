"""Detection of wrong labels as a torchmetric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.plot import plot_curve
from typing_extensions import override

from lightning_dtda.evaluation.functional.mislabelled import INSPECTED, mislabel_detection


class MislabelDetection(Metric):
    """How well influences find training examples with wrong labels.

    See :func:`~lightning_dtda.evaluation.functional.mislabel_detection`, and there for what to take as suspicion.

    Args:
        inspected: Shares of the examples that are looked at.
        kwargs: For :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = MislabelDetection(inspected=[0.25])
        >>> metric.update(torch.tensor([9.0, 1.0]), torch.tensor([True, False]))
        >>> metric.update(torch.tensor([5.0, 2.0]), torch.tensor([False, True]))
        >>> metric.compute()["auroc"], metric.compute()["found"]
        (tensor(0.7500, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    suspicion: list[Tensor] | Tensor
    mislabelled: list[Tensor] | Tensor

    def __init__(self, inspected: Sequence[float] = INSPECTED, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inspected = tuple(inspected)
        self.add_state("suspicion", default=[], dist_reduce_fx="cat")
        self.add_state("mislabelled", default=[], dist_reduce_fx="cat")

    @override
    def update(self, suspicion: Tensor, mislabelled: Tensor) -> None:
        """Add some training examples: suspicion and mask ``(examples,)``."""
        self.suspicion.append(suspicion)  # type: ignore[union-attr]
        self.mislabelled.append(mislabelled)  # type: ignore[union-attr]

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return area under the curve and shares found, as ``mislabel_detection`` does.

        Raises:
            AttributionError: If the shapes differ, or all labels or none are wrong.
        """
        return mislabel_detection(dim_zero_cat(self.suspicion), dim_zero_cat(self.mislabelled), self.inspected)

    @override
    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Plot which share of the wrong labels is among the most suspicious examples, by the share that is inspected.

        Args:
            val: What :meth:`compute` or ``forward`` returned; ``None`` computes it.
            ax: Axes of matplotlib to draw on, if not new ones.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        curve = (self.compute() if val is None else val)["curve"]
        found = torch.cat([curve.new_zeros(1), curve])
        names = "share of the examples inspected", "share of the wrong labels found"
        return plot_curve((torch.linspace(0, 1, len(found)), found), ax=ax, label_names=names, name=type(self).__name__)  # type: ignore[arg-type]  # two of three
