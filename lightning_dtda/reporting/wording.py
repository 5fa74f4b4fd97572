"""The sentences and table heads that reports share: what was asked, what was found, which sign means what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_dtda.attribution.attribution import ENOUGH_RUNS, Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.findings import largest_drift, worst_diagnosis
from lightning_dtda.statistics.differences import Difference


@dataclass(frozen=True)
class Wording:
    """How a difference between distributions of a measurement is introduced.

    Args:
        title: Its name, as inside a sentence.
        question: What it answers.
        formula: Its definition; X is the measurement as trained, Y with the example removed.
        meaning: The influence in words.
        short: The same for an axis or the head of a column.
        unit: What the influence is measured in.
        reading: What its sign says.
    """

    title: str
    question: str
    formula: str
    meaning: str
    short: str
    unit: str
    reading: str


def describe(difference: Difference, measurement: str, removed: str = "example") -> Wording:
    """Put into words what a difference says of itself.

    Args:
        difference: The difference.
        measurement: The measurement's name.
        removed: What a removal takes away, an ``"example"`` or a ``"group"``.

    Example:
        >>> from lightning_dtda.statistics import Tail
        >>> describe(Tail(), "loss").meaning
        'change of the mean loss over the highest 10 % of the runs on this query if the example is removed'
    """
    meaning, unit, reading = (
        text.format(measurement=measurement, removed=removed)
        for text in (difference.meaning, difference.unit, difference.reading)
    )
    sign = (
        f"Positive: removing the {removed} raises it. Negative: it lowers it."
        if difference.signed
        else "Never negative, and so too large where the effect is smaller than seed noise."
    )
    plain = meaning.rstrip(",")
    return Wording(
        title=difference.title or f"{difference.name} influence",
        question=f"Which {removed}s make the largest {plain}?",
        formula=difference.formula,
        meaning=f"{meaning} on this query if the {removed} is removed",
        short=f"{plain} when removed",
        unit=unit,
        reading=reading or sign,
    )


def noun(attribution: Attribution) -> str:
    """Return what a removal takes away: an example or a group."""
    return "example" if attribution.removals is None else "group"


def question(attribution: Attribution) -> str:
    """Return what was asked, as a question."""
    number, queries, members = attribution.responses.shape[2], len(attribution.queries), attribution.members
    what = f"one of {number} training examples"
    if members is not None:
        what = f"one of {number} groups of training examples"
        if number == 1:
            what = f"a group of {counted(len(members[0]), 'training example')}"
    return (
        f"How does the {attribution.measurement} on {counted(queries, 'query', 'queries')} change if {what} is removed?"
    )


def answer(attribution: Attribution) -> str:
    """Return how the question was answered."""
    ensemble = attribution.about.get("ensemble")
    of = f" of the ensemble {ensemble}" if ensemble else ""
    step = "" if attribution.step is None else f"step {attribution.step} of "
    return (
        f"The {attribution.measurement} was measured after {step}{counted(len(attribution.runs), 'seeded run')}{of}; "
        f"its change in each run is predicted by {estimator(attribution)}. Removal means weight zero: order, "
        "slots and divisor are kept."
    )


def estimator(attribution: Attribution) -> str:
    """Return the estimator's name with its settings."""
    settings: Any = attribution.about.get("estimator")
    if not isinstance(settings, dict):
        return str(settings or "an estimator that is not named")
    name = str(settings.get("class", "estimator")).rpartition(".")[2]
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "class")
    return f"{name} ({arguments})" if arguments else name


def drift(attribution: Attribution) -> str:
    """Return how far the replayed runs were from the recorded ones at the worst."""
    measured = {part: largest_drift(attribution, part) for part in ("parameters", "gradients")}
    known = [f"{part} {value:.2g}" for part, value in measured.items() if value is not None]
    return ", ".join(known) if known else "not measured"


def diagnosis(attribution: Attribution) -> str:
    """Return how well the responses could be computed at the worst, on a sample of steps."""
    parts = {"finite_differences": "from finite differences", "precision": "from double precision"}
    known = {words: worst_diagnosis(attribution, part) for part, words in parts.items()}
    return ", ".join(f"{value:.1g} {words}" for words, value in known.items() if value is not None) or "not measured"


_SHARED = {
    "network": "The examples of a batch share what the network makes of them together (BatchNorm, mixup). Removing "
    "one takes away what flows through its own outputs; it keeps its part in what the others see.",
    "loss": "The examples of a batch share its loss (class weights, a mean over tokens, a contrast, BatchNorm). "
    "Removing one takes away what flows through its own outputs; divisors and comparisons stay.",
}
"""What is said where examples depend on each other."""


def cautions(attribution: Attribution) -> list[str]:
    """Return what the reader has to know before believing a number; nothing if there are enough runs."""
    runs = len(attribution.runs)
    said = []
    if chaotic := attribution.chaotic:
        said = [
            f"{counted(len(chaotic), 'run is', 'runs are')} left out of {runs} ({', '.join(chaotic)}): their responses "
            "are out of proportion to the others', since small changes grew in those trainings. What follows is of the "
            'rest; runs="all" takes them in, and UnrolledDifferentiation(horizon="auto") may tame them.'
        ]
        runs -= len(chaotic)
    if failed := attribution.ill_conditioned:
        said.append(
            f"{counted(len(failed), 'run is', 'runs are')} ill-conditioned ({', '.join(failed)}): on a sample of "
            "steps, responses in single and in double precision differ by more than 5 %. Attribute with "
            'UnrolledDifferentiation(precision="float64").'
        )
    if (shared := (attribution.about.get("shared") or {}).get("training", "none")) != "none":
        said.append(_SHARED[shared])
    if draws := attribution.about.get("draws"):
        said.append(
            f"The measurement draws random numbers. It is the mean over {draws['number']} draws (seed "
            f"{draws['seed']}), the same ones for every run."
        )
    if runs == 1:
        said.append(
            "There is a single run: nothing here tells an effect from seed noise. The variance influence needs two "
            "runs, standard errors need two for the mean and three for the variance. Record more seeds."
        )
    elif runs < ENOUGH_RUNS:
        said.append(
            f"There are {runs} runs; with fewer than {ENOUGH_RUNS} the standard errors are themselves uncertain by "
            "more than a quarter. Record more seeds."
        )
    return said


def reliability(attribution: Attribution) -> str:
    """Return how well halves of the runs agree about the ranking of the removals, over queries."""
    try:
        of_queries = attribution.reliability("mean")
    except AttributionError:
        return "too few runs to tell"
    low, middle, high = of_queries.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=of_queries.dtype)).tolist()
    return f"{middle:.2f}" if len(of_queries) == 1 else f"{middle:.2f} ({low:.2f} to {high:.2f} over queries)"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "run"), counted(3, "query", "queries")
        ('1 run', '3 queries')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
