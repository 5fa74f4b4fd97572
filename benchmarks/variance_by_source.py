"""What is said about the parts of the variance, held against simulated crossed ensembles of known parts.

    python benchmarks/variance_by_source.py

prints the tables of ``docs/sources.md`` in a quarter of an hour. Measurements are sums of effects of
the initialisation, of the order, and of both together, with given standard deviations. Gaussian, Student's t with 5
degrees of freedom, and exponential effects are scaled to mean zero and variance one. In the tests, an example is
removed that changes every run's measurement: its effects afterwards correlate with those before by 0.95. Last come
tests of the mean.
"""

import argparse

import torch

from benchmarks.power import SHAPES, noise
from lightning_dtda.statistics import Mean, SourceVariance
from lightning_dtda.statistics.variance_components import Crossed, component_intervals

GRIDS = ((5, 4), (8, 8), (16, 16))
GRIDS_OF_THE_MEAN = ((4, 4), (4, 8), (4, 16), (8, 8))
PARTS = ((1.0, 1.0, 0.5), (0.3, 1.0, 1.0), (0.0, 1.0, 1.0))
"""Standard deviations of the effects of initialisation, order and rest."""

PARTS_OF_THE_MEAN = ((1.0, 1.0, 0.5), (0.3, 1.0, 1.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.3))
PERSISTENCE = 0.95
LEVEL = 0.05


def crossed_seeds(rows, columns):
    """Return the seeds of a grid, as of the runs of an ensemble."""
    runs = range(rows * columns)
    return {"initialisation": [run % rows for run in runs], "order": [run // rows for run in runs]}


def measurements(effects, deviations):
    """Return samples ``(runs, ensembles)`` from effects of initialisation, order and both."""
    scaled = [deviation * effect for deviation, effect in zip(deviations, effects, strict=True)]
    return (scaled[0][None] + scaled[1][:, None] + scaled[2]).flatten(0, 1)


def draw(shape, generator, rows, columns, ensembles):
    """Return effects ``(rows, ensembles)``, ``(columns, ensembles)`` and ``(columns, rows, ensembles)``."""
    sizes = ((rows,), (columns,), (columns, rows))
    return [noise(shape, generator, *size, ensembles) for size in sizes]


def later(effects, shape, generator):
    """Return effects of the same distribution that correlate with the first."""
    fresh = [noise(shape, generator, *effect.shape) for effect in effects]
    return [PERSISTENCE * e + (1 - PERSISTENCE**2) ** 0.5 * f for e, f in zip(effects, fresh, strict=True)]


def coverage(shape, grid, deviations, ensembles):
    """Return the share of 95 % intervals of the initialisation's part that hold it."""
    generator = torch.Generator().manual_seed(0)
    crossed = Crossed.of(crossed_seeds(*grid))
    held = []
    for part in torch.arange(ensembles).split(200):
        samples = measurements(draw(shape, generator, *grid, len(part)), deviations)
        low, high = component_intervals(crossed, samples)[:, 0]
        held.append((low <= deviations[0] ** 2) & (deviations[0] ** 2 <= high))
    return float(torch.cat(held).double().mean())


def found(shape, grid, deviations, factors, ensembles):
    """Return the share of tests at 5 % of the initialisation's part that find a change.

    ``factors`` multiply the effects when the example is removed.
    """
    generator = torch.Generator().manual_seed(1)
    test = SourceVariance("initialisation").of_runs(crossed_seeds(*grid))
    before = draw(shape, generator, *grid, ensembles)
    after = later(before, shape, generator)
    scaled = [factor * deviation for factor, deviation in zip(factors, deviations, strict=True)]
    p = test.p_values(measurements(before, deviations), measurements(after, scaled))
    return float((p < LEVEL).double().mean())


def of_the_mean(shape, grid, deviations, ensembles):
    """Return the share of tests that find a mean where there is none, the same of those that share no seed, and errors.

    The last is the standard error relative to that of the runs that share no seed.
    """
    generator = torch.Generator().manual_seed(2)
    seeds = crossed_seeds(*grid)
    test, alone = Mean().of_runs(seeds), [n * (grid[0] + 1) for n in range(min(grid))]  # no two share a seed
    found, without, errors = [], [], []
    for part in torch.arange(ensembles).split(500):
        samples = measurements(draw(shape, generator, *grid, len(part)), deviations)
        zero = torch.zeros_like(samples)
        found.append(test.p_values(zero, samples) < LEVEL)
        without.append(Mean().p_values(zero[alone], samples[alone]) < LEVEL)
        both = test.standard_error(zero, samples), Mean().standard_error(zero[alone], samples[alone])
        errors.append(torch.stack(both).square())
    crossed, independent = torch.cat(errors, 1).mean(1).sqrt()
    return *(float(torch.cat(each).double().mean()) for each in (found, without)), float(crossed / independent)


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Fewer ensembles.")
    ensembles = 200 if parser.parse_args().quick else 4000
    torch.set_num_threads(1)
    print("| effects | SD of initialisation, order, rest | " + " | ".join(f"{r} x {c} runs" for r, c in GRIDS) + " |")
    print("|---|---|" + "---|" * len(GRIDS))
    for shape in SHAPES:
        for deviations in PARTS:
            row = [f"{coverage(shape, grid, deviations, ensembles):.3f}" for grid in GRIDS]
            print(f"| {shape} | {', '.join(f'{d:g}' for d in deviations)} | " + " | ".join(row) + " |", flush=True)
    cases = {"no change": (1.0, 1.0, 1.0), "others +40 %": (1.0, 1.4, 1.4), "its own +40 %": (1.4, 1.0, 1.0)}
    print("\n| effects | SD of initialisation, order, rest | change of SD | ", end="")
    print(" | ".join(f"{r} x {c} runs" for r, c in GRIDS) + " |\n|---|---|---|" + "---|" * len(GRIDS))
    for shape in SHAPES:
        for deviations in PARTS:
            for name, factors in cases.items():
                row = [f"{found(shape, grid, deviations, factors, ensembles):.3f}" for grid in GRIDS]
                said = f"| {shape} | {', '.join(f'{d:g}' for d in deviations)} | {name} | "
                print(said + " | ".join(row) + " |", flush=True)
    print("\nTests of the mean at 5 %; the same of runs that share no seed; ratio of the standard errors\n")
    print("| effects | SD of initialisation, order, rest | ", end="")
    print(
        " | ".join(f"{r} x {c} runs" for r, c in GRIDS_OF_THE_MEAN) + " |\n|---|---|" + "---|" * len(GRIDS_OF_THE_MEAN)
    )
    for shape in SHAPES:
        for deviations in PARTS_OF_THE_MEAN:
            row = [
                "{:.3f}, {:.3f}, {:.2f}".format(*of_the_mean(shape, g, deviations, ensembles))
                for g in GRIDS_OF_THE_MEAN
            ]
            print(f"| {shape} | {', '.join(f'{d:g}' for d in deviations)} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
