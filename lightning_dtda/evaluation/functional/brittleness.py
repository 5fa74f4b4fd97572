"""Brittleness: the number of removals that flips a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

Retraining = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class Brittleness:
    """Number of removals that flips each query's prediction.

    Args:
        sizes: Numbers of removals tried, ascending.
        removals: Smallest of them that flips each query's prediction ``(queries,)``, float64; 0 where the measurement
            was below the threshold from the start, infinite where no number flips it.
        measurements: Mean over seeds after each number of removals ``(1 + sizes, queries)``, starting with no removals;
            NaN where a query had already flipped.
        flipped: Share of the queries flipped by at most each number of removals ``(sizes,)``, among those not below the
            threshold from the start; NaN if there are none.
    """

    sizes: tuple[int, ...]
    removals: Tensor
    measurements: Tensor
    flipped: Tensor


def brittleness(
    influence: Tensor, retrain: Retraining, sizes: Sequence[int] = (1, 2, 5, 10, 20, 50, 100), threshold: float = 0.0
) -> Brittleness:
    r"""Remove the examples that support a prediction most, in growing numbers, until retrained models change it.

    A prediction flips when the mean of the measurement over seeds falls below the threshold. With the margin, the
    log-odds of the correct class, and a threshold of 0, this means that models favour another class on average. The
    fewer removals an attribution needs, the better it identifies what a prediction depends on (Ilyas et al.,
    *Datamodels*, arXiv 2202.00622, section 4.1; Singla et al., arXiv 2303.12233). Compare with a random ``influence``.

    Args:
        influence: Change of the measurement on each query without each example ``(queries, examples)``, for example
            ``influence("mean")`` of the margin. Examples with the most negative values, which support the prediction
            most, are removed first.
        retrain: Function from the indices of removed examples to measurements of models trained without them
            ``(seeds, queries)``. It is called once without removals for all queries, and then for each query and size
            until that query flips.
        sizes: Numbers of removals to try, in ascending order.
        threshold: Value below which the mean measurement counts as flipped.

    Returns:
        Smallest size that flips each query, and the share of flipped queries by size.

    Raises:
        AttributionError: If the sizes are not ascending or out of range, or measurements have the wrong shape or are
            not finite.

    Example:
        >>> change = torch.tensor([-0.5, -0.1, -0.9, -0.1])
        >>> result = brittleness(change[None], lambda removed: 1 + change[list(removed)].sum().reshape(1, 1), [1, 2, 3])
        >>> result.removals, result.flipped
        (tensor([2.], dtype=torch.float64), tensor([0., 1., 1.], dtype=torch.float64))
    """
    queries, examples = influence.shape
    wanted = tuple(sizes)
    if not wanted or list(wanted) != sorted(set(wanted)) or not 1 <= wanted[0] <= wanted[-1] <= examples:
        raise AttributionError(
            f"sizes={list(sizes)}; give numbers of removals in ascending order, from 1 to {examples}, the number of "
            "examples."
        )
    order = influence.argsort(dim=1, stable=True)
    measurements = torch.full((1 + len(wanted), queries), torch.nan, dtype=torch.float64)
    measurements[0] = _mean_over_seeds(retrain, (), queries)
    removals = torch.full((queries,), torch.inf, dtype=torch.float64)
    removals[measurements[0] < threshold] = 0
    for query in (removals == torch.inf).nonzero()[:, 0].tolist():
        for position, size in enumerate(wanted, start=1):
            after = _mean_over_seeds(retrain, tuple(order[query, :size].tolist()), queries)[query]
            measurements[position, query] = after
            if after < threshold:
                removals[query] = size
                break
    able = removals[removals > 0]
    flipped = torch.stack([(able <= size).double().mean() for size in wanted])
    return Brittleness(wanted, removals, measurements, flipped)


def _mean_over_seeds(retrain: Retraining, removed: tuple[int, ...], queries: int) -> Tensor:
    measurements = retrain(removed)
    if measurements.ndim != 2 or measurements.shape[1] != queries or not len(measurements):
        raise AttributionError(
            f"retrain returned measurements of shape {tuple(measurements.shape)}, but the influence has {queries} "
            f"queries. Return the shape (seeds, {queries})."
        )
    mean = measurements.double().mean(0).cpu()
    if not mean.isfinite().all():
        raise AttributionError(
            f"Measurements of the models retrained without {len(removed)} examples are not finite. Leave out the seeds "
            "that diverged."
        )
    return mean
