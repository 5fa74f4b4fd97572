"""Responses by our estimators, for ``influence_functions.py``, which runs this file in a process of its own.

    python -m benchmarks.ours --method unrolled --data concrete.txt --runs runs/concrete --output scores.safetensors

The output has ``scores``, the responses ``(runs, queries, examples)``, and ``baseline`` ``(runs, queries)``. What is
printed is JSON, as by ``peers.py`` for the others: wall seconds, reading and all runs included, imports and a first run
for warming up not; and memory.
"""

import argparse
import json
import logging
import resource
import time
import warnings
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch.utils.data import Subset

from benchmarks.concrete_truth import QUERIES, RATE, WIDTH, concrete
from examples.concrete.concrete import ConcreteRegressor
from lightning_dtda import Ensemble, UnrolledDifferentiation, attribute, estimators
from lightning_dtda.estimators import Estimator


def influence(curvature: str, **settings: object) -> Estimator:
    """Return influence functions with a curvature of ``lightning_dtda.estimators``."""
    return estimators.InfluenceFunctions(curvature=getattr(estimators, curvature)(**settings))


def source(segments: int, curvature: str = "GaussNewton") -> Estimator:
    """Return approximate unrolling with a curvature of ``lightning_dtda.estimators``."""
    return estimators.Source(segments, curvature=getattr(estimators, curvature)())


# called for their result only in the process that needs it
METHODS: dict[str, Callable[[], Estimator]] = {
    "gram": lambda: influence("GaussNewton"),
    "gram-3e-2": lambda: influence("GaussNewton", damping=3e-2),
    "gram-1e-1": lambda: influence("GaussNewton", damping=1e-1),
    "cg-20": lambda: influence("GaussNewton", solver="cg", iterations=20),
    "cg-12": lambda: influence("GaussNewton", solver="cg", damping=3e-2, iterations=12),
    "cg-ekfac-6": lambda: influence("GaussNewton", solver="cg", iterations=6, preconditioner=estimators.EKFAC()),
    "hessian-cg-10": lambda: influence("Hessian", solver="cg", iterations=10),
    "ekfac": lambda: influence("EKFAC"),
    "ekfac-1e-4": lambda: influence("EKFAC", damping=1e-4),
    "source-1": lambda: source(1),
    "source-3": lambda: source(3),
    "source-6": lambda: source(6),
    "source-ekfac-1": lambda: source(1, "EKFAC"),
    "source-ekfac-3": lambda: source(3, "EKFAC"),
    "source-ekfac-6": lambda: source(6, "EKFAC"),
    "unrolled": UnrolledDifferentiation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_dtda").setLevel(logging.ERROR)

    def answer(runs: int | None):
        data = concrete(options.data)
        return attribute(
            Ensemble.open(options.runs)[:runs],
            ConcreteRegressor(WIDTH, RATE),
            data.train,
            queries=Subset(data.validation, range(QUERIES)),
            measurement="prediction",
            estimator=METHODS[options.method](),
            progress=False,
        )

    answer(1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    attribution = answer(None)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = {"scores": attribution.responses.float().contiguous(), "baseline": attribution.baseline.contiguous()}
    save_file(scores, options.output)
    memory = {"peak MiB": peak / 1024, "after one run MiB": base / 1024}
    print("\n" + json.dumps({"seconds": seconds, "cpu": cpu} | memory))


if __name__ == "__main__":
    main()
