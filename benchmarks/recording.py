"""Cost of recording: training with and without the recorder, side by side in one process.

    python benchmarks/recording.py --steps 1000 --repeats 7
    python benchmarks/recording.py --optimizer adamw --workers 2
    python benchmarks/recording.py --optimizer adamw --processes 2
    python benchmarks/recording.py --models "MLP of" --steps 400 --repeats 3
    python benchmarks/recording.py --models "MLP of 1 M" --steps 300 --crossed

Each repeat trains every variant once, in rotating order, so a busy machine slows all of them equally; ratios are taken
within a repeat, then the median over repeats. A step's time is the time from the start of step ``WARM_UP`` until
``fit`` returns, divided by the number of steps in between. The start-up (the check of the first batch, the run
directory, caches) occurs once and is reported separately; waiting for the writer's thread at the end is included. The
ratio of the whole ``fit`` includes the start-up. The CPU time is that of all threads of the process, user and system:
on a machine with an idle core, it shows what the wall clock hides. With several processes (DDP on gloo), the figures
are those of the first one; the others keep step with it. ``--crossed`` compares recordings whose seeds of
initialisation, order and noise are set apart with those of plain seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import TrajectoryRecorder
from lightning_dtda.recording import CrossedSeeds

WARM_UP = 20
"""Number of steps before the clock starts: by then, allocators and caches have settled and the first batch is checked.
"""

EXAMPLES = 4096

VARIANTS = {
    "no recorder": None,
    'gradients="none"': "none",
    'gradients="bfloat16"': "bfloat16",
    'gradients="float32"': "float32",
}

SHARING = {
    "plain seeds": (),
    "initialisation, order": ("initialisation", "order"),
    "and noise": ("initialisation", "order", "noise"),
}
"""Sources of randomness with seeds of their own, for ``--crossed``."""

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


@dataclass(frozen=True)
class Setting:
    """How the models are trained."""

    steps: int
    optimizer: str
    workers: int
    processes: int
    crossed: bool = False


class Supervised(pl.LightningModule):
    """A network, a loss and an optimizer, and nothing else."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizer: str) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of inputs and targets."""
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of this name."""
        return OPTIMIZERS[self.optimizer](self.parameters())


def loader(setting: Setting, batch_size: int, *tensors: Tensor) -> DataLoader:
    """Return shuffled batches, from workers that live as long as the training."""
    workers = setting.workers
    return DataLoader(
        TensorDataset(*tensors), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def mlp(setting: Setting) -> tuple[Supervised, DataLoader]:
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    data = loader(setting, 32, torch.randn(EXAMPLES, 8), torch.randn(EXAMPLES, 1))
    return Supervised(net, nn.functional.mse_loss, setting.optimizer), data


def cnn(setting: Setting) -> tuple[Supervised, DataLoader]:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 10),
    )
    data = loader(setting, 64, torch.randn(EXAMPLES, 1, 28, 28), torch.randint(10, (EXAMPLES,)))
    return Supervised(net, nn.functional.cross_entropy, setting.optimizer), data


def wide_mlp(width: int, setting: Setting) -> tuple[Supervised, DataLoader]:
    """Return the worst case for recording: few operations per parameter, which is used once for each example."""
    net = nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    data = loader(setting, 64, torch.randn(EXAMPLES, 256), torch.randint(10, (EXAMPLES,)))
    return Supervised(net, nn.functional.cross_entropy, setting.optimizer), data


Model = Callable[[Setting], tuple[Supervised, DataLoader]]

WIDTHS = {"0.1": 210, "1": 876, "3": 1606, "10": 3032}
"""Width of the hidden layers by millions of parameters."""

MODELS: dict[str, Model] = {
    "MLP 8-64-64-1, batch 32": mlp,
    "CNN 28x28, batch 64": cnn,
    **{f"MLP of {size} M, batch 64": partial(wide_mlp, width) for size, width in WIDTHS.items()},
}


@dataclass
class Timing:
    """One training.

    Args:
        wall: Wall clock, in milliseconds per step.
        cpu: CPU time, in milliseconds per step.
        start_up: Wall-clock time of the start-up in milliseconds.
        fit: CPU time of the whole ``fit`` in seconds.
        megabytes: Megabytes written per step.
    """

    wall: float
    cpu: float
    start_up: float
    fit: float
    megabytes: float


class Stopwatch(pl.Callback):
    """Notes when the first batch arrives, when the first step is taken and when the warm-up is over."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that everything but the first batch is ready."""
        self.started = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Start the clocks after the warm-up."""
        if trainer.global_step == WARM_UP:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        """Note when the first step is taken."""
        if trainer.global_step == 1:
            self.first_step = time.perf_counter()


def train(make: Model, setting: Setting, variant: str, root: Path) -> Timing:
    """Train once from seed 0, with a recorder unless the variant has none."""
    pl.seed_everything(0, verbose=False)
    module, data = make(setting)
    stopwatch = Stopwatch()
    gradients = "none" if setting.crossed else VARIANTS[variant]
    recorders = [] if gradients is None else [TrajectoryRecorder(root, gradients=gradients)]
    if setting.crossed and (sources := SHARING[variant]):
        recorders[0].seeds = CrossedSeeds(**dict.fromkeys(sources, 2)).of_run(0)
    trainer = pl.Trainer(
        max_steps=setting.steps,
        callbacks=[stopwatch, *recorders],
        accelerator="cpu",
        devices=setting.processes,
        strategy="auto" if setting.processes == 1 else "ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = time.process_time()
    trainer.fit(module, data)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.strategy.barrier()
    written = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    if trainer.is_global_zero:
        shutil.rmtree(root, ignore_errors=True)
    timed = (setting.steps - WARM_UP) / 1000
    return Timing(
        wall=(wall - stopwatch.wall) / timed,
        cpu=(cpu - stopwatch.cpu) / timed,
        start_up=1000 * (stopwatch.first_step - stopwatch.started),
        fit=cpu - before,
        megabytes=written / setting.steps / 1e6,
    )


def compare(make: Model, setting: Setting, repeats: int, root: Path) -> dict[str, list[Timing]]:
    """Time every variant ``repeats`` times, interleaved."""
    order = list(SHARING if setting.crossed else VARIANTS)
    timings: dict[str, list[Timing]] = {variant: [] for variant in order}
    train(make, replace(setting, steps=WARM_UP + 1), order[0], root)
    for repeat in range(repeats):
        for variant in order:
            timings[variant].append(train(make, setting, variant, root / f"{repeat} {variant}"))
        order = [*order[1:], order[0]]
    return timings


def ratios(timings: dict[str, list[Timing]], variant: str, clock: str) -> list[float]:
    """Return, for each repeat, the variant's time relative to that of the first one: no recorder, or plain seeds."""
    pairs = zip(timings[variant], timings[next(iter(timings))], strict=True)
    return [getattr(timing, clock) / getattr(baseline, clock) for timing, baseline in pairs]


def table(model: str, timings: dict[str, list[Timing]]) -> str:
    """Format medians; and ratios as median [first quartile, third quartile]."""
    head = ["wall ms/step", "cpu ms/step", "wall ratio", "cpu ratio", "fit cpu ratio", "start-up ms", "MB/step"]
    widths = [14, 13, 24, 24, 24, 13, 9]
    lines = [f"{model:28}" + "".join(name.rjust(width) for name, width in zip(head, widths, strict=True))]
    for variant, values in timings.items():
        cells = [f"  {variant:26}"]
        cells += [f"{statistics.median(value.wall for value in values):14.3f}"]
        cells += [f"{statistics.median(value.cpu for value in values):13.3f}"]
        for clock in ("wall", "cpu", "fit"):
            found = ratios(timings, variant, clock)
            low, median, high = statistics.quantiles(found, n=4, method="inclusive")
            cells.append(f"{median:.3f} [{low:.3f}, {high:.3f}]".rjust(24))
        cells.append(f"{statistics.median(value.start_up for value in values):13.1f}")
        cells.append(f"{statistics.median(value.megabytes for value in values):9.3f}")
        lines.append("".join(cells))
    return "\n".join(lines)


def trial(
    rank: int, setting: Setting, models: list[str], repeats: int, root: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Compare models, as process ``rank``; the first one prints as it goes."""
    # Lightning does not start processes if these are set
    os.environ |= environment | ({"LOCAL_RANK": str(rank)} if environment else {})
    # two threads on busy cores would measure each other
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning_dtda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = {}
    for model in models:
        timings = compare(MODELS[model], setting, repeats, root / model.replace(" ", "-"))
        results[model] = {variant: [asdict(value) for value in values] for variant, values in timings.items()}
        if rank == 0:
            print(table(model, timings), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each training")
    parser.add_argument("--repeats", type=int, default=7, help="trainings of each variant")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="of all models")
    parser.add_argument("--models", default="", help="those whose names contain this")
    parser.add_argument("--workers", type=int, default=0, help="processes that load the data of each training")
    parser.add_argument("--processes", type=int, default=1, help="processes of each training (DDP)")
    parser.add_argument("--crossed", action="store_true", help="compare crossed seeds with plain ones")
    parser.add_argument("--json", type=Path, help="file for all timings")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps must be more than {WARM_UP}, the steps of the warm-up")
    if not (models := [model for model in MODELS if arguments.models in model]):
        parser.error(f"--models must be part of one of these: {'; '.join(MODELS)}")
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2, to tell a spread")
    setting = Setting(arguments.steps, arguments.optimizer, arguments.workers, arguments.processes, arguments.crossed)
    about = {
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "repeats": arguments.repeats,
        **asdict(setting),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    environment = {}
    if setting.processes > 1:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    with tempfile.TemporaryDirectory() as root:
        others = [
            get_context("spawn").Process(
                target=trial, args=(rank, setting, models, arguments.repeats, Path(root), environment)
            )
            for rank in range(1, setting.processes)
        ]
        for other in others:
            other.start()
        results = trial(0, setting, models, arguments.repeats, Path(root), environment)
        for other in others:
            other.join()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"setting": about, "timings": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
