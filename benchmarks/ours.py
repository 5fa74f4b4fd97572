"""Responses by our estimators, for the comparisons, which run this file in a separate process.

    python -m benchmarks.ours --method unrolled --problem concrete --data concrete.txt --runs runs/concrete \
        --output scores.safetensors

The output has ``scores``, the responses ``(runs, queries, examples)``, and ``baseline`` ``(runs, queries)``. Prints
JSON, like ``peers.py`` for the other packages.
"""

import argparse
import logging
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset

from benchmarks.concrete_truth import QUERIES, RATE, WIDTH, concrete
from benchmarks.problems import NETS, parts
from benchmarks.side_by_side import account
from examples.concrete.concrete import ConcreteRegressor
from lightning_dtda import Ensemble, UnrolledDifferentiation, attribute, estimators
from lightning_dtda.estimators import Estimator


class NetModule(pl.LightningModule):
    """Trains a network of ``problems.py``.

    Args:
        net: Name of the network.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        self.net, self.network = net, NETS[net]()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy."""
        return functional.cross_entropy(self.network(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for the GPT, and SGD with momentum otherwise."""
        if self.net == "gpt":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def influence(curvature: str, **settings: object) -> Estimator:
    """Return influence functions with a curvature of ``lightning_dtda.estimators``."""
    return estimators.InfluenceFunctions(curvature=getattr(estimators, curvature)(**settings))


def source(segments: int, curvature: str = "GaussNewton") -> Estimator:
    """Return approximate unrolling with a curvature of ``lightning_dtda.estimators``."""
    return estimators.Source(segments, curvature=getattr(estimators, curvature)())


# functions, called only in the process that needs the result
METHODS: dict[str, Callable[[], Estimator]] = {
    "gram": lambda: influence("GaussNewton"),
    "gram-3e-2": lambda: influence("GaussNewton", damping=3e-2),
    "gram-1e-1": lambda: influence("GaussNewton", damping=1e-1),
    "cg-10": lambda: influence("GaussNewton", solver="cg", damping=1e-1, iterations=10),
    "cg-20": lambda: influence("GaussNewton", solver="cg", iterations=20),
    "cg-12": lambda: influence("GaussNewton", solver="cg", damping=3e-2, iterations=12),
    "cg-ekfac-6": lambda: influence("GaussNewton", solver="cg", iterations=6, preconditioner=estimators.EKFAC()),
    "hessian-cg-10": lambda: influence("Hessian", solver="cg", iterations=10),
    "hessian-cg-10-1e-2": lambda: influence("Hessian", solver="cg", damping=1e-2, iterations=10),
    "identity": lambda: influence("Identity"),
    "ekfac": lambda: influence("EKFAC"),
    "ekfac-1e-4": lambda: influence("EKFAC", damping=1e-4),
    "ekfac-one-sample": lambda: influence("EKFAC", samples=1, rescale=False),
    "source-1": lambda: source(1),
    "source-3": lambda: source(3),
    "source-6": lambda: source(6),
    "source-ekfac-1": lambda: source(1, "EKFAC"),
    "source-ekfac-3": lambda: source(3, "EKFAC"),
    "source-ekfac-6": lambda: source(6, "EKFAC"),
    "unrolled": lambda: UnrolledDifferentiation(horizon=None),
}


def asked(problem: str, path: str | None) -> dict[str, Any]:
    """Return the module, the data, the queries and the measurement of a problem."""
    if problem == "concrete":
        data = concrete(path)
        queries = Subset(data.validation, range(QUERIES))
        module = ConcreteRegressor(WIDTH, RATE)
        return {"module": module, "data": data.train, "queries": queries, "measurement": "prediction"}
    train, queries = parts(problem)
    return {"module": NetModule(problem), "data": train, "queries": queries, "measurement": "loss"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--problem", required=True, choices=("concrete", *NETS))
    parser.add_argument("--data", help="the table of the concrete problem as text")
    parser.add_argument("--runs", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning_dtda", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def answer(runs: int | None) -> None:
        ensemble, estimator = Ensemble.open(options.runs)[:runs], METHODS[options.method]()
        found = attribute(ensemble, **asked(options.problem, options.data), estimator=estimator, progress=False)
        scores = {"scores": found.responses.float().contiguous(), "baseline": found.baseline.contiguous()}
        save_file(scores, options.output)

    answer(1)
    account(lambda: answer(None))


if __name__ == "__main__":
    main()
