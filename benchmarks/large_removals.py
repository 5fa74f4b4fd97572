"""Removals of a tenth: how good are linear predictions, and predictions on other scales, against exact removal?

    python -m benchmarks.large_removals --output large-removals

Two small trainings on scikit-learn's data: the demo's regression (squared error) and a classifier of digits
(cross-entropy, and the probability of the label). For each of 20 random tenths of the training data, every recorded run
is repeated without it (``ExactRemoval``). Prints, for each scale and difference, the rank correlation of predicted with
exact influences over the tenths (mean over queries), the slope of exact on predicted ones (1: the predictions have the
right size), and the share of predictions out of range; and the CPU time of both. Another call continues.
"""

import argparse
import logging
import time
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, attribute, record
from lightning_dtda.demo.diabetes import DiabetesData, DiabetesRegressor
from lightning_dtda.estimators import ExactRemoval
from lightning_dtda.statistics.correlation import correlations
from lightning_dtda.statistics.differences import PAPERS

RUNS, TENTHS = 16, 20


class Digits(pl.LightningDataModule):
    """500 images to train on, the others for validation."""

    def setup(self, stage: str) -> None:
        """Split the images, in the same way for every seed."""
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = torch.as_tensor(images / 16, dtype=torch.float32)[order], torch.as_tensor(labels)[order]
        self.train, self.validation = (
            TensorDataset(images[part], labels[part]) for part in (slice(500), slice(500, None))
        )

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches of equal size."""
        return DataLoader(self.train, 50, shuffle=True)


class Classifier(pl.LightningModule):
    """A 64-32-10 ReLU network, cross-entropy, SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return SGD with a constant learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


TASKS = {
    "diabetes": (DiabetesRegressor, DiabetesData, {"max_epochs": 50}, 20),
    "digits": (Classifier, Digits, {"max_steps": 200}, 60),
}


def answers(name: str, output: Path) -> tuple[Attribution, Attribution, list[list[int]]]:
    """Return the linear responses of the loss to all examples, its exact changes without the tenths, and the tenths."""
    make_module, make_data, limits, queries = TASKS[name]

    def make() -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **limits,
        )
        return trainer, make_module(), make_data()

    record(make, TrajectoryRecorder(output / "runs"), RUNS, stacked=True, progress=False)
    data = make_data()
    data.setup("fit")
    examples, generator = len(data.train), torch.Generator().manual_seed(1)
    tenths = [torch.randperm(examples, generator=generator)[: examples // 10].tolist() for _ in range(TENTHS)]
    asked = (Ensemble.open(output / "runs"), make_module(), data)
    question = {"queries": Subset(data.validation, range(queries)), "progress": False}
    found = []
    for what, own in (("linear", {}), ("exact", {"removals": tenths, "estimator": ExactRemoval()})):
        started = time.process_time()
        found.append(attribute(*asked, **question, output=output / what, **own))
        print(f"{name}, {what}: {time.process_time() - started:.0f} CPU s", flush=True)
    return found[0], found[1], tenths


def probability(attribution: Attribution, exact: bool) -> Attribution:
    """Return the attribution of p = exp(-loss), from that of the loss."""
    loss, response = attribution.baseline.double(), attribution.responses[:].double()
    value = torch.exp(-loss)
    changed = torch.exp(-loss[..., None] - response) - value[..., None] if exact else -value[..., None] * response
    return replace(attribution, baseline=value, responses=changed, about={**attribution.about, "range": [0.0, 1.0]})


def compare(name: str, linear: Attribution, exact: Attribution, tenths: list[list[int]], scale: str) -> None:
    """Print a row of the table."""
    cells = []
    for difference in PAPERS:
        predicted = torch.stack([linear.influence(difference, removed=tenth) for tenth in tenths], -1)
        real = exact.influence(difference)
        slope = (predicted * real).sum() / predicted.square().sum()
        cells.append(f"{difference} {correlations(predicted, real).nanmean():.2f} ({slope:.2f})")
    outside = torch.stack([linear.out_of_range(tenth) for tenth in tenths]).mean()
    print(f"{name:24} {scale:8} {'   '.join(cells)}   out of range {outside:.1%}", flush=True)


def main() -> None:
    """Run both tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="a directory for runs and attributions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in TASKS:
        linear, exact, tenths = answers(name, options.output / name)
        for scale in ("linear", "sqrt"):
            compare(f"{name}, loss", linear.on_scale(scale), exact, tenths, scale)
        if name == "digits":
            linear, exact = probability(linear, exact=False), probability(exact, exact=True)
            for scale in ("linear", "logit"):
                compare(f"{name}, probability", linear.on_scale(scale), exact, tenths, scale)


if __name__ == "__main__":
    main()
