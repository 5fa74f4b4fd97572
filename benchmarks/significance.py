"""How often intervals hold the truth, and how often tests find an effect or a chance.

    OMP_NUM_THREADS=1 python benchmarks/significance.py

Four tables for ``docs/statistics.md``, from simulated ensembles of seeds. With ``--ensemble PATH``, the first one also
for a stored attribution of hundreds of runs: disjoint sets of its runs, with all others as the truth.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_dtda import Attribution
from lightning_dtda.statistics import Difference, Mean, Quantile, Spread, Variance, Wasserstein
from lightning_dtda.statistics.significance import discoveries

RUNS = (8, 20, 64)
LEVEL = 0.95
EXAMPLES = 200
"""Number of tests that are made together."""

LARGE = 400_000
"""Size of the samples that stand for the distribution itself."""


class Simulated:
    """Samples of mean 0 and variance 1."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Return Gaussian samples."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, shape: str, *size: int) -> Tensor:
        """Return samples of a shape."""
        normal = self.normal(*size)
        if shape == "exponential":
            return -torch.special.log_ndtr(normal) - 1
        if shape == "log-normal":
            variance = torch.tensor(0.64, dtype=torch.float64).exp()
            return ((0.8 * normal).exp() - variance.sqrt()) / (variance * (variance - 1)).sqrt()
        if shape == "t5":
            return normal * (3 / self.normal(5, *size).square().sum(0)).sqrt()
        return normal


SHAPES = ("Gaussian", "t5", "exponential", "log-normal")

CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "less spread": lambda x, noise: 0.6 * x + 0.2 * noise + 0.5,
    "more spread": lambda x, noise: x + 0.2 * noise + 0.1,
}
"""Y from X and Gaussian noise."""

DIFFERENCES: tuple[Difference, ...] = (Mean(), Spread(), Wasserstein(), Quantile(0.5), Quantile(0.9))


def coverage(draws: int) -> Iterator[tuple[str, ...]]:
    """Yield how often intervals hold the truth, in the less favourable one of both changes."""
    yield ("interval of", *(f"{shape}, {LEVEL:.0%}" for shape in SHAPES))
    for difference in DIFFERENCES:
        cells = []
        for shape in SHAPES:
            held = []
            for runs in RUNS:
                if difference.no_interval(runs):
                    held.append("none")
                    continue
                shares = []
                for change in CHANGES.values():
                    draw = Simulated()
                    x = draw(shape, LARGE)
                    truth = difference(x, change(x, draw.normal(LARGE)))
                    x = draw(shape, runs, draws)
                    shares.append(_held(difference.interval(x, change(x, draw.normal(runs, draws)), LEVEL), truth))
                held.append(f"{min(shares):.2f}")
            cells.append(" / ".join(held))
        yield difference.name, *cells


def coverage_of_ensemble(attribution: Attribution) -> Iterator[tuple[str, ...]]:
    """Yield how often intervals from disjoint sets of runs hold the difference over all other runs."""
    runs, queries, removals = attribution.responses.shape
    x = attribution.baseline[..., None].double()
    y = x + attribution.responses.double()
    yield ("interval of", f"{queries} queries, {removals} removals, {runs} runs")
    for difference in DIFFERENCES:
        cells = []
        for size in RUNS:
            if difference.no_interval(size):
                cells.append("none")
                continue
            shares = []
            for start in range(0, runs - size + 1, size):
                others = torch.tensor([run for run in range(runs) if not start <= run < start + size])
                part = slice(start, start + size)
                truth = difference(x[others], y[others])
                shares.append(_held(difference.interval(x[part].expand_as(y[part]), y[part], LEVEL), truth))
            cells.append(f"{sum(shares) / len(shares):.2f}")
        yield difference.name, " / ".join(cells)


def _held(ends: Tensor, truth: Tensor) -> float:
    return float(((ends[0] <= truth) & (truth <= ends[1])).double().mean())


def size_and_power(draws: int) -> Iterator[tuple[str, ...]]:
    """Yield the share of p-values of the spread below 0.05 without an effect, and with a 40 % smaller spread."""
    shifts = (0.0, 1.0, 3.0)
    yield ("X", "no effect", *(f"standard deviation 40 % smaller, mean + {shift:g}" for shift in shifts))
    for shape in SHAPES:
        rows: list[list[str]] = [[] for _ in range(1 + len(shifts))]
        for runs in RUNS:
            draw = Simulated()
            x, noise = draw(shape, runs, draws), draw.normal(runs, draws)
            of_null = [0.9 * x + 0.19**0.5 * noise]
            for row, y in zip(rows, of_null + [0.6 * x + 0.05 * noise + shift for shift in shifts], strict=True):
                row.append(f"{float((Spread().p_values(x, y) < 0.05).double().mean()):.2f}")
        yield shape, *(" / ".join(row) for row in rows)


def _of_no_effect(kind: str, runs: int, ensembles: int) -> tuple[Tensor, Tensor]:
    """Return X ``(runs, ensembles, 1)`` and Y ``(runs, ensembles, examples)`` with the same mean and variance."""
    draw = Simulated()
    size = runs, ensembles, EXAMPLES
    if kind == "Gaussian X, log-normal responses":
        return (x := draw.normal(runs, ensembles, 1)), 0.9 * x + 0.19**0.5 * draw("log-normal", *size)
    if kind == "log-normal X, Gaussian responses":
        return (x := draw("log-normal", runs, ensembles, 1)), 0.9 * x + 0.19**0.5 * draw.normal(*size)
    if kind == "exponential X and responses":
        return (x := draw("exponential", runs, ensembles, 1)), 0.95 * x + 0.0975**0.5 * draw("exponential", *size)
    x, y = draw.normal(runs, ensembles, 1), draw.normal(*size)
    y = 0.95 * x + 0.0975**0.5 * y
    if kind == "t3, responses in proportion":
        wild = (3 / draw.normal(3, runs, ensembles, 1).square().sum(0)).sqrt()
        return wild * x, wild * y
    return (x.exp(), y.exp()) if kind == "log-normal, responses in proportion" else (x, y)


KINDS = (
    "Gaussian",
    "t3, responses in proportion",
    "log-normal, responses in proportion",
    "exponential X and responses",
    "log-normal X, Gaussian responses",
    "Gaussian X, log-normal responses",
)


def chance(ensembles: int) -> Iterator[tuple[str, ...]]:
    """Yield the share of ensembles in which at least one of the examples is significant, though none has an effect."""
    yield ("no example has an effect", "mean", "spread", "Wasserstein")
    for kind in KINDS:
        rows: list[list[str]] = [[], [], []]
        for runs in RUNS:
            x, y = _of_no_effect(kind, runs, ensembles)
            for row, difference in zip(rows, (Mean(), Spread(), Wasserstein()), strict=True):
                row.append(f"{float(discoveries(difference.p_values(x, y), 0.05).any(1).double().mean()):.2f}")
        yield kind, *(" / ".join(row) for row in rows)


def false_discoveries(ensembles: int) -> Iterator[tuple[str, ...]]:
    """Yield the mean share of false ones among the significant examples, and of true ones found, if a tenth is true."""
    yield ("a tenth of the examples changes mean and spread by 40 %", "mean", "spread")
    true = torch.arange(EXAMPLES) < EXAMPLES // 10
    for kind in KINDS:
        rows: list[list[str]] = [[], []]
        for runs in RUNS:
            x, y = _of_no_effect(kind, runs, ensembles)
            y = torch.where(true, 0.6 * x + 0.1 * (y - x) + 0.4 * x.std(), y)
            for row, difference in zip(rows, (Mean(), Spread()), strict=True):
                found = discoveries(difference.p_values(x, y), 0.05)
                false = (found & ~true).sum(1) / found.sum(1).clamp_min(1)
                row.append(f"{float(false.mean()):.2f} ({float(found[:, true].double().mean()):.2f})")
        yield kind, *(" / ".join(row) for row in rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", help="Directory of an attribution of hundreds of runs.")
    parser.add_argument("--quick", action="store_true", help="Draw few, in seconds.")
    options = parser.parse_args()
    draws, ensembles = (50, 3) if options.quick else (1000, 100)
    tables = [coverage(draws), size_and_power(draws), chance(ensembles), false_discoveries(ensembles)]
    if options.ensemble:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables.append(coverage_of_ensemble(Attribution.load(options.ensemble)))
    print(f"Numbers of runs: {' / '.join(map(str, RUNS))}. The variance: {Variance().no_interval(RUNS[0])}")
    for table in tables:
        print()
        for number, row in enumerate(table):
            print(f"| {' | '.join(row)} |", flush=True)
            if number == 0:
                print("|---" * len(row) + "|")


if __name__ == "__main__":
    main()
