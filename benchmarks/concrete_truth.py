"""UCI Concrete as ``examples/concrete`` trains it: the recorded runs, and thousands of retrainings as ground truth.

    python -m benchmarks.concrete_truth --data concrete.txt --runs runs/concrete --truth concrete_truth.safetensors

Records the missing runs with the Trainer. Then trains networks without each of 40 random tenths of the training rows
(removal by "drop": the rows are deleted, seeds and orders are new), 192 times each, and 256 times with all rows, and
stores the predictions on 20 validation rows. This takes seven minutes on one core; the file is written after every
removal, and another call continues.

Retraining is in plain PyTorch, many seeds at a time by batched matrix products with a hand-written backward pass, and
does not use lightning_dtda. Before it is used, it trains the recorded runs again from their initial parameters and
batch orders, and must reproduce the Trainer's parameters.
"""

import argparse
import logging
import math
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from examples.concrete.concrete import ConcreteData, ConcreteRegressor
from lightning_dtda import Ensemble, TrajectoryRecorder

STEPS, BATCH, RATE, WIDTH = 1500, 32, 0.05, 64
RUNS, QUERIES = 20, 20
REMOVALS, SHARE, RETRAININGS, BASELINE = 40, 0.1, 192, 256
FIRST_STEPS, TOLERANCE = 100, 1e-4  # for the check of the retraining: single precision, parameters of up to 1
NAMES = tuple(f"network.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))


def concrete(path: str) -> ConcreteData:
    """Return the data of the example, loaded."""
    data = ConcreteData(path, BATCH)
    data.setup("fit")
    return data


def record(data: str, directory: Path) -> Ensemble:
    """Record the missing runs."""
    for seed in range(RUNS):
        if not (directory / f"seed-{seed:04d}").exists():
            pl.seed_everything(seed, verbose=False)
            trainer = pl.Trainer(
                max_steps=STEPS,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                callbacks=[TrajectoryRecorder(directory)],
            )
            trainer.fit(ConcreteRegressor(WIDTH, RATE), ConcreteData(data, BATCH))
    return Ensemble.open(directory)


def removals(rows: int) -> list[Tensor]:
    """Return the random tenths, each ``(round(0.1 rows),)``, which are the same in every call."""
    generator = torch.Generator().manual_seed(123)
    return [torch.randperm(rows, generator=generator)[: round(SHARE * rows)] for _ in range(REMOVALS)]


def train(parameters: list[Tensor], inputs: Tensor, targets: Tensor, batches: Tensor, rates: list[float]) -> None:
    """Train S networks in place, by SGD on the mean squared error.

    Args:
        parameters: Weights ``(S, in, out)`` and biases ``(S, 1, out)``, alternating.
        inputs: Inputs ``(N, 8)``.
        targets: Targets ``(N,)``.
        batches: Rows of each network and step ``(S, T, B)``.
        rates: Learning rates of the T steps.
    """
    first, first_bias, second, second_bias, third, third_bias = parameters
    for t, rate in enumerate(rates):
        rows = batches[:, t]
        x, y = inputs[rows], targets[rows][..., None]
        one = torch.baddbmm(first_bias, x, first).relu_()
        two = torch.baddbmm(second_bias, one, second).relu_()
        # gradients of the loss with respect to the layers' outputs, from the last layer to the first
        of_three = torch.baddbmm(third_bias, two, third).sub_(y).mul_(2 / y.shape[1])
        of_two = torch.bmm(of_three, third.mT).mul_(two > 0)
        of_one = torch.bmm(of_two, second.mT).mul_(one > 0)
        for weight, bias, entering, leaving in (
            (third, third_bias, two, of_three),
            (second, second_bias, one, of_two),
            (first, first_bias, x, of_one),
        ):
            weight.baddbmm_(entering.mT, leaving, alpha=-rate)
            bias.sub_(leaving.sum(1, keepdim=True), alpha=rate)


def predict(parameters: list[Tensor], inputs: Tensor) -> Tensor:
    """Return the predictions ``(S, Q)`` of S networks at Q inputs."""
    first, first_bias, second, second_bias, third, third_bias = parameters
    one = torch.baddbmm(first_bias, inputs.expand(len(first), *inputs.shape), first).relu_()
    two = torch.baddbmm(second_bias, one, second).relu_()
    return torch.baddbmm(third_bias, two, third)[..., 0]


def cosine() -> list[float]:
    """Return the example's learning rates."""
    return [RATE * (1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]


def check(ensemble: Ensemble, data: ConcreteData) -> str:
    """Train the recorded runs again and compare with the Trainer's parameters; return the deviations as text.

    Rounding may put an input on the other side of a ReLU's kink. From there on, two trainings differ by more than
    rounding, so not every run can meet TOLERANCE to the end: all of them must over the first steps, and half of them to
    the end.
    """

    def stacked(step: int) -> list[Tensor]:
        every = [run.theta(step) for run in ensemble]
        parameters = [torch.stack([theta[name] for theta in every]) for name in NAMES]
        return [p.mT.contiguous() if p.ndim == 3 else p[:, None].clone() for p in parameters]

    batches = torch.stack([torch.stack([run.batch_indices(t) for t in range(run.steps)]) for run in ensemble])
    rates = [float(ensemble[0].learning_rates(t)) for t in range(ensemble[0].steps)]
    assert max(abs(a - b) for a, b in zip(rates, cosine(), strict=True)) < 1e-7, "the recorded learning rates differ"
    deviations = {}
    for steps in (FIRST_STEPS, STEPS):
        parameters = stacked(0)
        train(parameters, *data.train.tensors, batches, rates[:steps])
        pairs = zip(parameters, stacked(steps), strict=True)
        deviations[steps] = torch.stack([(a - b).abs().flatten(1).amax(1) for a, b in pairs]).amax(0)
    assert deviations[FIRST_STEPS].max() < TOLERANCE, f"after {FIRST_STEPS} steps: {deviations[FIRST_STEPS]}"
    assert deviations[STEPS].median() < TOLERANCE, f"after {STEPS} steps: {deviations[STEPS]}"
    first, last = deviations[FIRST_STEPS], deviations[STEPS]
    return (
        f"largest deviation of a parameter from the Trainer's: after {FIRST_STEPS} steps {float(first.max()):.1g} in "
        f"the worst run; in the end {float(last.median()):.1g} in the median of the runs, {float(last.max()):.1g} in "
        "the worst"
    )


def retrain(data: ConcreteData, kept: Tensor, networks: int, seed: int) -> Tensor:
    """Train networks of new seeds on the kept rows alone; return their predictions ``(networks, QUERIES)``."""
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for entering, leaving in ((8, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)):
        # what nn.Linear draws: all uniform between -1 / sqrt(in) and 1 / sqrt(in)
        bound = entering**-0.5
        parameters += [
            torch.empty(networks, rows, leaving).uniform_(-bound, bound, generator=generator) for rows in (entering, 1)
        ]
    per_epoch = len(kept) // BATCH
    epochs = [
        # shuffled separately for each network, like a DataLoader with drop_last
        kept[torch.rand(networks, len(kept), generator=generator).argsort(1)[:, : per_epoch * BATCH]]
        for _ in range(-(-STEPS // per_epoch))
    ]
    batches = torch.cat(epochs, 1)[:, : STEPS * BATCH].unflatten(1, (STEPS, BATCH))
    train(parameters, *data.train.tensors, batches, cosine())
    return predict(parameters, data.validation.tensors[0][:QUERIES])


def load(path: Path) -> dict[str, Tensor]:
    """Return the content of a truth file, ``baseline``, ``removed`` and ``measurements``; empty if there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata(), f"{path} is the truth of another task: {file.metadata()}. Delete it."
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def metadata() -> dict[str, str]:
    """Return the settings that the retrained measurements depend on."""
    names = ("STEPS", "BATCH", "RATE", "WIDTH", "QUERIES", "REMOVALS", "SHARE", "RETRAININGS", "BASELINE")
    return {name.lower(): str(globals()[name]) for name in names} | {"removal": "drop"}


def truth(data: ConcreteData, path: Path) -> dict[str, Tensor]:
    """Run the retrainings that are not in the file yet.

    Returns:
        ``baseline`` ``(seeds, queries)``, ``removed`` ``(subsets, rows)`` and ``measurements``
        ``(subsets, seeds, queries)``.
    """
    rows = len(data.train)
    removed = removals(rows)
    done = load(path)
    measurements = list(done.get("measurements", ()))
    if "baseline" not in done:
        done["baseline"] = torch.cat([retrain(data, torch.arange(rows), BASELINE // 2, seed) for seed in (1, 2)])
    for number in range(len(measurements), REMOVALS):
        started = time.perf_counter()
        kept = torch.ones(rows, dtype=torch.bool)
        kept[removed[number]] = False
        measurements.append(retrain(data, kept.nonzero()[:, 0], RETRAININGS, 1000 + number))
        done |= {"removed": torch.stack(removed), "measurements": torch.stack(measurements)}
        unfinished = path.with_suffix(".unfinished")
        save_file(done, unfinished, metadata())
        unfinished.replace(path)
        print(f"removal {number + 1} of {REMOVALS}: {time.perf_counter() - started:.0f} s", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--runs", type=Path, required=True, help="the directory of the recorded runs")
    parser.add_argument("--truth", type=Path, required=True, help="the file for the retrained measurements")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = concrete(options.data)
    ensemble = record(options.data, options.runs)
    print(check(ensemble, data), flush=True)
    truth(data, options.truth)


if __name__ == "__main__":
    main()
