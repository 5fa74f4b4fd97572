"""One attribution whose influences stand out differently on each query."""

import torch

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
