"""Sets of training examples to remove, given by their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_dtda.attribution.removed import positions_of_examples
from lightning_dtda.errors import AttributionError, RetrainingError

if TYPE_CHECKING:
    from lightning_dtda.attribution import Attribution
    from lightning_dtda.statistics import Difference

Sign = Literal["any", "positive", "negative"]


def random_subsets(examples: int, count: int, fraction_kept: float, seed: int = 0) -> list[tuple[int, ...]]:
    """Draw random sets of examples to remove, all of the same size.

    The linear datamodeling score compares predictions with retrainings without such sets (Park et al., *TRAK*, arXiv
    2303.14186, section 2).

    Args:
        examples: N, the number of training examples.
        count: Number of sets.
        fraction_kept: Fraction of the examples to keep, between 0 and 1.
        seed: Seed of the draws, which do not depend on the global seed. The first sets are the same for any ``count``.

    Returns:
        Sets of ``N - round(fraction_kept * N)`` indices in ascending order.

    Raises:
        RetrainingError: If nothing would be removed, or everything, or ``count`` is less than 1.

    Example:
        >>> random_subsets(10, 2, fraction_kept=0.8)
        [(1, 4), (3, 9)]
    """
    removed = examples - round(fraction_kept * examples)
    if count < 1:
        raise RetrainingError(f"count={count}, the number of subsets, must be at least 1.")
    if not 0 < removed < examples:
        raise RetrainingError(
            f"fraction_kept={fraction_kept} of {examples} examples removes {removed}. Use a fraction between 0 and 1 "
            "that keeps at least one example and removes at least one."
        )
    generator = torch.Generator().manual_seed(seed)
    return [tuple(sorted(torch.randperm(examples, generator=generator)[:removed].tolist())) for _ in range(count)]


def leave_one_out(indices: Iterable[int]) -> list[tuple[int, ...]]:
    """Return one set for each example.

    Example:
        >>> leave_one_out([4, 7])
        [(4,), (7,)]
    """
    return [(int(index),) for index in indices]


def top_removals(
    attribution: Attribution,
    difference: str | Difference = "mean",
    k: int = 10,
    query: int | None = None,
    sign: Sign = "any",
) -> list[tuple[int, ...]]:
    """Return the examples whose removal is predicted to change a query most, to check the prediction by retraining.

    Args:
        attribution: Attribution with the predictions.
        difference: Difference to rank by.
        k: Number of removals in a set; of groups, if the removals are groups.
        query: Position of the query; ``None`` for one set per query.
        sign: Sign of the influences to consider: ``"any"``; ``"positive"``, whose removal raises the property that the
            difference compares; or ``"negative"``, whose removal lowers it.

    Returns:
        One set of training examples for each query, in ascending order.

    Raises:
        RetrainingError: If ``k`` or ``sign`` is invalid, or fewer than ``k`` removals have an influence of that sign.
        AttributionError: If the difference needs more runs.

    Example:
        >>> import warnings; warnings.simplefilter("ignore")
        >>> from lightning_dtda import Attribution
        >>> responses = torch.tensor([[[1.0, 0.0, -3.0]], [[1.0, 0.0, -3.0]]])
        >>> attribution = Attribution(torch.zeros(2, 1), responses, ("seed-0000", "seed-0001"), (0,))
        >>> top_removals(attribution, k=1), top_removals(attribution, k=1, sign="negative")
        ([(2,)], [(2,)])
    """
    if sign not in get_args(Sign):
        raise RetrainingError(f"sign={sign!r}; choose from {', '.join(get_args(Sign))}.")
    influence = attribution.influence(difference)
    queries, removals = influence.shape
    if query is not None and not 0 <= query < queries:
        raise RetrainingError(f"There is no query at position {query}; the positions are 0 to {queries - 1}.")
    if not 1 <= k <= removals:
        raise RetrainingError(f"k={k}, the number of removals in a set, must be between 1 and {removals}.")
    size = {"any": influence.abs(), "positive": influence, "negative": -influence}[sign]
    members = attribution.members
    subsets = []
    for q in range(queries) if query is None else [query]:
        values, order = size[q].topk(k)
        if sign != "any" and not bool(values[-1] > 0):
            raise RetrainingError(
                f"Fewer than k={k} removals have {sign} influence on query {attribution.queries[q]}. Lower k."
            )
        chosen = order.tolist()
        subsets.append(tuple(sorted(chosen if members is None else {n for group in chosen for n in members[group]})))
    return subsets


def check_subsets(subsets: Iterable[Sequence[int]], examples: int) -> tuple[tuple[int, ...], ...]:
    """Return sets of examples as tuples of indices in ascending order.

    Args:
        subsets: Sequences of indices.
        examples: N, the number of training examples.

    Raises:
        RetrainingError: If there are no subsets, or a subset is empty, removes all examples, contains an example twice
            or an index out of range, or is given twice.
    """
    if isinstance(subsets, (str, dict)) or not isinstance(subsets, Iterable):
        raise RetrainingError(f"subsets={subsets!r} must be a list of sets of training examples, like [[3, 17], [4]].")
    checked: list[tuple[int, ...]] = []
    for number, subset in enumerate(subsets):
        try:
            content: Any = sorted(subset) if isinstance(subset, (set, frozenset)) else subset
            indices = tuple(sorted(positions_of_examples(content, examples)))
        except AttributionError as error:
            raise RetrainingError(f"Subset {number}: {error}") from error
        if not indices:
            raise RetrainingError(f"Subset {number} is empty. Leave it out: the baseline is trained on all examples.")
        if len(indices) == examples:
            raise RetrainingError(f"Subset {number} removes all {examples} training examples. Leave some to train on.")
        if indices in checked:
            raise RetrainingError(f"Subsets {checked.index(indices)} and {number} are the same. Leave one out.")
        checked.append(indices)
    if not checked:
        raise RetrainingError("There are no subsets. Pass at least one set of training examples to remove.")
    return tuple(checked)
