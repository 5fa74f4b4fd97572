"""How well do predictions rank removals if some trainings are chaotic? MNIST, a small network, AdamW.

    python benchmarks/chaotic_runs.py --data mnist10k --directory runs/mnist

The data directory contains MNIST's test images and labels as gzipped idx files. On the first 2,000 of them, 20 runs are
recorded and attributed, exactly and with a horizon, for the margin on 20 others. Networks are retrained without each of
30 random fifths of the data, 96 times each, with other seeds and orders. The figure is the linear datamodeling score
(Park et al., arXiv 2303.14186): Spearman's correlation over removals between predicted and real mean, averaged over
queries. Everything is kept in the directory; another call continues.

Retraining is in plain PyTorch, many seeds at a time, and does not use lightning_dtda.
"""

import argparse
import gzip
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import spearman_corrcoef

from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.statistics.differences import Mean

EXAMPLES, QUERIES, RUNS, EPOCHS, BATCH = 2000, 20, 20, 20, 64
REMOVALS, SHARE, RETRAININGS = 30, 0.2, 96
LOCATIONS = ("mean", "median", "trimmed")
RATE, DECAY, BETAS, EPS = 2e-3, 1e-2, (0.9, 0.999), 1e-8


class Classifier(pl.LightningModule):
    """784-32-10, ReLU."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        """Return class scores ``(B, 10)``."""
        return self.net(images)

    def training_step(self, batch, batch_idx):
        """Return the cross entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """Return AdamW, which makes some of these trainings chaotic."""
        return torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS, eps=EPS)


def read(directory):
    """Images ``(n, 784)``, standardised, and labels ``(n,)``."""

    def content(kind, header):
        [path] = Path(directory).glob(f"*{kind}*")
        return torch.frombuffer(bytearray(gzip.open(path, encoding="utf-8").read()[header:]), dtype=torch.uint8)

    images = content("images", 16).float().reshape(-1, 784) / 255
    return (images - 0.1307) / 0.3081, content("labels", 8).long()


def retrain(images, labels, kept, queries, first_seed):
    """Train ``RETRAININGS`` networks on the kept examples; return their margins ``(retrainings, queries)``."""
    network = Classifier().net
    initial, orders = [], []
    for seed in range(first_seed, first_seed + RETRAININGS):
        torch.manual_seed(seed)
        initial.append({name: p.detach().clone() for name, p in Classifier().net.named_parameters()})
        orders.append(torch.Generator().manual_seed(seed))
    theta = {name: torch.stack([each[name] for each in initial]) for name in initial[0]}
    mean = {name: torch.zeros_like(p) for name, p in theta.items()}
    square = {name: torch.zeros_like(p) for name, p in theta.items()}

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(network, parameters, (x,)), y)

    gradients, step = vmap(grad(loss)), 0
    for _ in range(EPOCHS):
        order = torch.stack([kept[torch.randperm(len(kept), generator=generator)] for generator in orders])
        for batch in order.split(BATCH, 1):
            step += 1
            rate, correction = RATE / (1 - BETAS[0] ** step), (1 - BETAS[1] ** step) ** 0.5
            for name, gradient in gradients(theta, images[batch], labels[batch]).items():
                theta[name].mul_(1 - RATE * DECAY)
                mean[name].lerp_(gradient, 1 - BETAS[0])
                square[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                theta[name].addcdiv_(mean[name], (square[name].sqrt() / correction).add_(EPS), value=-rate)
    with torch.no_grad():
        scores = vmap(lambda parameters: functional_call(network, parameters, (queries[0],)))(theta)
    probability = scores.double().softmax(2)[:, range(len(queries[1])), queries[1]]
    return (probability / (1 - probability)).log()


def truth(images, labels, removals, queries, directory):
    """Return margins after retraining without each removal ``(removals, retrainings, queries)``, stored one by one."""
    path = directory / "retrained.pt"
    done = torch.load(path, weights_only=True) if path.exists() else []
    for number in range(len(done), len(removals)):
        kept = torch.ones(EXAMPLES, dtype=torch.bool)
        kept[removals[number]] = False
        done.append(retrain(images, labels, kept.nonzero()[:, 0], queries, (number + 1) * 10_000))
        torch.save(done, path)
    return torch.stack(done)


def record(data, directory):
    """Record the missing runs."""
    for seed in range(RUNS):
        if not (directory / "runs" / f"seed-{seed:04d}").exists():
            pl.seed_everything(seed, verbose=False)
            trainer = pl.Trainer(
                max_epochs=EPOCHS,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[TrajectoryRecorder(directory / "runs")],
            )
            trainer.fit(Classifier(), DataLoader(data, BATCH, shuffle=True))


def score(predicted, real):
    """Spearman's correlation over removals, averaged over queries; both ``(removals, queries)``."""
    return float(spearman_corrcoef(predicted.float(), real.float()).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    images, labels = read(options.data)
    data = TensorDataset(images[:EXAMPLES], labels[:EXAMPLES])
    queries = TensorDataset(images[EXAMPLES : EXAMPLES + QUERIES], labels[EXAMPLES : EXAMPLES + QUERIES])
    options.directory.mkdir(parents=True, exist_ok=True)
    record(data, options.directory)
    generator = torch.Generator().manual_seed(123)
    removals = [torch.randperm(EXAMPLES, generator=generator)[: int(SHARE * EXAMPLES)] for _ in range(REMOVALS)]
    real = truth(images, labels, removals, queries.tensors, options.directory)
    halves = score(real[:, ::2].mean(1), real[:, 1::2].mean(1))
    print(f"noise ceiling of the mean (split half, Spearman-Brown): {2 * halves / (1 + halves):.3f}")
    for horizon in (None, "auto"):
        started = time.perf_counter()
        attribution: Attribution = attribute(
            Ensemble.open(options.directory / "runs"),
            Classifier(),
            data,
            queries=queries,
            measurement="margin",
            estimator=UnrolledDifferentiation(horizon=horizon),
            output=options.directory / f"attribution-{horizon}",
        )
        seconds = time.perf_counter() - started

        def predicted(difference, runs, attribution=attribution):
            changes = [attribution.influence(difference, removed=removal.tolist(), runs=runs) for removal in removals]
            return torch.stack(changes)

        alone = [
            score(torch.stack([attribution.responses[run][:, r].sum(1) for r in removals]), real.mean(1))
            for run in range(RUNS)
        ]
        print(f"horizon={horizon}: {seconds:.0f} s, left out as chaotic: {', '.join(attribution.chaotic) or 'none'}")
        print(f"  reliability without ground truth, median over queries: {attribution.reliability().median():.2f}")
        print(f"  one run alone: {sum(alone) / RUNS:.3f}")
        for runs in ("all", "trusted"):
            of_locations = (f"{name} {score(predicted(Mean(name), runs), real.mean(1)):.3f}" for name in LOCATIONS)
            print(f"  {runs} runs: {', '.join(of_locations)}")
            variance = score(predicted("variance", runs), real.var(1))
            print(f"  {runs} runs, variance: {variance:.3f}")


if __name__ == "__main__":
    main()
