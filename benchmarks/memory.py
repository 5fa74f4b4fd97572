"""Peak memory of the estimators on 10,000 images with a convolutional network of half a million parameters.

    python benchmarks/memory.py

Each estimator attributes one run in a separate process, with its default memory budget. Solvers do a single iteration,
as all iterations need the same memory. The images are random, as their content does not affect memory.
"""

import argparse
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, attribute
from lightning_dtda.estimators import (
    EKFAC,
    TRAK,
    Diagonal,
    Estimator,
    GaussNewton,
    GradientCosine,
    GradientDot,
    Hessian,
    Identity,
    Source,
    TracIn,
)

EXAMPLES, QUERIES = 10_000, 5

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    'GaussNewton("cg")': lambda: InfluenceFunctions(GaussNewton("cg", damping=0.1, iterations=1)),
    'Hessian("cg")': lambda: InfluenceFunctions(Hessian("cg", damping=0.1, iterations=1)),
    'Hessian("lissa")': lambda: InfluenceFunctions(Hessian("lissa", damping=0.1, iterations=1, batch_size=256)),
    "EKFAC": lambda: InfluenceFunctions(EKFAC(samples=1)),
    "Diagonal": lambda: InfluenceFunctions(Diagonal()),
    "Identity": lambda: InfluenceFunctions(Identity()),
    "GradientDot": GradientDot,
    "GradientCosine": GradientCosine,
    "TracIn": TracIn,
    "TRAK": TRAK,
    # Gauss-Newton with the Gram matrix is for tens of thousands of outputs; here there are a hundred thousand
    "Source(EKFAC)": lambda: Source(curvature=EKFAC(samples=1)),
}


class Classifier(pl.LightningModule):
    """Two convolutions and two linear layers, about 500,000 parameters."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(800, 600), nn.ReLU(), nn.Linear(600, 10),
        )  # fmt: skip

    def forward(self, images):
        """Return class scores."""
        return self.network(images)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


def images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 1, 28, 28, generator=generator), labels)


def record(root: Path) -> None:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[TrajectoryRecorder(root, gradients="none")],
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(images(EXAMPLES, 0), 64, shuffle=True))


def trial(name: str, root: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning_dtda").setLevel(logging.ERROR)
    ensemble, data = Ensemble.open(root), images(EXAMPLES, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    estimator = ESTIMATORS[name]()
    arguments = {"queries": images(QUERIES, 1), "measurement": "margin", "progress": False}
    parameters = ensemble[0].layout.size
    attribute(ensemble, Classifier(), data, estimator=estimator, **arguments)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {name} | {peak / 2**20:.2f} | {before / 2**20:.2f} | {parameters:,} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), choices=ESTIMATORS)
    options = parser.parse_args()
    print(
        "| estimator | peak GiB | of these libraries and data | parameters | seconds |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as root:
        for target, arguments in [(record, (Path(root),)), *((trial, (name, Path(root))) for name in options.only)]:
            process = get_context("spawn").Process(target=target, args=arguments)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
