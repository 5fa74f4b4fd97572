"""How few removals flip a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError

Retraining = Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class Brittleness:
    """What it took to flip each query's prediction.

    Args:
        sizes: The numbers of removals that were tried, ascending.
        removals: The smallest of them that flips each query's prediction ``(queries,)``, float64; 0 where it was
            beyond the threshold from the start, infinite where none did.
        measured: Mean measurement over seeds after each number of removals ``(1 + sizes, queries)``, the first with
            none; NaN where a query had flipped before.
        flipped: Share of the queries that have flipped with at most that many removals ``(sizes,)``, of those that
            had not from the start; NaN if all had.
    """

    sizes: tuple[int, ...]
    removals: Tensor
    measured: Tensor
    flipped: Tensor


def brittleness(
    influence: Tensor, retrain: Retraining, sizes: Sequence[int] = (1, 2, 5, 10, 20, 50, 100), threshold: float = 0.0
) -> Brittleness:
    r"""Remove the examples that hold a prediction up most, more and more of them, until retrained models change it.

    A prediction flips when the mean over seeds of the measurement falls below the threshold: with the margin, the
    log-odds of the right class, and 0, when models are on average for another class. The fewer removals an
    attribution needs, the better it knows what a prediction rests on (Ilyas et al., *Datamodels*, arXiv 2202.00622,
    section 4.1; Singla et al., arXiv 2303.12233). Compare with a random ``influence``.

    Args:
        influence: Of each example on each query ``(queries, examples)``, the change of the measurement without it:
            ``influence("mean")`` of the margin. The most negative are removed first, which hold the prediction up.
        retrain: From the indices of removed examples, none at first, to measurements of models trained without them
            ``(seeds, queries)``. It is called once for all queries with none, and then for each query and size until
            that query flips.
        sizes: Numbers of removals that are tried, in ascending order.
        threshold: What the measurement falls below.

    Returns:
        Per query the smallest size that flips it, and the share of flipped queries by size.

    Raises:
        AttributionError: If the sizes are not ascending and at most the number of examples, or measurements do not fit.

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
            f"sizes={list(sizes)}; give ascending numbers of removals from 1 to {examples}, the number of examples."
        )
    order = influence.argsort(dim=1, stable=True)
    measured = torch.full((1 + len(wanted), queries), torch.nan, dtype=torch.float64)
    measured[0] = _mean_over_seeds(retrain, (), queries)
    removals = torch.full((queries,), torch.inf, dtype=torch.float64)
    removals[measured[0] < threshold] = 0
    for query in (removals == torch.inf).nonzero()[:, 0].tolist():
        for position, size in enumerate(wanted, start=1):
            after = _mean_over_seeds(retrain, tuple(order[query, :size].tolist()), queries)[query]
            measured[position, query] = after
            if after < threshold:
                removals[query] = size
                break
    able = removals[removals > 0]
    flipped = torch.stack([(able <= size).double().mean() for size in wanted])
    return Brittleness(wanted, removals, measured, flipped)


def _mean_over_seeds(retrain: Retraining, removed: tuple[int, ...], queries: int) -> Tensor:
    measurements = retrain(removed)
    if measurements.ndim != 2 or measurements.shape[1] != queries or not len(measurements):
        raise AttributionError(
            f"retrain returned measurements of shape {tuple(measurements.shape)}; the influence has {queries} queries. "
            "Return (seeds, queries)."
        )
    mean = measurements.double().mean(0).cpu()
    if not mean.isfinite().all():
        raise AttributionError(
            f"Models retrained without {len(removed)} examples have measurements that are not finite. Leave out the "
            "seeds that diverged."
        )
    return mean
