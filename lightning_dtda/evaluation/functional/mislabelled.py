"""Detection of wrongly labelled training examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.correlation import ranks

INSPECTED = (0.05, 0.1, 0.2, 0.3)
"""Shares of the training set that a person may be willing to inspect."""


def mislabel_detection(
    suspicion: Tensor, mislabelled: Tensor, inspected: Sequence[float] = INSPECTED
) -> dict[str, Tensor]:
    r"""Measure how well a ranking of the training examples finds those whose labels are wrong.

    The area under the ROC curve is the probability that a wrongly labelled example ranks above a correctly labelled
    one. The inspection curve is the share of all wrong labels found among the most suspicious p of the examples (Koh
    and Liang, *Understanding Black-box Predictions via Influence Functions*, arXiv 1703.04730, section 5.4).

    Args:
        suspicion: Suspicion of each example, higher for labels more likely to be wrong ``(examples,)``. From an
            attribution of the loss, use the *self-influence*, the response of an example's own loss to its removal,
            which is large for memorised examples; or the mean over validation queries of ``-influence("mean")``, which
            is large for examples whose removal lowers the loss.
        mislabelled: Whether each label is wrong ``(examples,)``, bool.
        inspected: Shares p of the examples to inspect, each above 0 and at most 1.

    Returns:
        Tensors by name: ``auroc``; ``found``, the share of wrong labels found for each of ``inspected``; ``curve``, the
        same after each number of examples ``(examples,)``; ``mislabelled``, the number of wrong labels; and
        ``examples``, the number of examples. Where the inspected share cuts through examples of equal suspicion, the
        expected share is returned.

    Raises:
        AttributionError: If the shapes differ, either all or none of the labels are wrong, a suspicion is NaN, or a
            share is out of range.

    Example:
        >>> wrong = torch.tensor([True, False, False, True])
        >>> found = mislabel_detection(torch.tensor([9.0, 1.0, 5.0, 2.0]), wrong, [0.25, 0.75])
        >>> found["auroc"], found["found"]
        (tensor(0.7500, dtype=torch.float64), tensor([0.5000, 1.0000], dtype=torch.float64))
    """
    _check(suspicion, mislabelled, inspected)
    number = len(suspicion)
    # ranks between 0 and 1: torchmetrics takes other values for logits, and the sigmoids of large ones are equal
    auroc = binary_auroc(ranks(suspicion.double()) / (number + 1), mislabelled.long())
    curve = _inspection_curve(suspicion, mislabelled)
    looked_at = torch.tensor([max(1, round(share * number)) for share in inspected], device=curve.device)
    return {
        "auroc": auroc.double(),
        "found": curve[looked_at - 1],
        "curve": curve,
        "mislabelled": mislabelled.sum(),
        "examples": torch.tensor(number, device=curve.device),
    }


def _check(suspicion: Tensor, mislabelled: Tensor, inspected: Sequence[float]) -> None:
    if suspicion.ndim != 1 or suspicion.shape != mislabelled.shape or mislabelled.dtype != torch.bool:
        raise AttributionError(
            f"suspicion {tuple(suspicion.shape)} and mislabelled {tuple(mislabelled.shape)} ({mislabelled.dtype}) must "
            "both have shape (examples,), with a number and a bool for each training example."
        )
    if suspicion.isnan().any():
        raise AttributionError("suspicion contains NaN. Leave out the runs that diverged.")
    if mislabelled.all() or not mislabelled.any():
        raise AttributionError("mislabelled must contain both wrong and correct labels (True and False).")
    if outside := [share for share in inspected if not 0 < share <= 1]:
        raise AttributionError(f"inspected contains {outside[0]}; give shares above 0 and at most 1.")


def _inspection_curve(suspicion: Tensor, mislabelled: Tensor) -> Tensor:
    order = suspicion.argsort(descending=True, stable=True)
    _, group, sizes = suspicion[order].unique_consecutive(return_inverse=True, return_counts=True)
    wrong = mislabelled[order].double()
    # wrong labels within a tie are spread over it evenly: the expectation over orders of the tie
    in_group = torch.zeros(len(sizes), dtype=torch.float64, device=wrong.device).index_add(0, group, wrong)
    return (in_group / sizes)[group].cumsum(0) / wrong.sum()
