"""Make the ground truths of the benchmark: train thousands of networks without subsets of their data.

    python -m ground_truth.make --task concrete --data concrete.txt --work work
    python -m ground_truth.make --task mnist --work work

Another call continues where the first one stopped. On one core, concrete takes eight minutes and mnist four.
"""

import argparse
import json
import logging
import shutil
from pathlib import Path

import lightning.pytorch as pl
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from examples.concrete import evaluation as concrete
from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from ground_truth.benchmark import NAMES, checksum
from ground_truth.mnist import mnist
from ground_truth.mnist.mnist import MNISTClassifier, MNISTData
from lightning_dtda import GroundTruth, retrain
from lightning_dtda.retraining import random_subsets

HERE = Path(__file__).parent
MNIST_STEPS, MNIST_SUBSETS, MNIST_SEEDS, MNIST_BASELINE_SEEDS = 400, 32, 48, 96
FIRST_SEED = 1000
"""Predictions are of other seeds, from 0 on: they share no noise with the truth."""


def mnist_trainer(**settings) -> pl.Trainer:
    """Create a Trainer that only trains."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_steps=MNIST_STEPS, max_epochs=-1, accelerator="cpu", limit_val_batches=0, **quiet, **settings)


def train_concrete(data: ConcreteData, output: Path) -> GroundTruth:
    """Train without each of 40 random tenths of the rows, and on all of them."""
    return retrain(
        ConcreteRegressor,
        data,
        trainer=concrete.make_trainer,
        subsets=random_subsets(len(data.train), concrete.SUBSETS, concrete.KEPT),
        seeds=range(FIRST_SEED, FIRST_SEED + concrete.SEEDS),
        baseline_seeds=range(FIRST_SEED, FIRST_SEED + concrete.BASELINE_SEEDS),
        queries=Subset(data.validation, range(concrete.QUERIES)),
        measurement="prediction",
        stacked=True,
        output=output,
    )


def train_mnist(data: MNISTData, kept: float, output: Path) -> GroundTruth:
    """Train on random halves, or nine tenths, of the images, and on all of them."""
    return retrain(
        MNISTClassifier,
        data,
        trainer=mnist_trainer,
        subsets=random_subsets(mnist.EXAMPLES, MNIST_SUBSETS, kept),
        seeds=range(FIRST_SEED, FIRST_SEED + MNIST_SEEDS),
        baseline_seeds=range(FIRST_SEED, FIRST_SEED + MNIST_BASELINE_SEEDS),
        queries=Subset(data.validation, range(mnist.QUERIES)),
        measurement="margin",
        stacked=True,
        output=output,
    )


def parts(train: TensorDataset, queries: Subset) -> dict[str, Tensor]:
    """Return inputs and targets of the training examples and of the queries, as in :class:`~.benchmark.Task`."""
    of_queries = [part[queries.indices] for part in queries.dataset.tensors]
    return dict(zip(NAMES, [*train.tensors, *of_queries], strict=True))


def write(truth: GroundTruth, path: Path) -> None:
    """Write a truth anew: its files have random names, and old ones must not stay behind."""
    shutil.rmtree(path, ignore_errors=True)
    truth.save(path)
    (path / ".truth.lock").unlink(missing_ok=True)  # only for several processes that write


def main() -> None:
    """Train and write one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["concrete", "mnist"])
    parser.add_argument("--data", help="the table of concretes as text")
    parser.add_argument("--work", required=True, type=Path, help="a directory for finished trainings")
    parser.add_argument("--output", type=Path, default=HERE)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    work, output = options.work / options.task, options.output / options.task
    data = ConcreteData(options.data) if options.task == "concrete" else MNISTData()
    data.setup("fit")
    if options.task == "concrete":
        write(train_concrete(data, work / "truth"), output / "tenths")
        stored = tensors = parts(data.train, Subset(data.validation, range(concrete.QUERIES)))
    else:
        for name, kept in (("halves", 0.5), ("tenths", 0.9)):
            write(train_mnist(data, kept, work / name), output / name)
        tensors = parts(data.train, Subset(data.validation, range(mnist.QUERIES)))
        # the images stay in their package; positions in its array say which ones were taken
        stored = {"rows": data.rows[: mnist.EXAMPLES], "query_rows": data.rows[mnist.EXAMPLES :][: mnist.QUERIES]}
    safetensors.torch.save_file({name: part.clone() for name, part in stored.items()}, output / "data.safetensors")
    (output / "data.json").write_text(json.dumps({"crc32": checksum(tensors)}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
