"""Whether location and spread change, each in relation to the spread there is."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dtda.statistics.differences.difference import Difference
from lightning_dtda.statistics.differences.variance import variance


class GaussianKL(Difference):
    r"""Kullback-Leibler divergence of Gaussians with the samples' moments, of Y from X.

    .. math::
        D(\mathcal N_Y \Vert \mathcal N_X) = \tfrac12 \left(
        \frac{\mathrm{Var}\, Y}{\mathrm{Var}\, X} - 1 - \log \frac{\mathrm{Var}\, Y}{\mathrm{Var}\, X}
        + \frac{(E Y - E X)^2}{\mathrm{Var}\, X} \right)

    The distribution as trained is the reference, so that all removals are measured in the same spread. In nats, without
    the measurement's unit: queries of any scale can be compared. Never negative. Infinite where a variance is zero and
    something changes.

    Example:
        >>> GaussianKL()(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 2.0]))
        tensor(0.2500)
    """

    name = "gaussian_kl"
    title = "Gaussian divergence"
    formula = "KL(Y ‖ X)"
    meaning = "divergence of the {measurement}'s distribution from what it is, both taken as Gaussian,"
    unit = "nats; a shift by one standard deviation is 0.5"
    signed = False
    least_runs = 2
    moments = ("mean", "variance")

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return ``D(N_Y || N_X)``."""
        of_baseline, shift = variance(baseline), predicted.mean(0) - baseline.mean(0)
        # Var Y / Var X - 1, for log1p: the divergence is of second order in it
        excess = (variance(predicted) - of_baseline) / of_baseline
        divergence = (excess - excess.log1p() + shift.square() / of_baseline) / 2
        # of samples of any two sizes that have no spread
        unmoved = (baseline == baseline[0]).all(0) & (predicted == baseline[0]).all(0)
        return torch.where(unmoved, 0.0, divergence.nan_to_num(torch.inf, torch.inf))
