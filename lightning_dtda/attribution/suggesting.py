"""Which examples to leave out: sets of removals whose predicted joint effect does most for a goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.inference import Runs, check_share
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences.variance import variance
from lightning_dtda.statistics.intervals import student_interval

if TYPE_CHECKING:
    import pandas as pd

GoalName = Literal["reduce_variance", "improve_mean", "increase_information"]

_AT_ONCE = 2**20
"""Samples of candidates that are compared at once: 8 MiB in double precision."""


@dataclass(frozen=True)
class Goal:
    """A quantity of the measurement's distribution that is to fall, or to rise.

    Args:
        quantity: What it is, in words; ``{}`` stands for the measurement's name.
        contributions: From samples ``(runs, queries, ...)`` to what each run adds ``(runs, ...)``: their mean over runs
            is the quantity, averaged over queries, and their spread its uncertainty.
    """

    quantity: str
    contributions: Callable[[Tensor], Tensor]


def _of_mean(samples: Tensor) -> Tensor:
    return samples.mean(1)


def _of_variance(samples: Tensor) -> Tensor:
    return _squares(samples).mean(1)


def _of_entropy(samples: Tensor) -> Tensor:
    """Half of log Var and, of mean zero over runs, its derivative along each run's deviation from the variance."""
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
    """Removals that serve a goal together, in the order in which they were chosen.

    The effects are those of the first removal, of the first two, and so on; they are predicted for runs that had no say
    in the choice, so they are not better by chance.

    Args:
        goal: What they are for.
        quantity: What is to change, in words; averaged over the queries.
        removals: Names of the examples, their indices, or of the groups.
        sets: Indices of the training examples that are removed after each step.
        before: The quantity as trained.
        effects: Its change after each step ``(steps,)``.
        standard_errors: Of these, over runs.
        intervals: Lower and upper ends, ``(2, steps)``, by Student's t.
        level: Confidence of each interval.
        chosen_on: Names of the runs that the choice was made with.
        evaluated_on: Names of the runs that the effects are of.
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
        """Indices of all training examples that are suggested: what a retraining leaves out."""
        return self.sets[-1] if self.sets else ()

    @property
    def held_out(self) -> bool:
        """Whether the effects are of runs that had no say in the choice."""
        return not set(self.chosen_on) & set(self.evaluated_on)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each step: ``removal``, ``examples`` removed so far, ``effect`` and its uncertainty."""
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
    r"""Suggest examples whose removal together serves a goal.

    With the measurement predicted without a set, :math:`y_{sq} = x_{sq} + \sum_{k} r_{sqk}` for seed s and query q, the
    goals are to lower

    - ``"reduce_variance"``: :math:`\frac1Q \sum_q \mathrm{Var}_s\, y_{sq}`;
    - ``"improve_mean"``: :math:`\frac1Q \sum_q E_s\, y_{sq}`, or to raise it;
    - ``"increase_information"``: the entropy :math:`\frac1Q \sum_q \tfrac12 \log \mathrm{Var}_s\, y_{sq}`, of Gaussians
      and but for a constant. Its fall is the information gained, in the sense of Lindley (*Annals of Mathematical
      Statistics* 27, 1956), about what a training on the data ends in. Every query counts by the factor by which its
      spread falls, whatever its unit; with the variance, those that vary most count most.

    Removals are added one by one, each time the one that lowers the quantity of the set so far most. This takes account
    of interactions: two removals that each cancel the same part of the seed noise overshoot together. A candidate
    counts by its gain less ``caution`` standard errors, and when none is left that gains, the set is complete.

    The largest of many noisy gains are overestimates. So the choice is made with a part of the runs, and the effects
    are those on the others.

    Args:
        attribution: Baseline and responses.
        goal: What is to become better.
        k: The most removals.
        queries: Positions of the queries; ``None`` is all of them.
        lower_is_better: Of the measurement, for ``"improve_mean"``: true for losses, false for margins.
        held_out: Share of the runs that the effects are taken from; 0 chooses and evaluates on all of them, and the
            effects are then too good.
        caution: Standard errors by which a gain is lowered.
        level: Confidence of the intervals.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        The removals, with the sets to retrain without.

    Raises:
        AttributionError: If there are too few runs, no such goal or query, or a setting has no sense.

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
    responses = selected.responses[choosing]  # of all queries they stay on disk, if they are there
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
        raise AttributionError(f"k={k}; give the most removals to suggest, at least 1.")
    if not 0 <= held_out < 1:
        raise AttributionError(f"held_out={held_out}; give a share of the runs, from 0 to less than 1.")
    check_share(level, "level")


def _split(runs: int, held_out: float) -> tuple[list[int], list[int]]:
    """Return the positions of the runs that choose, and of those that evaluate."""
    order = torch.randperm(runs, generator=torch.Generator().manual_seed(0)).tolist()
    few = round(held_out * runs)
    choosing, evaluating = (sorted(order[few:]), sorted(order[:few])) if held_out else (sorted(order), sorted(order))
    if min(len(choosing), len(evaluating)) < 2:
        raise AttributionError(
            f"Of {runs} runs, {len(choosing)} choose and {len(evaluating)} evaluate; both need 2. Record more seeds, "
            "or give another held_out."
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
        score: From samples ``(runs, queries, ...)`` to contributions ``(runs, ...)``.
        samples: As trained ``(runs, queries)``.
        responses: ``(runs, queries, removals)``.
        members: Indices of the examples of each removal; two with a common one cannot be made together.
        k: The most removals.
        caution: Standard errors that are added to each change.
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
