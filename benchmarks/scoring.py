"""How well responses predict the effect of real retraining on the distribution of a measurement.

Linear datamodeling scores by :func:`lightning_dtda.evaluation.functional.linear_datamodeling_score`, for responses as
they are and for responses in the best scale.

Shapes: K removals, S runs that were attributed, R retrainings, Q queries, N examples.
"""

import torch
from torch import Tensor

from lightning_dtda.evaluation.functional import linear_datamodeling_score
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.differences import PAPERS


def predicted(responses: Tensor, baseline: Tensor, removed: Tensor) -> Tensor:
    """Add the responses ``(S, Q, N)`` of the removed ``(K, n)`` to the baseline ``(S, Q)``: samples ``(K, S, Q)``."""
    return torch.stack([baseline.double() + responses[:, :, rows].double().sum(2) for rows in removed])


def scores(
    samples: Tensor, baseline: Tensor, truth: dict[str, Tensor], intervals: bool = True
) -> dict[str, list[float]]:
    """Return the scores of predicted samples ``(K, S, Q)`` by difference, optionally with their intervals."""
    found = {}
    for name in PAPERS:
        replicates = {} if intervals else {"replicates": 0}
        score = linear_datamodeling_score(
            samples, baseline, truth["measurements"], truth["baseline"], name, **replicates
        )
        found[name] = [float(score[key]) for key in (("score", "low", "high") if intervals else ("score",))]
    return found


def ceiling(baseline: Tensor, truth: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the noise ceiling of the retrainings, by difference."""
    unmoved = baseline[None].expand(len(truth["removed"]), *baseline.shape)  # predictions do not matter here
    keys = ("split_half", "reliability", "ceiling")
    result = {}
    for name in PAPERS:
        found = linear_datamodeling_score(
            unmoved, baseline, truth["measurements"], truth["baseline"], name, replicates=0
        )
        result[name] = {key: float(found[key]) for key in keys}
    return result


def evaluate(responses: Tensor, exact: Tensor, baseline: Tensor, truth: dict[str, Tensor]) -> dict[str, object]:
    """Compare responses ``(S, Q, N)`` with retraining, and their scale with that of the exact ones.

    Args:
        responses: Responses to evaluate.
        exact: Exact responses of the same runs.
        baseline: Measurements of these runs ``(S, Q)``.
        truth: Ground truth from ``concrete_truth``.
    """
    # variance and Wasserstein distance depend on the scale; the best that a user could choose is the least-squares one
    by_query = (responses.double() * exact.double()).sum((0, 2))
    factor = float(by_query.sum() / responses.double().square().sum())
    raw = predicted(responses, baseline, truth["removed"])
    rescaled = predicted(factor * responses.double(), baseline, truth["removed"])
    # for a single run, the influence on the mean is its change
    changes = (raw - baseline.double()).permute(1, 2, 0)
    real = (truth["measurements"].double().mean(1) - truth["baseline"].double().mean(0)).T
    return {
        "score": scores(raw, baseline, truth),
        "score rescaled": scores(rescaled, baseline, truth, intervals=False),
        "score of the mean, one run alone": float(correlations(changes, real).mean()),
        "scale": float((by_query / exact.double().square().sum((0, 2))).median()),
        "best factor": factor,
        "correlation with exact responses": float(
            torch.corrcoef(torch.stack([responses.flatten(), exact.flatten()]).double())[0, 1]
        ),
    }
