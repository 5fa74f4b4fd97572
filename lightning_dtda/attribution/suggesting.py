"""``suggest_removals``: sets of removals with the largest predicted joint effect towards a goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.attribution.inference import Runs, check_share
from lightning_dtda.attribution.sources import refuse_crossed
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.simultaneous import simultaneous_intervals

if TYPE_CHECKING:
    import pandas as pd

GoalName = Literal["reduce_variance", "improve_mean", "increase_information"]

_MOST = 10
"""Number of removals that are tried by default."""

_AT_ONCE = 2**20
"""Number of samples of candidates that are compared at once: 8 MiB in double precision."""


@dataclass(frozen=True)
class Goal:
    """A quantity of the measurement's distribution to lower or to raise.

    Args:
        quantity: Description of the quantity; ``{}`` stands for the measurement's name.
        contributions: Function from samples ``(runs, queries, ...)`` to the contribution of each run ``(runs, ...)``.
            The choice lowers the mean of these over runs.
        spread: Whether that mean is a variance, so that effects are relative changes of its root.
    """

    quantity: str
    contributions: Callable[[Tensor], Tensor]
    spread: bool = False

    def value(self, samples: Tensor) -> Tensor:
        """Return the quantity ``(...)``, for a spread its logarithm, of samples ``(runs, queries, ...)``."""
        mean = self.contributions(samples).mean(0)
        # no spread at all is as little as a number can be
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log() / 2 if self.spread else mean

    def of_runs(self, samples: Tensor) -> Tensor:
        r"""Return what each run adds to :meth:`value` ``(runs, ...)``, by leaving it out; their mean is the value.

        .. math:: v + u_s - \bar u, \qquad u_s = (S - 1) (v - v_{(s)}),

        the jackknife's (Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 11). For a spread
        :math:`v = \log \sigma` it is :math:`u_s = \frac{S - 1}{2} (\sigma^2 / \sigma_{(s)}^2 - 1)`, so that
        the interval also holds if few runs make most of the spread (the estimator HC3 of MacKinnon and White, *Journal
        of Econometrics* 29, 1985, divides by what is left in the same way).
        """
        runs, value = len(samples), self.value(samples)
        others = [self.value(torch.cat([samples[:s], samples[s + 1 :]])) for s in range(runs)]
        added = (runs - 1) * (value - torch.stack(others))
        if self.spread:
            added = torch.expm1(2 * added / (runs - 1)) * ((runs - 1) / 2)
        return value + added - added.mean(0)

    def shown(self, change: Tensor) -> Tensor:
        """Return a change of :meth:`value` as it is shown: for a spread, relative to what it was."""
        return change.expm1() if self.spread else change


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
    "reduce_variance": Goal("standard deviation of the {} over seeds", _of_variance, spread=True),
    "improve_mean": Goal("mean {} over seeds", _of_mean),
    "increase_information": Goal("entropy of the {} over seeds (nats)", _of_entropy),
}


@dataclass(frozen=True, eq=False)
class Suggestion:
    """Removals that were chosen one by one for a goal, and how many of them to make, if any.

    The effects of the first removal, of the first two, and so on are predicted for runs that were not used to choose
    the removals. Their intervals hold together, for all numbers of removals at once, so they stay honest for the number
    that looks best.

    Args:
        goal: Name of the goal.
        quantity: Description of the quantity to change, over all queries.
        removals: Indices of the examples, or names of the groups, in the order in which they were chosen.
        sets: Indices of all training examples removed after each step.
        before: Quantity as trained.
        effects: Change of the quantity after each step ``(steps,)``; for a standard deviation, relative to ``before``.
        intervals: Lower and upper ends of the effects' intervals ``(2, steps)``.
        level: Confidence level of all intervals together.
        chosen_on: Names of the runs used to choose the removals.
        evaluated_on: Names of the runs used to estimate the effects.
        queries: Positions of the queries.
        lowers: Whether the goal is to lower the quantity; otherwise to raise it.
    """

    goal: GoalName
    quantity: str
    removals: tuple[int | str, ...]
    sets: tuple[tuple[int, ...], ...]
    before: float
    effects: Tensor
    intervals: Tensor
    level: float
    chosen_on: tuple[str, ...]
    evaluated_on: tuple[str, ...]
    queries: tuple[int, ...]
    lowers: bool = True

    @property
    def best(self) -> int:
        """Number of removals to make: that with the best worse end of its interval; 0 if none helps there."""
        return self._promising if self.removals and float(self._worst[self._promising - 1]) < 0 else 0

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the training examples to leave out, those of the :attr:`best` removals; empty if none helps."""
        return self.sets[self.best - 1] if self.best else ()

    @property
    def held_out(self) -> bool:
        """Whether the effects are estimated from runs that were not used to choose the removals."""
        return not set(self.chosen_on) & set(self.evaluated_on)

    @property
    def verdict(self) -> str:
        """What to do, in a sentence, with the predicted effect and its interval."""
        if not self.removals:
            return (
                f"No removal is shown to help: none is predicted to improve the {self.quantity} by more than its "
                "uncertainty over the runs that choose."
            )
        where = f"{len(self.evaluated_on)} {'held-out runs' if self.held_out else 'runs that also chose'}"
        effect = f"{self.quantity} {self.effect(self._promising)} on {where}."
        if not self.best:
            return f"No removal is shown to help: at best, {effect}"
        if not self.held_out:
            return f"No verdict without held-out runs: with the first {self.best}, {effect}"
        ones = ", ".join(map(str, self.removals[: self.best]))
        listed = f" ({ones})" if self.best <= _MOST else ""
        return f"Remove {'this one' if self.best == 1 else f'these {self.best}'}{listed}: {effect}"

    def effect(self, step: int) -> str:
        """Return the effect of the first removals with its interval, as text."""
        return effect_text(self.goal, float(self.effects[step - 1]), *self.intervals[:, step - 1].tolist())

    @property
    def _worst(self) -> Tensor:
        """The less favourable ends of the intervals ``(steps,)``, signed so that less is better."""
        worst = self.intervals[1] if self.lowers else -self.intervals[0]
        return worst.nan_to_num(torch.inf, torch.inf, -torch.inf)  # unknown if a single run makes all of the spread

    @property
    def _promising(self) -> int:
        return int(self._worst.argmin()) + 1

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each step: ``removal``, number of ``examples`` removed so far, ``effect``, interval."""
        import pandas as pd

        return pd.DataFrame(
            {
                "removal": list(self.removals),
                "examples": [len(each) for each in self.sets],
                "effect": self.effects.tolist(),
                "lower": self.intervals[0].tolist(),
                "upper": self.intervals[1].tolist(),
                "best": [step == self.best for step in range(1, len(self.removals) + 1)],
            }
        )


def effect_text(goal: GoalName, effect: float, low: float, high: float) -> str:
    """Return an effect with the ends of its interval as text: in percent for a standard deviation.

    Example:
        >>> effect_text("reduce_variance", -0.163, -0.27, 0.01)
        '−16 % [−27, +1]'
    """
    texts = [f"{100 * value:+.0f}" if GOALS[goal].spread else f"{value:+.3g}" for value in (effect, low, high)]
    text = f"{texts[0]}{' %' if GOALS[goal].spread else ''} [{texts[1]}, {texts[2]}]"
    return text.replace("-", "\N{MINUS SIGN}")


def suggest_removals(
    attribution: Attribution,
    goal: GoalName = "reduce_variance",
    k: int | None = None,
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
    effects estimated with the others: by Student's t of what each run adds (:meth:`Goal.of_runs`), for all numbers of
    removals together (:func:`~lightning_dtda.statistics.simultaneous.simultaneous_intervals`).

    Args:
        attribution: Attribution with baseline and responses.
        goal: What to improve.
        k: Maximum number of removals; ``None`` means 10, or all if there are fewer.
        queries: Positions of the queries; ``None`` means all.
        lower_is_better: Whether a lower measurement is better, for ``"improve_mean"``: true for losses, false for
            margins.
        held_out: Share of the runs used to estimate the effects. With 0, all runs are used for both, and the effects
            are overestimated.
        caution: Number of standard errors by which each gain is reduced.
        level: Confidence level of the intervals, together.
        runs: As for :meth:`Attribution.influence`.

    Returns:
        The removals in order, how many of them to make, and a verdict.

    Raises:
        AttributionError: If there are too few runs or removals, a goal or query does not exist, a setting is invalid,
            or the attribution has values that are not finite.

    Example:
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> responses = torch.stack([-0.5 * x, 0.5 * x, 0.0 * x], -1)  # the first example spreads the seeds
        >>> attribution = Attribution(x, responses, tuple(f"seed-{s:04d}" for s in range(8)), (0,))
        >>> print(suggest_removals(attribution, k=2).verdict)
        Remove this one (0): standard deviation of the measurement over seeds −50 % [−50, −50] on 4 held-out runs.
    """
    selected = attribution._selected(runs)
    refuse_crossed(selected, "a suggestion checked on held-out runs")
    removals = selected.responses.shape[2]
    k = min(_MOST, removals) if k is None else k
    _sensible(goal, k, held_out, level)
    if k > removals:
        raise AttributionError(f"k={k}, but there are {removals} removals. Give a k of at most {removals}.")
    positions = list(range(len(selected.queries))) if queries is None else selected._positions(queries)
    choosing, evaluating = _split(len(selected.runs), held_out)
    lowers = goal != "improve_mean" or lower_is_better
    sought, sign = GOALS[goal], 1.0 if lowers else -1.0
    members = selected.members or tuple((n,) for n in range(removals))
    chosen = _greedy(
        lambda samples: sign * sought.contributions(samples), selected._of(choosing), positions, members, k, caution
    )
    held = selected._of(evaluating)
    samples = held.baseline[:, positions].double()
    total = torch.zeros_like(samples)
    _check_finite(samples, held, "baseline")
    before = sought.of_runs(samples)
    changes = torch.zeros(len(evaluating), len(chosen), dtype=torch.float64, device=samples.device)
    for step, n in enumerate(chosen):
        total = total + held.responses[:, positions, n].double()
        _check_finite(total, held, "response")
        changes[:, step] = sought.of_runs(held._predicted(samples, total)) - before
    names = selected.removals
    return Suggestion(
        goal=goal,
        quantity=sought.quantity.format(selected.measurement),
        removals=tuple(n if names is None else names[n] for n in chosen),
        sets=tuple(tuple(e for n in chosen[: step + 1] for e in members[n]) for step in range(len(chosen))),
        before=float(before.mean().exp() if sought.spread else before.mean()),
        effects=sought.shown(changes.mean(0)),
        intervals=sought.shown(simultaneous_intervals(changes, level)),
        level=level,
        chosen_on=tuple(selected.runs[s] for s in choosing),
        evaluated_on=held.runs,
        queries=tuple(positions),
        lowers=lowers,
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
    if min(len(choosing), len(evaluating)) < 3:
        raise AttributionError(
            f"held_out={held_out} splits {runs} runs into {len(choosing)} to choose removals and {len(evaluating)} to "
            "evaluate them; each part needs at least 3. Record more seeds, or give another held_out."
        )
    return choosing, evaluating


def _greedy(
    score: Callable[[Tensor], Tensor],
    attribution: Attribution,
    queries: Sequence[int],
    members: Sequence[Sequence[int]],
    k: int,
    caution: float,
) -> list[int]:
    """Return positions of removals that lower the mean of a score over runs.

    Args:
        score: Function from samples ``(runs, queries, ...)`` to contributions ``(runs, ...)``.
        attribution: Attribution of the runs that choose.
        queries: Positions of the queries.
        members: Indices of the examples of each removal; removals that share one cannot be made together.
        k: Maximum number of removals.
        caution: Number of standard errors added to each change.
    """
    baseline = attribution.baseline[:, queries].double()
    _check_finite(baseline, attribution, "baseline")
    # for all queries, stored responses stay on disk
    everything = len(queries) == len(attribution.queries)
    responses = attribution.responses if everything else attribution.responses[:, queries]
    total = torch.zeros_like(baseline)
    chosen: list[int] = []
    open_ = torch.ones(responses.shape[2], dtype=torch.bool, device=responses.device)
    size = max(1, _AT_ONCE // baseline.numel())
    changes = torch.empty(responses.shape[2], dtype=torch.float64, device=responses.device)
    while len(chosen) < k:
        before = score(attribution._predicted(baseline, total)[..., None])
        for start in range(0, len(changes), size):
            part = responses[..., start : start + size].double()
            _check_finite(part, attribution, "response")
            change = score(attribution._predicted(baseline[..., None], total[..., None] + part)) - before
            changes[start : start + size] = change.mean(0) + caution * change.std(0) / len(change) ** 0.5
        best = int(torch.where(open_, changes, torch.inf).argmin())
        if not open_[best] or changes[best] >= 0:
            break
        chosen.append(best)
        total = total + responses[..., best].double()
        taken = set(members[best])
        open_ &= torch.tensor([taken.isdisjoint(other) for other in members], device=open_.device)
    return chosen


def _check_finite(values: Tensor, attribution: Attribution, what: str) -> None:
    """Check values ``(runs, ...)``: with one that is not a number, every removal would look as good as any."""
    bad = (~values.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
    if bad:
        run = attribution.runs[bad[0]]
        raise AttributionError(
            f"A {what} of {run} is not finite: the training diverged. Leave the run out: "
            f"attribution.without_runs([{run!r}])."
        )
