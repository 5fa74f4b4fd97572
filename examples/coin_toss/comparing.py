"""Statistics of decisions before and after a removal, with intervals over seeds and cases."""

import torch
from scipy import stats
from torch import Tensor


def minority(right: Tensor) -> Tensor:
    """Return the flip rate of shares of right decisions."""
    return torch.minimum(right, 1 - right)


def statistics(before: Tensor, after: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return figures of each case ``(draws, cases)`` for weights of the seeds ``(draws, seeds)``, over several sets.

    Of flip rate and share that is right: before, and the change.

    For a Gaussian margin, "by the mean" and "by the spread" are the changes of the flip rate if only that had changed.
    """

    def moments(margins):
        mean = weights @ margins
        spread = (weights @ margins**2 - mean**2).clamp_min(1e-12).sqrt()
        return weights @ (margins > 0).double(), mean.abs(), spread

    def gaussian(mean, spread):
        return torch.special.ndtr(-mean / spread)

    right, mean, spread = moments(before)
    several = [moments(margins) for margins in after]

    def over_sets(value):
        return torch.stack([value(*each) for each in several]).mean(0)

    return {
        "before": minority(right),
        "accuracy before": right,
        "flip rate": over_sets(lambda r, m, s: minority(r)) - minority(right),
        "accuracy": over_sets(lambda r, m, s: r) - right,
        "by the mean": over_sets(lambda r, m, s: gaussian(m, spread)) - gaussian(mean, spread),
        "by the spread": over_sets(lambda r, m, s: gaussian(mean, s)) - gaussian(mean, spread),
    }


def resampled(folds: list[dict], step: int, name: str, which: str, draws: int = 1000) -> dict[str, Tensor]:
    """Return each statistic in the samples (first) and in bootstrap draws of seeds and cases ``(1 + draws,)``."""
    generator, parts = torch.Generator().manual_seed(0), []  # the same draws for all methods: differences are paired
    for fold in folds:
        seeds, cases = len(fold["before"]), fold[which]
        drawn = torch.randint(seeds, (draws, seeds), generator=generator)
        counts = torch.zeros(draws, seeds, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
        weights = torch.cat([torch.ones(1, seeds, dtype=torch.float64), counts]) / seeds
        after = fold["after"][name, fold["sizes"][step]]
        parts.append(statistics(fold["before"][:, cases], after[..., cases], weights))
        if which == "queries":
            parts[-1]["predicted"] = fold["predicted"][name, fold["sizes"][step]].expand(len(weights), -1)
    joined = {key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}
    cases = next(iter(joined.values())).shape[1]
    chosen = torch.cat([torch.arange(cases)[None], torch.randint(cases, (draws, cases), generator=generator)])
    return {key: values.gather(1, chosen).mean(1) for key, values in joined.items()}


def printed(results: dict[str, dict]) -> None:
    """Print rows of figures: those with an interval in percentage points."""
    for key, row in results.items():
        texts = []
        for name, value in row.items():
            if isinstance(value, tuple):
                estimate, low, high = (100 * part for part in value[:3])
                texts.append(f"{name} {estimate:+.1f} [{low:+.1f}, {high:+.1f}]")
            else:
                texts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
        print(f"{key}: {'; '.join(texts)}")


def interval(values: Tensor, cases: int) -> tuple[float, float, float, float]:
    """Return an estimate, its 95 % interval and p-value by Student's t with the bootstrap's standard error."""
    estimate, error = float(values[0]), float(values[1:].std().clamp_min(1e-12))
    half = stats.t.ppf(0.975, cases - 1) * error
    return estimate, estimate - half, estimate + half, float(2 * stats.t.sf(abs(estimate) / error, cases - 1))


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm, 1979)."""
    order, adjusted, largest = sorted(range(len(p_values)), key=p_values.__getitem__), [0.0] * len(p_values), 0.0
    for rank, n in enumerate(order):
        largest = adjusted[n] = max(largest, min(1.0, (len(p_values) - rank) * p_values[n]))
    return adjusted
