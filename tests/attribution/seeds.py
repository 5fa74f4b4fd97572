"""Attributions of simulated seeds, of which it is known what removals do."""

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
