"""Made-up experiments whose true influences are known."""

import torch


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def experiment(generator, subsets=12, runs=6, seeds=8, baseline_seeds=10, queries=5, wrong=0.5, noise=1.0):
    """Return samples in the order that metrics take them, and the true mean influences ``(subsets, queries)``.

    Args:
        wrong: Size of a prediction's error that all runs share, and of the error of each run.
        noise: Size of the truth's noise, were it from 9 seeds.
    """
    effects = normal(generator, subsets, 1, queries) + normal(generator, subsets, 1, 1)
    baseline, real_baseline = normal(generator, runs, queries), normal(generator, baseline_seeds, queries)
    errors = wrong * (normal(generator, subsets, 1, queries) + normal(generator, subsets, runs, queries))
    real = effects + 3 * noise * normal(generator, subsets, seeds, queries)
    return (baseline + effects + errors, baseline, real, real_baseline), -effects[:, 0]
