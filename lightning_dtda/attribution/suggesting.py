"""``suggest_removals``: sets of removals with the largest predicted joint effect towards a goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.inference import Runs, check_share
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.moments import variance
from lightning_dtda.statistics.student import student_interval

if TYPE_CHECKING:
    import pandas as pd

GoalName = Literal["reduce_variance", "improve_mean", "increase_information"]

_AT_ONCE = 2**20
"""Number of samples of candidates that are compared at once: 8 MiB in double precision."""


@dataclass(frozen=True)
class Goal:
    """A quantity of the measurement's distribution to lower or to raise.

    Args:
        quantity: Description of the quantity; ``{}`` stands for the measurement's name.
        contributions: Function from samples ``(runs, queries, ...)`` to the contribution of each run ``(runs, ...)``.
            The mean of these over runs is the quantity, averaged over queries; their spread gives its uncertainty.
    """

    quantity: str
    contributions: Callable[[Tensor], Tensor]


def _of_mean(samples: Tensor) -> Tensor:
    return samples.mean(1)


def _of_variance(samples: Tensor) -> Tensor:
    return _squares(samples).mean(1)


def _of_entropy(samples: Tensor) -> Tensor:
    """Half of log Var, plus its derivative along each run's deviation from the variance, which has mean zero."""
    squares = _squares(samples)
    variance = squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return ((variance.log() + squares / variance - 1) / 2).mean(1)


def _squares(samples: Tensor) -> Tensor:
    runs = len(samples)
    return (samples - samples.mean(0)).square() * runs / (runs - 1)


GOALS = {
    "reduce_variance": Goal("variance of the {} over seeds", _of_variance),
    "improve_mean": Goal("mean {} over seeds", _of_mean),
    "increase_information": Goal("entropy of the {} over seeds (nats)", _of_entropy),
}


@dataclass(frozen=True, eq=False)
class Suggestion:
    """Removals that together serve a goal, in the order in which they were chosen.

    Effects are given for the first removal, for the first two, and so on. They are predicted for runs that were not
    used to choose the removals, so the choice does not bias them.

    Args:
        goal: Name of the goal.
        quantity: Description of the quantity to change, an average over the queries.
        removals: Indices of the examples, or names of the groups.
        sets: Indices of all training examples removed after each step.
        before: Quantity as trained.
        effects: Change of the quantity after each step ``(steps,)``.
        standard_errors: Standard errors of the effects, over runs ``(steps,)``.
        intervals: Lower and upper ends of the effects' intervals ``(2, steps)``, by Student's t.
        level: Confidence level of each interval.
        chosen_on: Names of the runs used to choose the removals.
        evaluated_on: Names of the runs used to estimate the effects.
        queries: Positions of the queries.
    """

    goal: GoalName
    quantity: str
    removals: tuple[int | str, ...]
    sets: tuple[tuple[int, ...], ...]
    before: float
    effects: Tensor
    standard_errors: Tensor
    intervals: Tensor
    level: float
    chosen_on: tuple[str, ...]
    evaluated_on: tuple[str, ...]
    queries: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of all suggested training examples, to retrain without."""
        return self.sets[-1] if self.sets else ()

    @property
    def held_out(self) -> bool:
        """Whether the effects are estimated from runs that were not used to choose the removals."""
        return not set(self.chosen_on) & set(self.evaluated_on)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each step: ``removal``, number of ``examples`` removed so far, ``effect``, uncertainty."""
        import pandas as pd

        return pd.DataFrame(
            {
                "removal": list(self.removals),
                "examples": [len(each) for each in self.sets],
                "effect": self.effects.tolist(),
                "standard_error": self.standard_errors.tolist(),
                "lower": self.intervals[0].tolist(),
                "upper": self.intervals[1].tolist(),
            }
        )


def suggest_removals(
    attribution: Attribution,
    goal: GoalName = "reduce_variance",
    k: int = 10,
    queries: Sequence[int] | None = None,
    *,
    lower_is_better: bool = True,
    held_out: float = 0.5,
    caution: float = 1.0,
    level: float = 0.95,
    runs: Runs = "trusted",
) -> Suggestion:
    r"""Suggest examples to remove together for a goal.

    With the predicted measurement without a set, :math:`y_{sq} = x_{sq} + \sum_{k} r_{sqk}` for seed s and query q, the
    goals are to lower

    - ``"reduce_variance"``: :math:`\frac1Q \sum_q \mathrm{Var}_s\, y_{sq}`;
    - ``"improve_mean"``: :math:`\frac1Q \sum_q E_s\, y_{sq}`, or to raise it;
    - ``"increase_information"``: the entropy :math:`\frac1Q \sum_q \tfrac12 \log \mathrm{Var}_s\, y_{sq}`, assuming
      Gaussians, up to a constant. Its decrease is the information gained, in the sense of Lindley (*Annals of
      Mathematical Statistics* 27, 1956), about the result of training on the data. Every query counts by the relative
      decrease of its spread, whatever its unit; with the variance, queries that vary most count most.

    Removals are added one by one; each time it is the one that lowers the quantity most, given the set so far. This
    accounts for interactions: two removals that each cancel the same part of the seed noise overshoot together. The
    gain of a candidate is reduced by ``caution`` standard errors. The set is complete when no candidate gains.

    The largest of many noisy gains are overestimates. So the removals are chosen with one part of the runs, and their
    effects estimated with the others.

    Args:
        attribution: Attribution with baseline and responses.
        goal: What to improve.
        k: Maximum number of removals.
        queries: Positions of the queries; ``None`` means all.
        lower_is_better: Whether a lower measurement is better, for ``"improve_mean"``: true for losses, false for
            margins.
        held_out: Share of the runs used to estimate the effects. With 0, all runs are used for both, and the effects
            are overestimated.
        caution: Number of standard errors by which each gain is reduced.
        level: Confidence level of the intervals.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        The removals, with the sets to retrain without.

    Raises:
        AttributionError: If there are too few runs, a goal or query does not exist, or a setting is invalid.

    Example:
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> responses = torch.stack([-0.5 * x, 0.5 * x, 0.0 * x], -1)  # the first example spreads the seeds
        >>> attribution = Attribution(x, responses, tuple(f"seed-{s:04d}" for s in range(8)), (0,))
        >>> suggest_removals(attribution, k=2).removals
        (0,)
    """
    _sensible(goal, k, held_out, level)
    selected = attribution._selected(runs)
    positions = list(range(len(selected.queries))) if queries is None else selected._positions(queries)
    choosing, evaluating = _split(len(selected.runs), held_out)
    contributions = GOALS[goal].contributions
    sign = 1.0 if goal != "improve_mean" or lower_is_better else -1.0
    members = selected.members or tuple((n,) for n in range(selected.responses.shape[2]))
    responses = selected.responses[choosing]  # for all queries, stored responses stay on disk
    chosen = _greedy(
        lambda samples: sign * contributions(samples),
        selected.baseline[choosing][:, positions].double(),
        responses if queries is None else responses[:, positions],
        members,
        k,
        caution,
    )
    samples = selected.baseline[evaluating][:, positions].double()
    before = contributions(samples)
    changes = torch.zeros(len(evaluating), len(chosen), dtype=torch.float64, device=samples.device)
    for step, n in enumerate(chosen):
        samples = samples + selected.responses[:, positions, n][evaluating].double()
        changes[:, step] = contributions(samples) - before
    effects = changes.mean(0)
    names = selected.removals
    return Suggestion(
        goal=goal,
        quantity=GOALS[goal].quantity.format(selected.measurement),
        removals=tuple(n if names is None else names[n] for n in chosen),
        sets=tuple(tuple(e for n in chosen[: step + 1] for e in members[n]) for step in range(len(chosen))),
        before=float(before.mean()),
        effects=effects,
        standard_errors=(variance(changes) / len(changes)).sqrt(),
        intervals=student_interval(changes, level=level),
        level=level,
        chosen_on=tuple(selected.runs[s] for s in choosing),
        evaluated_on=tuple(selected.runs[s] for s in evaluating),
        queries=tuple(positions),
    )


def _sensible(goal: str, k: int, held_out: float, level: float) -> None:
    if goal not in get_args(GoalName):
        raise AttributionError(f"goal={goal!r}; choose from {', '.join(get_args(GoalName))}.")
    if k < 1:
        raise AttributionError(f"k={k}; give the maximum number of removals to suggest, at least 1.")
    if not 0 <= held_out < 1:
        raise AttributionError(f"held_out={held_out}; give a share of the runs, from 0 to less than 1.")
    check_share(level, "level")


def _split(runs: int, held_out: float) -> tuple[list[int], list[int]]:
    """Return the positions of the runs for choosing, and of those for evaluating."""
    order = torch.randperm(runs, generator=torch.Generator().manual_seed(0)).tolist()
    few = round(held_out * runs)
    choosing, evaluating = (sorted(order[few:]), sorted(order[:few])) if held_out else (sorted(order), sorted(order))
    if min(len(choosing), len(evaluating)) < 2:
        raise AttributionError(
            f"held_out={held_out} splits {runs} runs into {len(choosing)} to choose removals and {len(evaluating)} to "
            "evaluate them; each part needs at least 2. Record more seeds, or give another held_out."
        )
    return choosing, evaluating


def _greedy(
    score: Callable[[Tensor], Tensor],
    samples: Tensor,
    responses: Tensor,
    members: Sequence[Sequence[int]],
    k: int,
    caution: float,
) -> list[int]:
    """Return positions of removals that lower the mean of a score over runs.

    Args:
        score: Function from samples ``(runs, queries, ...)`` to contributions ``(runs, ...)``.
        samples: Samples as trained ``(runs, queries)``.
        responses: Responses ``(runs, queries, removals)``.
        members: Indices of the examples of each removal; removals that share one cannot be made together.
        k: Maximum number of removals.
        caution: Number of standard errors added to each change.
    """
    chosen: list[int] = []
    open_ = torch.ones(responses.shape[2], dtype=torch.bool, device=responses.device)
    size = max(1, _AT_ONCE // samples.numel())
    changes = torch.empty(responses.shape[2], dtype=torch.float64, device=responses.device)
    while len(chosen) < k:
        present = samples[..., None]
        before = score(present)
        for start in range(0, len(changes), size):
            change = score(present + responses[..., start : start + size].double()) - before
            changes[start : start + size] = change.mean(0) + caution * change.std(0) / len(change) ** 0.5
        best = int(torch.where(open_, changes, torch.inf).argmin())
        if not open_[best] or changes[best] >= 0:
            break
        chosen.append(best)
        samples = samples + responses[..., best].double()
        taken = set(members[best])
        open_ &= torch.tensor([taken.isdisjoint(other) for other in members], device=open_.device)
    return chosen
