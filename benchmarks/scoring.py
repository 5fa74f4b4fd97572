"""How well responses predict what real retraining does to the distribution of a measurement.

Distributional linear datamodeling score: Spearman's correlation over random removals between the predicted and the
retrained difference of two distributions, X as trained and Y with the examples removed, averaged over queries
(Park et al., arXiv 2303.14186, for the mean; Mlodozeniec et al., arXiv 2506.12965, for the others).

Shapes: K removals, S runs that were attributed, R retrainings, Q queries, N examples.
"""

import math

import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_dtda.attribution.differences import Mean, Variance, Wasserstein

DIFFERENCES = {"mean": Mean(), "variance": Variance(), "wasserstein": Wasserstein()}
SPLITS, RESAMPLES = 20, 200


def shifts(responses: Tensor, removed: Tensor) -> Tensor:
    """Sum the responses ``(S, Q, N)`` of the removed examples ``(K, n)``: predicted changes ``(S, K, Q)``."""
    return torch.stack([responses[:, :, rows].double().sum(2) for rows in removed], 1)


def predicted(baseline: Tensor, changes: Tensor) -> dict[str, Tensor]:
    """Return each difference ``(K, Q)`` between the baseline ``(S, Q)`` and the same runs, changed ``(S, K, Q)``."""
    before = baseline.double()[:, None]
    return {name: difference(before, before + changes) for name, difference in DIFFERENCES.items()}


def retrained(baseline: Tensor, measurements: Tensor) -> dict[str, Tensor]:
    """Return each difference ``(K, Q)`` between measurements ``(R', Q)`` and retrained ones ``(K, R, Q)``."""
    before, after = baseline.double()[:, None], measurements.double().transpose(0, 1)
    # repeated to equal number, sorted samples are the quantile functions, and the distance is exact
    number = math.lcm(len(before), len(after))
    repeated = (each.repeat_interleave(number // len(each), 0) for each in (before, after))
    return {
        "mean": DIFFERENCES["mean"](before, after),
        "variance": DIFFERENCES["variance"](before, after),
        "wasserstein": DIFFERENCES["wasserstein"](*repeated),
    }


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation over the first dimension ``(K, ...)``, for each of the other positions."""
    ranks = [torch.as_tensor(rankdata(each.numpy(), axis=0)) for each in torch.broadcast_tensors(first, second)]
    one, two = (each - each.mean(0) for each in ranks)
    return (one * two).sum(0) / (one.square().sum(0) * two.square().sum(0)).sqrt()


def score(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the score of two differences ``(K, Q)`` and its standard error, by drawing removals with replacement."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(first), (RESAMPLES, len(first)), generator=generator)
    resampled = torch.stack([correlations(first[rows], second[rows]).mean() for rows in draws])
    return float(correlations(first, second).mean()), float(resampled.std())


def ceiling(baseline: Tensor, measurements: Tensor) -> dict[str, dict[str, float]]:
    """How far the retrainings agree with themselves, by random halves of their seeds.

    Returns:
        For each difference: ``halves``, the score of one half against the other; ``reliability``, that of all seeds
        against as many others (Spearman-Brown: 2 r / (1 + r)); and ``ceiling``, its root, the best score that a
        prediction without any error could reach.
    """
    generator = torch.Generator().manual_seed(0)
    of_splits = []
    for _ in range(SPLITS):
        halves = []
        rows, seeds = (torch.randperm(n, generator=generator) for n in (len(baseline), measurements.shape[1]))
        for of_rows, of_seeds in zip(rows.chunk(2), seeds.chunk(2), strict=True):
            halves.append(retrained(baseline[of_rows], measurements[:, of_seeds]))
        of_splits.append({name: correlations(halves[0][name], halves[1][name]).mean() for name in DIFFERENCES})
    result = {}
    for name in DIFFERENCES:
        halves = float(torch.stack([split[name] for split in of_splits]).mean())
        reliability = 2 * halves / (1 + halves)
        result[name] = {"halves": halves, "reliability": reliability, "ceiling": max(reliability, 0) ** 0.5}
    return result


def evaluate(responses: Tensor, exact: Tensor, baseline: Tensor, truth: dict[str, Tensor]) -> dict[str, object]:
    """Compare responses ``(S, Q, N)`` with retraining, and in their scale with the exact ones.

    Args:
        responses: What is evaluated.
        exact: Exact responses of the same runs.
        baseline: Measurements of these runs ``(S, Q)``.
        truth: As ``concrete_truth`` makes it.
    """
    real = retrained(truth["baseline"], truth["measurements"])
    changes = shifts(responses, truth["removed"])
    # variance and Wasserstein distance depend on the scale; the best that a user could choose is by least squares
    by_query = (responses.double() * exact.double()).sum((0, 2))
    factor = float(by_query.sum() / responses.double().square().sum())
    alone = correlations(-changes.transpose(0, 1), real["mean"][:, None])
    raw, rescaled = predicted(baseline, changes), predicted(baseline, factor * changes)
    return {
        "score": {name: score(each, real[name]) for name, each in raw.items()},
        "score rescaled": {name: score(each, real[name]) for name, each in rescaled.items()},
        "score of the mean, one run alone": float(alone.mean()),
        "scale": float((by_query / exact.double().square().sum((0, 2))).median()),
        "best factor": factor,
        "correlation with exact responses": float(
            torch.corrcoef(torch.stack([responses.flatten(), exact.flatten()]).double())[0, 1]
        ),
    }
