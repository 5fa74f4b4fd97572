"""Cost of the reverse sweep for each optimizer relative to plain SGD: an 8-64-64-1 network, 20 runs, 20 queries.

    python benchmarks/optimizers.py

The same network is trained with each optimizer in turn and attributed, in several rounds in one process. Prints the
median, smallest and largest ratio to plain SGD in the same round.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute

EXAMPLES, FEATURES, QUERIES = 927, 8, 20

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters),
    "RAdam": lambda parameters: torch.optim.RAdam(parameters),
    "Adamax": lambda parameters: torch.optim.Adamax(parameters),
    "Adadelta": lambda parameters: torch.optim.Adadelta(parameters),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters),
}


class Regressor(pl.LightningModule):
    """A network trained on the squared error with a given optimizer."""

    def __init__(self, optimizer="SGD"):
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)
        )

    def forward(self, inputs):
        """Predict ``(B,)``."""
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        """Mean squared error."""
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return the optimizer."""
        return OPTIMIZERS[self.optimizer](self.parameters())


def record(name, root, data, runs, steps):
    """Record the runs of an optimizer."""
    for seed in range(runs):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TrajectoryRecorder(root)],
        )
        trainer.fit(Regressor(name), DataLoader(data, 32, shuffle=True))
    return Ensemble.open(root)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning_dtda"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=generator)
    data = TensorDataset(inputs, inputs.sin().sum(1))
    queries = TensorDataset(*data[:QUERIES])
    with tempfile.TemporaryDirectory() as directory:
        ensembles = {
            name: record(name, Path(directory) / str(number), data, options.runs, options.steps)
            for number, name in enumerate(OPTIMIZERS)
        }
        estimator = UnrolledDifferentiation(horizon=None, runs_per_batch=options.runs)
        seconds = {name: [] for name in OPTIMIZERS}
        for _ in range(options.repeats + 1):  # the first round warms up
            for name, ensemble in ensembles.items():
                start = time.perf_counter()
                attribute(ensemble, Regressor(name), data, queries=queries, estimator=estimator, progress=False)
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times[1:], seconds["SGD"][1:], strict=True)]
        milliseconds = 1000 * statistics.median(times[1:]) / options.steps
        print(
            f"{name:14} {milliseconds:6.1f} ms a step   {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main()
