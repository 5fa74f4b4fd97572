"""Cost of a report on many queries: CPU seconds of its parts and of the whole, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/reports.py --runs 20 --queries 200 --examples 10000

On a made-up attribution: examples of very different size, a few of which move the mean or the spread by more than seed
noise does. The last rows are single methods of the attribution, which compute the same for all queries.
"""

import argparse
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_dtda import Attribution, report
from lightning_dtda.reporting.certainty import each_tested
from lightning_dtda.reporting.findings import find
from lightning_dtda.statistics.differences import SHOWN

CLEAR = 0.003
"""Share of the examples that move the mean, and of those that move the spread, more than the seeds do."""


def made_up(runs: int, queries: int, examples: int) -> Attribution:
    """Return an attribution with realistic influences: log-normal sizes, seed noise, and a few that stand out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def clear() -> torch.Tensor:
        return torch.rand(queries, examples, generator=generator) < CLEAR

    baseline = 0.2 * (1 + 0.5 * normal(runs, queries)).exp()
    size, shift = 0.002 * (1.2 * normal(queries, examples)).exp(), 0.3 * normal(queries, examples)
    shift, pulled = torch.where(clear(), 6 * shift + 4 * shift.sign(), shift), -0.15 * clear()
    responses = torch.empty(runs, queries, examples)
    for run, deviation in enumerate(baseline - baseline.mean(0)):
        responses[run] = size * (shift + normal(queries, examples)) + pulled * deviation[:, None]
    names = tuple(f"seed-{run:04d}" for run in range(runs))
    return Attribution(baseline, responses, names, tuple(range(queries)), {"measurement": "loss", "range": [0.0, None]})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("runs", 20), ("queries", 200), ("examples", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=size)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Influences of .* runs")
    attribution = made_up(options.runs, options.queries, options.examples)
    page = Path(tempfile.mkdtemp()) / "report.html"
    parts: dict[str, Callable[[], object]] = {
        f"tests of {', '.join(SHOWN)}": lambda: deque(each_tested(attribution, SHOWN), maxlen=0),
        "reliability of the mean": lambda: attribution.reliability("mean"),
        "findings": lambda: find(attribution),
        "findings, figures and page": lambda: report(attribution, page),
        "p_values of the spread": lambda: attribution.p_values("spread"),
        "interval of the spread": lambda: attribution.interval("spread"),
        "standard_error of Wasserstein": lambda: attribution.standard_error("wasserstein"),
        "top 10 by the spread": lambda: attribution.top(10, "spread"),
    }
    print("| part | CPU seconds |")
    print("|---|---|")
    for name, part in parts.items():
        started = time.process_time()
        part()
        print(f"| {name} | {time.process_time() - started:.1f} |", flush=True)
    print(f"\nThe page has {page.stat().st_size / 2**20:.1f} MiB.")


if __name__ == "__main__":
    main()
