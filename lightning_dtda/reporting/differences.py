"""What differences between distributions mean, in words: question, sign and unit."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dtda.reporting.formatting import MINUS
from lightning_dtda.statistics.differences import (
    Difference,
    Energy,
    GaussianKL,
    JointDifference,
    Mean,
    Quantile,
    SlicedWasserstein,
    Tail,
    Variance,
    Wasserstein,
    resolve_difference,
)


@dataclass(frozen=True)
class Wording:
    """How a difference is introduced.

    Args:
        title: Its name.
        question: What it answers.
        formula: Its definition; X is the measurement as trained, Y with the example removed.
        meaning: The influence and its sign in words.
        short: The same for an axis.
        unit: What the influence is measured in.
    """

    title: str
    question: str
    formula: str
    meaning: str
    short: str
    unit: str


def describe(difference: str | Difference | JointDifference, measurement: str, removed: str = "example") -> Wording:
    """Return how a difference of a measurement's distributions is put into words.

    Args:
        difference: As for :meth:`Attribution.influence <lightning_dtda.Attribution.influence>`, or a joint one. Those
            that are not built in are introduced by their name.
        measurement: Its name.
        removed: What a removal takes away, an ``"example"`` or a ``"group"``.

    Example:
        >>> describe("tail", "loss").meaning
        'change of the mean loss over the highest 10 % of the runs on this query if the example is removed'
    """
    chosen = SlicedWasserstein() if difference == SlicedWasserstein.name else resolve_difference(difference)
    m, gone = measurement, f"on this query if the {removed} is removed"
    match chosen:
        case Mean():
            return _mean(chosen, m, removed, gone)
        case Variance():
            return Wording(
                "Variance influence",
                f"Which {removed}s make the {m} more or less dependent on the seed?",
                f"Var Y {MINUS} Var X",
                f"change of the {m}'s variance over runs {gone}",
                f"variance change of the {m} when removed",
                f"the square of the {m}'s unit",
            )
        case Wasserstein():
            return Wording(
                "Wasserstein influence",
                f"Which {removed}s change the {m}'s distribution in any way?",
                "W₂(X, Y)",
                f"distance by which the {m}'s distribution moves {gone}",
                f"how far the {m} moves when removed",
                f"the {m}'s unit",
            )
        case Energy():
            return Wording(
                "Energy influence",
                f"Which {removed}s change the {m}'s distribution in any way, a few far runs counting less?",
                "D(X, Y)",
                f"energy distance between the {m}'s distributions as they are and {gone}",
                f"how far the {m} moves when removed",
                f"the square root of the {m}'s unit",
            )
        case Quantile():
            below = f"{m} that {_percent(chosen.p)} of the runs do not exceed"
            return Wording(
                f"Influence on the {_percent(chosen.p)} quantile",
                f"Which {removed}s move the {below}?",
                f"Q(Y) {MINUS} Q(X)",
                f"change of the {below}, {gone}",
                f"change of the {_percent(chosen.p)} quantile of the {m} when removed",
                f"the {m}'s unit",
            )
        case Tail():
            end = "highest" if chosen.side == "upper" else "lowest"
            tail = f"mean {m} over the {end} {_percent(1 - chosen.level)} of the runs"
            return Wording(
                f"Influence on the {chosen.side} tail",
                f"Which {removed}s move the {tail}?",
                f"ES(Y) {MINUS} ES(X)",
                f"change of the {tail} {gone}",
                f"change of the {tail} when removed",
                f"the {m}'s unit",
            )
        case GaussianKL():
            return Wording(
                "Gaussian divergence",
                f"Which {removed}s move the {m}, or change its spread, most for the spread that there is?",
                "KL(Y ‖ X)",
                f"divergence of the {m}'s distribution from what it is, both taken as Gaussian, {gone}",
                f"divergence of the {m} when removed",
                "nats; a shift by one standard deviation is 0.5",
            )
        case SlicedWasserstein():
            return Wording(
                "Sliced Wasserstein influence",
                f"Which {removed}s change how the {m} on all queries is distributed, one by one or together?",
                "SW₂(X, Y)",
                f"distance by which the joint distribution of the {m} over queries moves if the {removed} is removed",
                f"how far the {m} on all queries moves when removed",
                f"the {m}'s unit",
            )
    return Wording(
        f"{chosen.name} influence",
        f"Which {removed}s change the {m}, by {chosen.name}?",
        f"{chosen.name}(X, Y)",
        f"{chosen.name} between the {m}'s distributions as they are and {gone}",
        f"{chosen.name} of the {m} when removed",
        f"the unit of {chosen.name}",
    )


def _mean(difference: Mean, m: str, removed: str, gone: str) -> Wording:
    of, over = {
        "mean": ("mean", f"mean {m}"),
        "median": ("median", f"{m}, median over runs,"),
        "trimmed": ("trimmed mean", f"{m}, mean over runs without the fifths that change most and least,"),
    }[difference.location]
    formula = f"E Y {MINUS} E X" if of == "mean" else f"{of} of Y {MINUS} X"
    return Wording(
        f"{of.capitalize()} influence",
        f"Which {removed}s move the {m}?",
        formula,
        f"change of the {over} {gone}",
        f"change of the {over.rstrip(',')} when removed",
        f"the {m}'s unit",
    )


def _percent(share: float) -> str:
    return f"{round(100 * share, 6):g} %"
