"""What the trained models predict for each query, in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.attribution.gallery.showing import class_name
from lightning_dtda.errors import AttributionError, DTDAError
from lightning_dtda.estimators import Question
from lightning_dtda.replay import Draws
from lightning_dtda.replay.measurements import labels_of, output_of, prediction
from lightning_dtda.replay.measuring import measure
from lightning_dtda.trajectory import Run

MOST_PAIRS = 20_000
"""Largest number of pairs of a run and a query whose output is computed, unless there are more runs. An attribution
computes a gradient for each pair, which takes longer."""

_MOST_CLASSES = 3
"""Number of classes that are listed for a query."""


@dataclass(frozen=True)
class ModelOutputs:
    """Outputs of the trained models.

    Args:
        values: For each run by name, the scalar outputs, or the numbers of the predicted classes ``(queries,)``.
        are_classes: Which of the two they are.
    """

    values: dict[str, Tensor]
    are_classes: bool = False

    def describe(self, position: int, runs: Sequence[str], classes: Sequence[str]) -> str | None:
        """Return the output for a query over some runs, in words; ``None`` if it is unknown.

        Args:
            position: Position of the query.
            runs: Names of the runs.
            classes: Names of the classes, if they are known.

        Example:
            >>> of_runs = {"a": torch.tensor([1.0]), "b": torch.tensor([0.0]), "c": torch.tensor([1.0])}
            >>> ModelOutputs(of_runs, are_classes=True).describe(0, ["a", "b", "c"], ["cat", "dog"])
            'dog in 2 of 3 runs, cat in 1'
        """
        of_runs = [self.values[run] for run in runs if run in self.values]
        if not of_runs or position >= len(of_runs[0]):
            return None
        values = torch.stack([of_run[position] for of_run in of_runs])
        return _classes(values, classes) if self.are_classes else _numbers(values)


def model_outputs(runs: Sequence[Run], question: Question) -> ModelOutputs:
    """Compute what trained models predict for the first queries, at most :data:`MOST_PAIRS` of runs and queries.

    Returns:
        The classes, if the module returns class scores and the queries have integer labels; its scalar outputs; or
        nothing, if it returns something else.
    """
    number = min(len(question.queries), max(1, MOST_PAIRS // len(runs)))
    one_draw = Draws(1, question.draws.seed)  # classes have no mean
    for measurement, draws in ((predicted_class, one_draw), (prediction, question.draws)):
        asked = replace(question, measurement=measurement, draws=draws)
        try:
            _measured(runs[:1], asked, 1)
            values = _measured(runs, asked, number)
        except DTDAError:  # the module has no such output
            continue
        return ModelOutputs(values, measurement is predicted_class)
    return ModelOutputs({})


def _measured(runs: Sequence[Run], question: Question, number: int) -> dict[str, Tensor]:
    """Measure the first queries at the step in question."""
    queries, found = question.queries.stretch(range(number)), {}
    for run in runs:
        replay = question.replay([run])
        end = question.end(replay.steps)
        trained = *replay.trained(end), queries, question.measurement, replay.time(end), question.draws
        found[run.name] = measure(replay.eager, *trained)[0].double().cpu()
    return found


def predicted_class(module: LightningModule, batch: object) -> Tensor:
    """The number of each query's predicted class ``(B,)``.

    Raises:
        AttributionError: If the module returns neither classes ``(B,)`` nor, for integer labels, class scores
            ``(B, C)``.
    """
    output, labels = output_of(module, batch), labels_of(batch)
    if output.ndim == 1 and not output.is_floating_point():
        return output
    if output.ndim != 2 or output.shape[1] < 2 or not isinstance(labels, Tensor) or labels.is_floating_point():
        raise AttributionError('There are no classes: the module returns no class scores. Measure "prediction".')
    if output.shape[1] > 2 / torch.finfo(output.dtype).eps:
        raise AttributionError(f"There are more classes than {output.dtype} has whole numbers.")
    return output.argmax(1)


def _classes(values: Tensor, classes: Sequence[str]) -> str:
    counts = Counter(values.long().tolist()).most_common()
    names = [class_name(number, classes) for number, _ in counts]
    if len(counts) == 1:
        return names[0] + (f" in all {len(values)} runs" if len(values) > 1 else "")
    parts = [f"{name} in {count}" for name, (_, count) in zip(names, counts[:_MOST_CLASSES], strict=False)]
    if rest := sum(count for _, count in counts[_MOST_CLASSES:]):
        parts.append(f"others in {rest}")
    return ", ".join([f"{parts[0]} of {len(values)} runs", *parts[1:]])


def _numbers(values: Tensor) -> str:
    """Return mean and standard deviation, to the first digit of the latter, or the second if that is small."""
    mean = float(values.mean())
    if len(values) == 1:
        return f"{mean:.3g}"
    deviation = float(values.std())
    digits = math.inf
    if 0 < deviation < math.inf:
        digits = max(0, -math.floor(math.log10(deviation / 2)))
    figures = (f"{mean:.3g}", f"{deviation:.2g}") if digits > 6 else (f"{mean:.{digits}f}", f"{deviation:.{digits}f}")
    return f"{' ± '.join(figures)} over {len(values)} runs"
