"""What is said about silence, numbers of runs and left-out runs, held against simulated ensembles of known effects.

    python benchmarks/power.py

prints the tables of ``docs/statistics.md`` ("How many seeds") and ``docs/trust.md`` ("Chaotic runs") in a few minutes.
In a simulated ensemble, measurements X have a standard deviation of one, and the responses of every example are its
effect plus noise. Gaussian, Student's t with 5 degrees of freedom, and exponential noise are scaled to mean zero and
variance one.
"""

import argparse
import math

import torch
from scipy import special, stats

from lightning_dtda.attribution.trust import chaotic
from lightning_dtda.reporting.certainty import FDR, NEGLIGIBLE, PLANNING, POWER
from lightning_dtda.statistics import Mean, Spread
from lightning_dtda.statistics.power import (
    detectable,
    retrainings_needed,
    runs_for_significance,
    runs_to_detect,
)
from lightning_dtda.statistics.significance import discoveries, without_effect

RUNS = (8, 20, 64)
EXAMPLES = 200
ALPHA, LEVEL = FDR, PLANNING
EFFECTS = (0.3, 0.6, 1.2)
SHAPES = ("Gaussian", "Student's t", "exponential")


def noise(shape, generator, *size):
    """Return samples of a shape, with mean zero and variance one."""
    normal = torch.randn(*size, generator=generator, dtype=torch.float64)
    if shape == "exponential":
        return -torch.special.ndtr(normal).log() - 1
    if shape == "Student's t":
        wild = torch.randn(5, *size, generator=generator, dtype=torch.float64).square().mean(0).sqrt()
        return normal / wild * math.sqrt(3 / 5)
    return normal


def trusted_runs(ensembles, generator):
    """Yield the average of healthy runs that remains, and the share of chaotic ones found, by number of runs."""
    healthy = {f"log-normal, sigma {sigma}": lambda z, s=sigma: (s * z).exp() for sigma in (0.5, 1.0, 1.5)}
    healthy |= {"Gaussian": torch.abs, "exponential": lambda z: -torch.special.ndtr(z).log()}
    for name, sizes in healthy.items():
        row = []
        for runs in RUNS:
            kept = everything = 0.0
            for sample in sizes(torch.randn(ensembles, runs, generator=generator, dtype=torch.float64)):
                norms = dict(enumerate(sample.tolist()))
                trusted = norms.keys() - set(chaotic(norms))
                kept += sum(norms[run] for run in trusted) / len(trusted)
                everything += float(sample.mean())
            row.append(f"{kept / everything:.3f}")
        yield name, row
    for times in (10, 30, 100):
        row = []
        for runs in RUNS:
            found = number = 0
            for _ in range(ensembles):
                wild = torch.rand(runs, generator=generator) < 0.1
                z = torch.randn(2, runs, generator=generator)
                sample = (0.3 * z[0]).exp() * torch.where(wild, times * (0.5 * z[1]).exp(), 1)
                named = chaotic(dict(enumerate(sample.tolist())))
                found, number = found + sum(bool(wild[run]) for run in named), number + int(wild.sum())
            row.append(f"{found / number:.2f}")
        yield f"share found of chaotic runs, {times} times as large", row


def silence(ensembles):
    """Yield how many examples are said to have no effect, rightly and wrongly, by size of the responses' noise.

    In the first column of each number of runs no example has an effect. In the second, a tenth of the examples, or the
    only one, has an effect of a tenth of the standard deviation of X: the smallest that "no effect" must exclude. It is
    the average share of such examples among those said to have none.
    """
    for shape in SHAPES:
        for examples in (1, EXAMPLES):
            for spread in (0.05, 0.1, 0.2):
                row = []
                for runs in RUNS:
                    for share in (0.0, 0.1):
                        said = _no_effect(shape, max(int(share * examples), int(share > 0)), spread, runs, examples)
                        shares = [next(said) for _ in range(ensembles)]
                        row.append(f"{sum(shares) / ensembles:.3f}" if share else f"{sum(shares) / ensembles:.2f}")
                yield f"{shape}, {examples}, {spread}", row


def _no_effect(shape, number, spread, runs, examples):
    """Yield the share of examples, or if a number of them have an effect, of these, that are said to have none."""
    generator = torch.Generator().manual_seed(0)
    while True:
        x = noise(shape, generator, runs, 1)
        responses = spread * noise(shape, generator, runs, examples)
        responses[:, :number] += NEGLIGIBLE
        found = discoveries(Mean().p_values(x, x + responses), FDR)
        estimates, errors = responses.mean(0), responses.std(0) / runs**0.5
        said = without_effect(estimates, errors, runs - 1, NEGLIGIBLE * float(x.std()), found, FDR)
        yield float(said[:number].sum() / said.sum().clamp_min(1)) if number else float(said.double().mean())


def missed(generator):
    """Yield how often an effect as large as the smallest that is said to be found is found, by number of runs."""
    for shape in SHAPES:
        row = []
        for runs in RUNS:
            alpha = ALPHA / EXAMPLES
            effect = detectable(runs - 1, alpha, POWER) / runs**0.5
            responses = effect + noise(shape, generator, runs, 20_000)
            p = Mean().p_values(torch.zeros(runs, 1, dtype=torch.float64), responses)
            row.append(f"{float((p <= alpha).double().mean()):.2f}")
        yield shape, row


def runs_needed(ensembles, generator):
    """Yield how often ranges of numbers of runs hold, for a chosen example and for the clearest of all."""
    alpha = ALPHA / EXAMPLES
    for shape in SHAPES:
        for runs in RUNS:
            row = []
            for effect in EFFECTS:
                p = _p_of_responses(effect + noise(shape, generator, runs, 20 * ensembles))
                low, middle, high = runs_for_significance(Mean(), p, runs, alpha, POWER, LEVEL)
                right = runs_to_detect(torch.tensor(effect, dtype=torch.float64), alpha, POWER)
                holds = ((low <= right) & (right <= high)).double().mean()
                ends = ", ".join(_count(each.median()) for each in (low, middle, high))
                row.append(f"{holds:.2f} ({ends}; {right:.0f})")
            held = 0
            for _ in range(ensembles):
                effects = torch.zeros(EXAMPLES, dtype=torch.float64)
                effects[:20] = 0.6 * torch.randn(20, generator=generator, dtype=torch.float64)
                p = _p_of_responses(effects + noise(shape, generator, runs, EXAMPLES))
                level = 1 - (1 - LEVEL) / EXAMPLES
                low, _, high = runs_for_significance(Mean(), p.amin(), runs, alpha, POWER, level)
                held += bool(low <= runs_to_detect(effects[p.argmin()], alpha, POWER) <= high)
            yield f"{shape}, {runs}", [*row, f"{held / ensembles:.2f}"]


def _p_of_responses(responses):
    return Mean().p_values(torch.zeros_like(responses[:, :1]), responses)


def retrainings(ensembles, generator):
    """Yield ranges of numbers of retrainings, the right number, and how often the ranges hold.

    Y is 0.6 X plus noise of 0.3, shifted by 0.6. The right number is the first with which simulated experiments of new
    seeds have the wanted power.
    """
    for difference in (Mean(), Spread()):
        for shape in SHAPES:
            right = _right(difference, shape, generator)
            for runs in RUNS:
                x, rest = noise(shape, generator, 2, runs, 10 * ensembles)
                low, middle, high = retrainings_needed(difference, x, _without(x, rest), POWER, ALPHA, LEVEL)
                holds = ((low <= right) & (right <= high)).double().mean()
                ends = (_count(each.median()) for each in (low, middle, high))
                yield f"{difference.name}, {shape}, {runs}", [*ends, f"{right}", f"{holds:.2f}"]


def _without(x, rest):
    return 0.6 * x + 0.3 * rest + 0.6


def _right(difference, shape, generator):
    """Return the smallest number of retrainings at which an experiment has the wanted power, to 2 %."""
    few, enough = 2, 4
    while _power(difference, shape, enough, generator) < POWER:
        few, enough = enough, 2 * enough
    while enough - few > max(1, enough // 50):
        middle = (few + enough) // 2
        if _power(difference, shape, middle, generator) < POWER:
            few = middle
        else:
            enough = middle
    return enough


def _power(difference, shape, number, generator, experiments=4000):
    """Return how often Welch's test tells Y of some seeds from X of others."""
    x, again, rest = noise(shape, generator, 3, number, experiments)
    y = _without(again, rest)
    if difference.name == "mean":
        return float((stats.ttest_ind(x, y, equal_var=False).pvalue < ALPHA).mean())
    (of_x, error_x), (of_y, error_y) = _log_spread(x), _log_spread(y)
    t = (of_y - of_x).abs() / (error_x + error_y).sqrt()
    freedom = (number - 1) * (error_x + error_y).square() / (error_x.square() + error_y.square())
    return float((2 * special.stdtr(freedom.numpy(), -t.numpy()) < ALPHA).mean())


def _log_spread(samples):
    """Return the logarithm of the standard deviation, and its squared standard error by the jackknife."""
    runs, squares = len(samples), (samples - samples.mean(0)).square()
    others = (squares.sum(0) - squares * runs / (runs - 1)) / (runs - 2)
    without = others.log() / 2
    error = (without - without.mean(0)).square().sum(0) * (runs - 1) / runs
    return samples.std(0).log(), error


def _count(value):
    return f"{float(value):.0f}" if math.isfinite(value) else "∞"


def table(head, rows):
    """Print a table in Markdown as its rows are computed."""
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, cells in rows:
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the ensembles, to see that it runs")
    options = parser.parse_args()
    many = 20 if options.quick else 1000
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    numbers = [f"{runs} runs" for runs in RUNS]
    table(["average over trusted runs, as a share of all", *numbers], trusted_runs(many, generator))
    table(["share found of effects said to be found in 80 %", *numbers], missed(generator))
    said = [column for runs in RUNS for column in (f"{runs} runs: rightly", "wrongly")]
    table(['"no effect" is said: responses, examples, noise', *said], silence(many))
    ends = "holds (low, estimate, high; right)"
    head = [f"runs for significance of an effect of {effect}: {ends}" for effect in EFFECTS]
    table(["responses, runs", *head, "of the clearest: holds"], runs_needed(many, generator))
    table(["retrainings", "low", "estimate", "high", "right", "holds"], retrainings(many // 10, generator))


if __name__ == "__main__":
    main()
