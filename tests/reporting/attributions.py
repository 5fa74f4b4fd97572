"""Attributions that are shown: one whose influences stand out differently on each query, and others like it."""

import base64

import torch

from lightning_dtda import GroundTruth
from lightning_dtda.attribution.attribution import Attribution

RUNS, QUERIES, EXAMPLES = 12, (4, 7, 9), 40


def make_attribution(runs=RUNS, **about):
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(runs, 3, generator=generator)
    responses = 0.002 * torch.randn(runs, 3, EXAMPLES, generator=generator)
    responses[..., 11] += torch.tensor([0.3, -0.2, 0.1])  # moves the mean
    responses[..., 23] += 0.4 * (seed - seed.mean(0))  # moves with the seed: the variance
    responses[..., 5] = 0.0  # never trained on
    names = tuple(f"seed-{number:04d}" for number in range(runs))
    settings = {
        "measurement": "loss",
        "estimator": {"class": "lightning_dtda.estimators.unrolled.UnrolledDifferentiation", "precision": "float64"},
        "removal": "reweight",
        "ensemble": "concrete",
        "adjoint_norms": {name: {"9": 1.0, "4": 0.5 + 0.1 * n, "0": 2.0} for n, name in enumerate(names)},
        "diagnosis": {name: {"finite_differences": 2e-5, "precision": 1e-6 * n} for n, name in enumerate(names)},
        "drift": {name: {"parameters": 1e-7 * (n + 1), "gradients": 2e-6} for n, name in enumerate(names)},
    }
    return Attribution(1.0 + 0.5 * seed, responses, names, QUERIES, settings | about)


GROUPS = tuple(f"<i>source {number}</i>" for number in range(EXAMPLES))

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""A picture of one pixel."""


def truth_of(attribution, removed, error=0.0, seeds=12):
    """Return a ground truth in which removals do what is predicted, plus noise."""
    noise = error * torch.randn(len(removed), seeds, len(QUERIES), generator=torch.Generator().manual_seed(1))
    real = torch.stack([attribution.predict(subset) for subset in removed]) + noise
    about = {"removal": "drop", "measurement": "loss"}
    return GroundTruth(real, attribution.baseline, removed, QUERIES, tuple(range(20, 32)), tuple(range(20, 32)), about)


def suggestible():
    """Return an attribution in which removing example 23 halves the spread on the last query."""
    attribution = make_attribution()
    attribution.responses[:, 2, 23] = -0.5 * (attribution.baseline[:, 2] - attribution.baseline[:, 2].mean())
    return attribution


def many(queries, examples, runs=20):
    """Return an attribution of many queries, with some examples that matter everywhere."""
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(runs, queries, generator=generator)
    responses = 0.002 * torch.randn(runs, queries, examples, generator=generator)
    responses[..., :40] += 0.004 * torch.randn(queries, 40, generator=generator)
    responses[..., 40:60] += 0.02 * torch.randn(queries, 20, generator=generator) * seed[..., None]
    names = tuple(f"seed-{number:04d}" for number in range(runs))
    return Attribution(1 + 0.1 * seed, responses, names, tuple(range(queries)), {"measurement": "loss"})
