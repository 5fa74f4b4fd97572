"""Which training examples are removed: sets of their indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_dtda.attribution.removed import positions_of_examples
from lightning_dtda.errors import AttributionError, RetrainingError

if TYPE_CHECKING:
    from lightning_dtda.attribution import Attribution, Difference

Sign = Literal["any", "positive", "negative"]


def random_subsets(examples: int, count: int, fraction_kept: float, seed: int = 0) -> list[tuple[int, ...]]:
    """Draw random sets of examples to remove, all of one size.

    The linear datamodeling score compares predictions with retrainings on such (Park et al., *TRAK*, arXiv 2303.14186,
    section 2).

    Args:
        examples: N, the number of training examples.
        count: Number of sets.
        fraction_kept: The share of the examples that is left, between 0 and 1.
        seed: Of the draws, which depend on nothing else. The first sets are the same for any ``count``.

    Returns:
        Sets of ``N - round(fraction_kept * N)`` indices, ascending.

    Raises:
        RetrainingError: If nothing would be removed, or everything, or ``count`` is less than 1.

    Example:
        >>> random_subsets(10, 2, fraction_kept=0.8)
        [(1, 4), (3, 9)]
    """
    removed = examples - round(fraction_kept * examples)
    if count < 1:
        raise RetrainingError(f"count={count}; give the number of subsets, at least 1.")
    if not 0 < removed < examples:
        raise RetrainingError(
            f"fraction_kept={fraction_kept} of {examples} examples removes {removed}. Give a fraction between 0 and 1 "
            "that leaves some and takes some."
        )
    generator = torch.Generator().manual_seed(seed)
    return [tuple(sorted(torch.randperm(examples, generator=generator)[:removed].tolist())) for _ in range(count)]


def leave_one_out(indices: Iterable[int]) -> list[tuple[int, ...]]:
    """Return each of some examples as a set of its own.

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
    """Return the examples whose removal is predicted to change a query most, to see whether it does.

    Args:
        attribution: What predicts it.
        difference: What to rank by.
        k: Number of removals in a set; with groups, of groups.
        query: Position of the query; ``None`` gives a set for each.
        sign: Whether the influence may be of ``"any"`` sign, or only ``"positive"`` or ``"negative"``.

    Returns:
        A set of training examples for each query, ascending.

    Raises:
        RetrainingError: If ``k`` or ``sign`` is none, or fewer than ``k`` removals have an influence of that sign.
        AttributionError: If the difference needs more runs.

    Example:
        >>> import warnings; warnings.simplefilter("ignore")
        >>> from lightning_dtda import Attribution
        >>> responses = torch.tensor([[[1.0, 0.0, -3.0]], [[1.0, 0.0, -3.0]]])
        >>> attribution = Attribution(torch.zeros(2, 1), responses, ("seed-0000", "seed-0001"), (0,))
        >>> top_removals(attribution, k=1), top_removals(attribution, k=1, sign="negative")
        ([(2,)], [(0,)])
    """
    if sign not in get_args(Sign):
        raise RetrainingError(f"sign={sign!r}; choose from {', '.join(get_args(Sign))}.")
    influence = attribution.influence(difference)
    queries, removals = influence.shape
    if query is not None and not 0 <= query < queries:
        raise RetrainingError(f"There is no query at position {query}; they are 0 to {queries - 1}.")
    if not 1 <= k <= removals:
        raise RetrainingError(f"k={k}; give the number of removals in a set, 1 to {removals}.")
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
    """Return sets of examples as ascending tuples of indices.

    Args:
        subsets: Sequences of indices.
        examples: N.

    Raises:
        RetrainingError: If there is none, one is empty, removes everything, has an example twice or one that there is
            not, or is given twice.
    """
    if isinstance(subsets, (str, dict)) or not isinstance(subsets, Iterable):
        raise RetrainingError(f"subsets={subsets!r}. Give a list of sets of training examples: [[3, 17], [4]].")
    checked: list[tuple[int, ...]] = []
    for number, subset in enumerate(subsets):
        try:
            content: Any = sorted(subset) if isinstance(subset, (set, frozenset)) else subset
            indices = tuple(sorted(positions_of_examples(content, examples)))
        except AttributionError as error:
            raise RetrainingError(f"Subset {number}: {error}") from error
        if not indices:
            raise RetrainingError(f"Subset {number} is empty. Trainings on everything are the baseline's.")
        if len(indices) == examples:
            raise RetrainingError(f"Subset {number} removes all {examples} training examples. Leave some to train on.")
        if indices in checked:
            raise RetrainingError(f"Subsets {checked.index(indices)} and {number} are the same. Leave one out.")
        checked.append(indices)
    if not checked:
        raise RetrainingError("There are no subsets. Give at least one set of training examples to remove.")
    return tuple(checked)
