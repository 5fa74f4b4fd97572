"""Growth of the time and memory of attribution: exponents in T, N, Q, S, P and B.

    OMP_NUM_THREADS=1 python -m benchmarks.laws --json laws.json
    OMP_NUM_THREADS=1 python -m benchmarks.laws --net cnn --estimators UnrolledDifferentiation --variables T width

An MLP with two hidden ReLU layers, or a CNN with two convolutions, on random inputs, 10 classes, SGD with momentum. One
variable is changed at a time, the others are those of ``MIDDLE``; P is changed through the width. Each case is a
separate process on one thread: it trains and records, attributes once for one run and one query, then counts the CPU
seconds of a whole ``attribute`` call. Memory is the peak of the process's private memory (``RssAnon``) above its value
before that call. An exponent is the slope of a straight line through the logarithms, over all cases of a variable and
over the two largest ones.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.large_attribution import Peak
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.estimators import EKFAC, Estimator, GaussNewton, Identity

CLASSES, INPUTS = 10, 64

MIDDLE = {
    "mlp": {"T": 64, "N": 1024, "Q": 8, "S": 2, "width": 256, "B": 32},
    "cnn": {"T": 32, "N": 512, "Q": 4, "S": 1, "width": 256, "B": 32},
}
"""Numbers of steps, examples, queries, runs, units in a hidden layer, and examples in a batch. A CNN has an eighth as
many channels."""

VALUES = {
    "mlp": {
        "T": (16, 64, 256),
        "N": (256, 1024, 4096),
        "Q": (2, 8, 32),
        "S": (1, 2, 4),
        "width": (128, 256, 512),
        "B": (8, 32, 128),
    },
    "cnn": {
        "T": (8, 32, 128),
        "N": (128, 512, 2048),
        "Q": (1, 4, 16),
        "S": (1, 2, 4),
        "width": (128, 256, 512),
        "B": (8, 32, 128),
    },
}

ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "UnrolledDifferentiation": lambda: UnrolledDifferentiation(runs_per_batch=1, mode="reverse", horizon=None),
    "Identity": lambda: InfluenceFunctions(Identity()),
    "EKFAC": lambda: InfluenceFunctions(EKFAC()),
    # the same number of iterations in each case, as the real number depends on the spectrum
    "GaussNewton cg": lambda: InfluenceFunctions(GaussNewton("cg", iterations=10, tolerance=1e-9)),
}


def mlp(width: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def cnn(width: int) -> nn.Module:
    """Two convolutions of the inputs as an image of 8 x 8."""
    channels = width // 8
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(channels, CLASSES),
    )


NETS = {"mlp": mlp, "cnn": cnn}


class Classifier(pl.LightningModule):
    """Trains a network."""

    def __init__(self, net: str, width: int) -> None:
        super().__init__()
        self.network = NETS[net](width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def data(examples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (examples,), generator=generator)
    centres = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(9))
    return TensorDataset(centres[labels] + torch.randn(examples, INPUTS, generator=generator), labels)


def record(net: str, size: dict[str, int], root: Path) -> None:
    for seed in range(size["S"]):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_steps=size["T"], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[TrajectoryRecorder(root)],
        )  # fmt: skip
        trainer.fit(Classifier(net, size["width"]), DataLoader(data(size["N"], 0), size["B"], shuffle=True))


def trial(net: str, name: str, size: dict[str, int], results: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for log in ("lightning_dtda", "lightning.pytorch"):
        logging.getLogger(log).setLevel(logging.ERROR)
    time.perf_counter = time.process_time  # what is timed to choose how to go about it, on a busy machine too
    with tempfile.TemporaryDirectory() as directory:
        record(net, size, Path(directory))
        ensemble, train = Ensemble.open(directory), data(size["N"], 0)
        module = Classifier(net, size["width"])

        def answer(runs: Ensemble, queries: int) -> None:
            asked = data(queries, 1)
            attribute(runs, module, train, queries=asked, estimator=ESTIMATORS[name](), progress=False)

        answer(ensemble[:1], 1)
        with Peak() as peak:
            started = time.process_time()
            answer(ensemble, size["Q"])
            seconds = time.process_time() - started
    parameters = sum(parameter.numel() for parameter in module.parameters())
    results.put({"seconds": seconds, "memory": peak.own, "parameters": parameters})


def case(net: str, name: str, size: dict[str, int]) -> dict[str, Any]:
    """Measure in a separate process."""
    context = get_context("spawn")
    results = context.Queue()
    process = context.Process(target=trial, args=(net, name, size, results))
    process.start()
    found = results.get(timeout=3600)
    process.join()
    return found


def exponent(values: list[float], costs: list[float]) -> float:
    """Return the slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def exponents(values: list[float], costs: list[float]) -> tuple[float, float]:
    """Return the exponent over all cases, and over the two largest, where fixed costs matter least."""
    return exponent(values, costs), exponent(values[-2:], costs[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="mlp", choices=list(NETS))
    parser.add_argument("--estimators", nargs="*", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--variables", nargs="*", default=list(VALUES["mlp"]), choices=list(VALUES["mlp"]))
    parser.add_argument("--json", type=Path, default=None, help="Where all figures go.")
    options = parser.parse_args()
    usual: dict[str, int] = MIDDLE[options.net]
    found: dict[str, Any] = {}
    print("| estimator | variable | range | time | memory | seconds | MiB |\n|---|---|---|---|---|---|---|", flush=True)
    for name in options.estimators:
        middle = case(options.net, name, usual)
        for variable in options.variables:
            cases = [
                middle if value == usual[variable] else case(options.net, name, usual | {variable: value})
                for value in VALUES[options.net][variable]
            ]
            is_width = variable == "width"
            values = [
                float(one["parameters"]) if is_width else float(v)
                for v, one in zip(VALUES[options.net][variable], cases, strict=True)
            ]
            seconds, memory = ([one[key] for one in cases] for key in ("seconds", "memory"))
            label = "P" if is_width else variable
            slopes = exponents(values, seconds), exponents(values, memory)
            found.setdefault(name, {})[label] = {
                "values": values,
                "seconds": seconds,
                "memory": memory,
                "slopes": slopes,
            }
            span = f"{values[0]:,.0f} to {values[-1]:,.0f}"
            print(
                f"| {name} | {label} | {span} | {slopes[0][0]:.2f} / {slopes[0][1]:.2f} | "
                f"{slopes[1][0]:.2f} / {slopes[1][1]:.2f} | "
                f"{', '.join(f'{one:.2f}' for one in seconds)} | {', '.join(f'{one / 2**20:.0f}' for one in memory)} |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
