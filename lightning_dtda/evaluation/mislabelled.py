"""Detection of wrong labels as a torchmetrics metric."""

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

    See :func:`~lightning_dtda.evaluation.functional.mislabel_detection`, also for what to use as suspicion.

    Args:
        inspected: Shares of the examples that are inspected.
        kwargs: Keyword arguments for :class:`torchmetrics.Metric`.

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
        """Add training examples.

        Args:
            suspicion: Suspicion of each example ``(examples,)``.
            mislabelled: Whether each label is wrong ``(examples,)``, bool.
        """
        self.suspicion.append(suspicion)  # type: ignore[union-attr]
        self.mislabelled.append(mislabelled)  # type: ignore[union-attr]

    @override
    def compute(self) -> dict[str, Tensor]:
        """Return the area under the ROC curve and the shares found, as ``mislabel_detection`` does.

        Raises:
            AttributionError: If the shapes differ, or either all or none of the labels are wrong.
        """
        return mislabel_detection(dim_zero_cat(self.suspicion), dim_zero_cat(self.mislabelled), self.inspected)

    @override
    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Plot the share of wrong labels found among the most suspicious examples over the share inspected.

        Args:
            val: Result of :meth:`compute` or ``forward``; ``None`` computes it.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        curve = (self.compute() if val is None else val)["curve"]
        found = torch.cat([curve.new_zeros(1), curve])
        names = "share of the examples inspected", "share of the wrong labels found"
        return plot_curve((torch.linspace(0, 1, len(found)), found), ax=ax, label_names=names, name=type(self).__name__)  # type: ignore[arg-type]  # two of three
