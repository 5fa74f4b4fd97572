"""``check``: whether attributions of these runs can be trusted, tested on the runs themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dtda.attribution.attributing import attribute
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators import Estimator, UnrolledDifferentiation
from lightning_dtda.estimators.diagnosis import weight_step
from lightning_dtda.evaluation.ranking import Ranking, rank_estimators
from lightning_dtda.evaluation.self_checks import (
    NOISE,
    CheckResult,
    chaos_check,
    keep_results,
    replay_check,
    self_checks,
)
from lightning_dtda.replay import Draws, Measurement, Replay, query_examples, resolve_measurement, training_examples
from lightning_dtda.replay.measuring import measure_with_gradients
from lightning_dtda.trajectory import Ensemble, Run

_AGREEMENT = 0.05
"""Relative error against finite differences from which responses are not the derivatives of the training. It is
loose because the replay in double precision restarts from the recorded parameters at every checkpoint, the retraining
only at the first."""

_REMOVED = 0.2
"""Share of the examples whose weights are lowered to compute the metasmoothness."""


@dataclass(frozen=True)
class Check:
    """The results of :func:`check`.

    Args:
        results: Results of the checks.
        metasmoothness: Metasmoothness of the training, from -1 to 1; see :func:`metasmoothness`.
        ranking: Comparison of the estimators; ``None`` if there are none to compare, or the replay stopped.
    """

    results: tuple[CheckResult, ...]
    metasmoothness: float
    ranking: Ranking | None = None

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(result.passed for result in self.results)

    def save(self, attribution: str | Path) -> None:
        """Store the results with an attribution of these runs: the verdict of its reports then takes them into account.

        Args:
            attribution: Directory of the attribution.

        Raises:
            AttributionError: If it holds no attribution.
        """
        keep_results(self.results, attribution)


def check(
    ensemble: Ensemble,
    module: LightningModule,
    data: LightningDataModule | LightningModule | DataLoader[Any] | Dataset[Any],
    *,
    queries: DataLoader[Any] | Dataset[Any],
    measurement: str | Measurement = "loss",
    examples: int = 3,
    estimators: Sequence[Estimator] = (),
    sets: int = 20,
    device: torch.device | str | None = None,
) -> Check:
    """Replay the runs, compare responses with finite differences of retraining, and compare the runs.

    For a few examples, the first run is retrained in double precision with the example's weight slightly larger and
    slightly smaller, and the change of the measurement is compared with the response. All runs are attributed, which
    compares each step with the record. Estimators are compared on replays of the first eight runs without random tenths
    of the examples.

    Args:
        ensemble: The recorded runs.
        module: As for :func:`~lightning_dtda.attribute`.
        data: As for :func:`~lightning_dtda.attribute`.
        queries: Queries to use; a few are enough.
        measurement: As for :func:`~lightning_dtda.attribute`.
        examples: Number of training examples to compare, those with the largest responses.
        estimators: Estimators to compare, at least two: which one predicts exact replays best?
        sets: Number of random tenths, each of which is one replay of each of these runs.
        device: Device to compute on; ``None`` means the module's device.

    Returns:
        The results of the checks.

    Raises:
        AttributionError: If ``examples`` is less than one, there is only one estimator or set, or another argument is
            invalid.
        RetrainingError: If two runs have the same seed, and there are estimators to compare.
    """
    if examples < 1:
        raise AttributionError(f"examples={examples}; give the number of examples to compare, at least 1.")
    if estimators and (len(estimators) < 2 or sets < 2):
        raise AttributionError(
            f"There are {len(estimators)} estimators and {sets} sets. Give at least two estimators to compare, and at "
            "least two sets; about twenty sets are needed to tell estimators apart."
        )
    question: Any = {"queries": queries, "measurement": measurement, "device": device, "progress": False}
    exact = UnrolledDifferentiation(precision="float64", horizon=None)
    try:
        all_runs = attribute(ensemble, module, data, **question)
    except ReplayError as error:
        return Check((CheckResult("replay", False, "stopped", str(error)),), float("nan"))
    ranking = rank_estimators(ensemble, module, data, estimators, sets, **question) if estimators else None
    try:
        first = attribute(ensemble[:1], module, data, estimator=exact, **question)
    except Exception as error:  # the user's code may fail in any way in another precision
        advice = f"The module fails in double precision, which this check needs: {type(error).__name__}: {error}"
        if isinstance(error, ReplayError):
            advice = f"{error} {NOISE}"
        stopped = CheckResult("replay in double precision", False, "stopped", advice)
        return Check((replay_check(all_runs), stopped, chaos_check(all_runs)), float("nan"), ranking)
    responses = first.responses[0]
    chosen = responses.abs().amax(0).argsort(descending=True)[:examples]
    ones = torch.ones(responses.shape[1], dtype=torch.float64)
    unit = torch.eye(len(ones), dtype=torch.float64)
    change = weight_step(ensemble[0])
    moved = [ones + sign * change * unit[n] for n in chosen for sign in (1, -1)]
    lowered = _half_of_some(len(ones))
    weights = torch.stack([*moved, ones, ones - lowered, ones - 2 * lowered])
    thetas, values = _retrained(ensemble, module, data, weights, queries, measurement, device)
    pairs = values[: len(moved)].reshape(len(chosen), 2, -1)
    differences = -(pairs[:, 0] - pairs[:, 1]).T / (2 * change)
    exactness = _finite_differences(responses[:, chosen], differences, ensemble[0])
    replayed, *others = self_checks(all_runs)
    return Check((replayed, exactness, *others), metasmoothness(*thetas[len(moved) :]), ranking)


def _finite_differences(responses: Tensor, differences: Tensor, run: Run) -> CheckResult:
    scale = responses.abs().max().clamp_min(torch.finfo(responses.dtype).tiny)
    distance = float((differences - responses).abs().max() / scale)
    queries, examples = responses.shape
    passed = distance < _AGREEMENT + run.update.update.rounding
    return CheckResult(
        "finite differences",
        passed,
        f"relative error {distance:.1e} over {examples} examples and {queries} queries of {run.name}",
        "The responses are the derivatives of this training."
        if passed
        else "The responses are not the derivatives of this training. Either it is not smooth when weights change by a "
        "ten-millionth, or it does something that lightning-dtda does not capture: please report it.",
    )


def _half_of_some(count: int) -> Tensor:
    """Return 0.5 for a random share of the examples, else 0."""
    lowered = torch.zeros(count, dtype=torch.float64)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    lowered[order[: max(1, int(_REMOVED * count))]] = 0.5
    return lowered


def metasmoothness(first: Tensor, second: Tensor, third: Tensor) -> float:
    r"""Return how far a training responds in the same direction to two equal changes of its data.

    .. math:: \sum_p \frac{|\Delta_p|}{\lVert\Delta\rVert_1} \operatorname{sign}\Delta_p \operatorname{sign}\Delta'_p,
        \qquad \Delta = \theta_2 - \theta_1, \quad \Delta' = \theta_3 - \theta_2

    (Engstrom et al., arXiv 2503.13751, definition 2). 1: each parameter keeps its direction. 0: the second half of the
    change is unrelated to the first, and no derivative predicts it.

    Args:
        first: Trained parameters ``(P,)``.
        second: Parameters trained with changed weights.
        third: Parameters trained with weights changed twice as much.

    Example:
        >>> metasmoothness(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 0.0]))
        0.0
    """
    change, further = second - first, third - second
    return float((change.abs() * change.sign() * further.sign()).sum() / change.abs().sum())


def _retrained(
    ensemble: Ensemble,
    module: LightningModule,
    data: Any,
    weights: Tensor,
    queries: Any,
    measurement: str | Measurement,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    """Retrain the first run with each row of weights ``(K, N)``.

    Returns:
        Parameters ``(K, P)`` and measured values ``(K, queries)``.
    """
    examples = training_examples(data)
    replay = Replay([ensemble[0]] * len(weights), module, examples, precision="float64", device=device)
    theta, buffers = replay.retrain(weights.to(replay.device))
    asked = query_examples(queries, examples)
    values, _, _ = measure_with_gradients(
        replay.eager,
        theta,
        buffers,
        asked,
        range(len(asked)),
        resolve_measurement(measurement)[1],
        [f"a retraining of {ensemble[0].path}"] * len(weights),
        replay.time(replay.steps),
        Draws(),
    )
    return theta.cpu(), values.cpu()
