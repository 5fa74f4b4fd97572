"""The sentences and table heads that reports share: the question, the answer, the meaning of the sign."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dtda.attribution.attribution import ENOUGH_RUNS, Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.reporting.facts import largest_drift, predicted_out_of_range, worst_diagnosis
from lightning_dtda.reporting.formatting import supported
from lightning_dtda.reporting.rows import TopExample
from lightning_dtda.statistics.differences import Difference


@dataclass(frozen=True)
class Wording:
    """How a difference between distributions of a measurement is introduced.

    Args:
        title: Name, in lower case unless it is a proper name.
        question: Question that it answers.
        formula: Definition; X is the measurement as trained, Y with the example removed.
        meaning: Meaning of the influence in words.
        short: The same, short enough for an axis or the head of a column.
        unit: Unit of the influence.
        reading: Meaning of its sign.
    """

    title: str
    question: str
    formula: str
    meaning: str
    short: str
    unit: str
    reading: str


def describe(difference: Difference, measurement: str, removed: str = "example") -> Wording:
    """Return the texts that introduce a difference.

    Args:
        difference: The difference.
        measurement: Name of the measurement.
        removed: What is removed, an ``"example"`` or a ``"group"``.

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
        else "Never negative, so it overestimates effects that are smaller than the seed noise."
    )
    plain = meaning.rstrip(",")
    return Wording(
        title=difference.title or f"{difference.name} influence",
        question=f"Which {removed}s make the largest {plain}?",
        formula=difference.formula,
        meaning=f"{meaning} on this query if the {removed} is removed",
        short=f"{plain} if removed",
        unit=unit,
        reading=reading or sign,
    )


def effect(difference: Difference, measurement: str, row: TopExample) -> str:
    r"""Return what happens without an example, or a group, as a sentence.

    Example:
        >>> row = TopExample(1, 3, "3", 1, -12.3, 4.0, 0.1, -12.3, 0.0, -20.1, -4.5, 0.004, 0.03, True, 9.0, 40.0)
        >>> from lightning_dtda.statistics import Spread
        >>> effect(Spread(), "loss", row)
        "Without it, the loss's standard deviation over runs falls (−12\xa0% [−20, −4])."
    """
    meaning = difference.meaning.format(measurement=measurement, removed="example").rstrip(",")
    size, low, high = supported(row.influence, row.interval_low, row.interval_high)
    percent = "\N{NO-BREAK SPACE}%" * difference.relative
    if not math.isfinite(row.influence):
        had = "; as trained, there is none" if row.influence == math.inf else ""
        return f"Without it, the {meaning.partition(' by which ')[0].removeprefix('change of the ')} is not known{had}."
    interval = f" [{low}, {high}]" if math.isfinite(row.interval_low) and math.isfinite(row.interval_high) else ""
    amount = f"{size}{percent}{interval}"
    if difference.signed and meaning.startswith("change of "):
        moves = "falls" if row.influence < 0 else "rises"
        return f"Without it, {meaning.removeprefix('change of ')} {moves} ({amount})."
    distance, by_which, moves = meaning.partition(" by which ")
    if by_which:
        return f"Without it, {moves} (by {'an' if distance[0] in 'aeiou' else 'a'} {distance} of {amount})."
    return f"Without it, {meaning}: {amount}."


@dataclass(frozen=True)
class AsTrained:
    """A measurement as trained.

    Args:
        value: Its mean and standard deviation over runs.
        sentence: The same, with what it is.
    """

    value: str
    sentence: str


def as_trained(measurement: str, baseline: Tensor) -> AsTrained:
    """Return a measurement's mean and standard deviation over runs ``(runs,)``, in words.

    Example:
        >>> as_trained("loss", torch.tensor([1.0, 2.0, 3.0])).sentence, as_trained("loss", torch.tensor([1.0])).sentence
        ('loss 2.0 ± 1.0 over 3 runs', 'loss 1 in the single run')
    """
    values = baseline.double()
    if len(values) == 1:
        value = f"{float(values):.3g}"
        return AsTrained(value, f"{measurement} {value} in the single run")
    mean, deviation = float(values.mean()), float(values.std())
    shown = supported(mean, mean - deviation, mean + deviation)[0]
    decimals = len(shown.partition(".")[2])
    value = f"{shown} ± {deviation:.{decimals}f}"
    return AsTrained(value, f"{measurement} {value} over {len(values)} runs")


def noun(attribution: Attribution) -> str:
    """Return what is removed, as a noun: "example" or "group"."""
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
    scale = "" if attribution.scale == "linear" else f', on the scale "{attribution.scale}"'
    step = "" if attribution.step is None else f"step {attribution.step} of "
    return (
        f"The {attribution.measurement} was measured after {step}{counted(len(attribution.runs), 'seeded run')}{of}; "
        f"its change in each run is predicted by {estimator(attribution)}{scale}. Removing an example means giving it "
        "weight zero: batch order, batch size and the loss's denominator stay the same."
    )


def estimator(attribution: Attribution) -> str:
    """Return the estimator's name with its settings."""
    settings: Any = attribution.about.get("estimator")
    if not isinstance(settings, dict):
        return str(settings or "an unnamed estimator")
    name = str(settings.get("class", "estimator")).rpartition(".")[2]
    arguments = ", ".join(f"{key}={value}" for key, value in settings.items() if key != "class")
    return f"{name} ({arguments})" if arguments else name


def drift(attribution: Attribution) -> str:
    """Return the largest relative differences between replayed and recorded runs."""
    drifts = {part: largest_drift(attribution, part) for part in ("parameters", "gradients")}
    known = [f"{part} {value:.2g}" for part, value in drifts.items() if value is not None]
    return ", ".join(known) if known else "not measured"


def diagnosis(attribution: Attribution) -> str:
    """Return the largest relative errors of the responses, on a sample of steps."""
    parts = {"finite_differences": "against finite differences", "precision": "against double precision"}
    known = {words: worst_diagnosis(attribution, part) for part, words in parts.items()}
    return ", ".join(f"{value:.1g} {words}" for words, value in known.items() if value is not None) or "not measured"


_SHARED = {
    "network": "The network mixes the examples of a batch (BatchNorm, mixup). Removing one removes the gradient "
    "through its own outputs; its effect on the outputs of the others stays.",
    "loss": "The loss mixes the examples of a batch (class weights, a mean over tokens, a contrastive loss, "
    "BatchNorm). Removing one removes the gradient through its own outputs; denominators and comparisons stay.",
}
"""Cautions for batches whose examples depend on each other."""


OUT_OF_RANGE = "\N{DAGGER}"
"""Mark of a removal without which the measurement is predicted where it cannot be."""


def _outside(attribution: Attribution) -> str:
    low, high = attribution.known_range
    ends = [*([f"below {low:g}"] if math.isfinite(low) else []), *([f"above {high:g}"] if math.isfinite(high) else [])]
    return " or ".join(ends)


def _remedy(attribution: Attribution) -> str:
    if attribution.scale != "linear" or attribution.known_range[0] != 0:
        return "Take a measurement without bounds, such as a margin."
    scale = "logit" if attribution.known_range[1] == 1 else "sqrt"
    return f'Attribute again with scale="{scale}": it takes no time, and its predictions stay in range.'


def cautions(attribution: Attribution) -> list[str]:
    """Return what readers must know before they trust a number; an empty list if there is nothing."""
    runs = len(attribution.runs)
    said = []
    if chaotic := attribution.chaotic:
        said = [
            f"{counted(len(chaotic), 'run is', 'runs are')} left out of {runs} as chaotic ({', '.join(chaotic)}): "
            f"small changes grew during training, so responses are {_how_large(attribution)}. "
            "The default horizon of UnrolledDifferentiation, or InfluenceFunctions, may help. In Python, "
            'influence(..., runs="all") includes them.'
        ]
        runs -= len(chaotic)
    if failed := attribution.ill_conditioned:
        said.append(
            f"{counted(len(failed), 'run is', 'runs are')} ill-conditioned ({', '.join(failed)}): on a sample of "
            "steps, responses in single and double precision differ by more than 5 %. Attribute with "
            'UnrolledDifferentiation(precision="float64").'
        )
    queries, predictions = predicted_out_of_range(attribution)
    if predictions:
        said.append(
            f"On {queries} of {counted(len(attribution.queries), 'query', 'queries')}, {predictions} of "
            f"{len(attribution.queries) * attribution.responses.shape[2]} predictions are {_outside(attribution)} in "
            f"some run, where the {attribution.measurement} cannot be; they are marked {OUT_OF_RANGE}. These removals "
            f"are too large for a linear prediction. {_remedy(attribution)}"
        )
    if (shared := (attribution.about.get("shared") or {}).get("training", "none")) != "none":
        said.append(_SHARED[shared])
    if draws := attribution.about.get("draws"):
        said.append(
            f"The measurement draws random numbers. Its value is the mean over {draws['number']} draws (seed "
            f"{draws['seed']}), the same for every run."
        )
    if runs == 1:
        said.append(
            "There is a single run, so no effect can be distinguished from seed noise. The spread influence needs "
            "two runs; intervals need two for the mean and three for the spread. Record more seeds."
        )
    elif runs < ENOUGH_RUNS:
        said.append(
            f"There are only {runs} runs: with fewer than {ENOUGH_RUNS}, the standard errors are themselves uncertain "
            "by more than a quarter. Record more seeds."
        )
    return said


def _how_large(attribution: Attribution) -> str:
    """Return how large the responses of the chaotic runs are."""
    norms = attribution.about.get("response_norm", {})
    if not set(attribution.runs) <= norms.keys():
        return "out of proportion to those of the other runs"
    median = statistics.median(norms[run] for run in attribution.runs)
    least, most = (f"{pick(norms[run] for run in attribution.chaotic) / median:,.0f}" for pick in (min, max))
    return f"{least if least == most else f'{least} to {most}'} times as large as those of a typical run"


def reliability(attribution: Attribution) -> str:
    """Return how well halves of the runs agree on the ranking of the removals: median and range over queries."""
    try:
        of_queries = attribution.reliability("mean")
    except AttributionError:
        return "unknown (too few runs)"
    low, middle, high = of_queries.quantile(torch.tensor([0.0, 0.5, 1.0], dtype=of_queries.dtype)).tolist()
    return f"{middle:.2f}" if len(of_queries) == 1 else f"{middle:.2f} ({low:.2f} to {high:.2f} over queries)"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, in the singular or plural.

    Example:
        >>> counted(1, "run"), counted(3, "query", "queries")
        ('1 run', '3 queries')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
