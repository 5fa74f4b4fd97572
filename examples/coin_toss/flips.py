"""The flip rate as a difference of distributions, and rows whose removal is predicted to lower it most."""

import torch
from torch import Tensor

from lightning_dtda import Attribution
from lightning_dtda.statistics import Difference


def flip_rate(margins: Tensor) -> Tensor:
    r"""Return :math:`\Phi(-|\mu| / \sigma)` of margins ``(runs, ...)``: the minority's share of Gaussian seeds.

    The share itself would be a step function of the margins, on which small responses have no effect.
    """
    return torch.special.ndtr(-margins.mean(0).abs() / margins.std(0))


class FlipRate(Difference):
    """Change of the share of seeds that disagree with the majority, for a margin that decides by its sign."""

    name, formula, unit = "flip rate", "Phi(-|mean Y| / std Y) - Phi(-|mean X| / std X)", "share of the seeds"
    meaning = "change of the share of seeds whose {measurement} has the sign of the minority"
    least_runs = 2

    def __call__(self, baseline: Tensor, predicted: Tensor) -> Tensor:
        """Return the change along the first dimension."""
        return flip_rate(predicted) - flip_rate(baseline)


def steadying(attribution: Attribution, k: int) -> list[int]:
    """Choose k rows one by one, each with the lowest predicted mean flip rate over the queries, given those before."""
    trusted = attribution.trusted()
    samples, responses = trusted.baseline.double(), torch.as_tensor(trusted.responses[:]).double()
    chosen: list[int] = []
    for _ in range(k):
        rates = flip_rate(samples[..., None] + responses).mean(0)
        rates[chosen] = torch.inf
        chosen.append(int(rates.argmin()))
        samples = samples + responses[..., chosen[-1]]
    return chosen


def steadying_by_the_mean(attribution: Attribution, k: int) -> list[int]:
    """Choose k rows whose removal moves mean margins most towards the majority's side, in standard deviations."""
    samples = attribution.trusted().baseline.double()
    side = samples.mean(0).sign() / samples.std(0)
    return (attribution.influence("mean") * side[:, None]).mean(0).argsort(descending=True)[:k].tolist()
