"""Made-up ensembles and experiments of which it is known what removals do."""

import torch

from lightning_dtda import Attribution

PERSISTENCE = 0.95
"""Correlation, before the transform, between a measurement as trained and as predicted."""


def attribution_of(baseline, responses):
    runs = tuple(f"seed-{s:04d}" for s in range(len(baseline)))
    return Attribution(baseline, responses, runs, tuple(range(baseline.shape[1])))


def without_effect(kind, runs, queries, examples, seed=0):
    """Every example changes each run's measurement, and none its distribution.

    X and Y are transforms of a stationary process at two times, so they can be exchanged. Queries are independent; the
    examples of a query share X, as in an ensemble.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    before = normal(runs, queries, 1)
    after = PERSISTENCE * before + (1 - PERSISTENCE**2) ** 0.5 * normal(runs, queries, examples)
    if kind == "heavy-tailed":  # Student's t of 3 degrees of freedom, jointly: in wild runs, responses are large too
        wild = (3 / normal(3, runs, queries, 1).square().sum(0)).sqrt()
        before, after = wild * before, wild * after
    if kind == "heteroscedastic":  # log-normal: responses in proportion to the measurement
        before, after = before.exp(), after.exp()
    if kind == "bounded":
        before, after = torch.special.ndtr(before), torch.special.ndtr(after)
    return attribution_of(before[..., 0], after - before)


KINDS = ("gaussian", "heavy-tailed", "heteroscedastic", "bounded")


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
    return (baseline + effects + errors, baseline, real, real_baseline), effects[:, 0]
