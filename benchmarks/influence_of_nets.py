r"""Influence functions of a CNN and a GPT, beside those of kronfluence, and curvlinops' EK-FAC: time and memory.

    python -m benchmarks.influence_of_nets --nets cnn gpt --environment kron --json result.json

A CNN with GroupNorm (105,994 parameters, 2,000 images, SGD) and a GPT (813,824 parameters, 400 sequences of 32 tokens,
AdamW), both of synthetic data and trained for some epochs; the measurement is the loss on 20 queries. An environment
with kronfluence is made if it is not there, from PyPI.

A method's seconds are those of the CPU, on one thread, of its whole call: ``attribute(...)`` on our side; fitting the
factors and pairwise scores, files included, on kronfluence's; ``curvlinops`` has no scores, and only its fit is timed.
Imports, and a first call for one run, are not counted. Every method runs in a process of its own; in each repeat the
two sides follow each other, and their ratio is taken within it. Memory is the resident peak of the process. Agreement
is Spearman's correlation of the scores with kronfluence's of the same curvature, of each query and run over the
examples, in the mean.

kronfluence leaves all layers but linear and two-dimensional convolutional ones out. It draws one label for each output,
its default; EK-FAC here takes one random combination of the outputs (``samples=1``), or all of them (``ekfac-exact``).
"""

import argparse
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

ROOT = Path(__file__).parent.parent
KRONFLUENCE = "kronfluence==1.0.1"
QUERIES, BATCH = 20, 50
EXAMPLES, EPOCHS = {"cnn": 2000, "gpt": 400}, {"cnn": 3, "gpt": 6}
VOCABULARY, LENGTH = 64, 32
OURS = {"identity": "identity", "ekfac": "ekfac", "ekfac-exact": "ekfac"}
"""Our methods, and kronfluence's that each is set beside."""


def cnn() -> nn.Module:
    """A CNN for small images."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(96, 288), nn.ReLU(), nn.Linear(288, 10)),
    )


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attention, then a layer for each token."""
        parts = self.attention(self.before(hidden)).chunk(3, 2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(attended.transpose(1, 2).flatten(2))
        return hidden + self.narrow(functional.gelu(self.widen(self.between(hidden))))


class GPT(nn.Module):
    """A GPT as nanoGPT has it."""

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores for each token ``(B, T, C)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.last(self.blocks(self.tokens(tokens) + self.positions(places))))


NETS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "gpt": GPT}


def examples_of(net: str) -> TensorDataset:
    """Return a net's training examples, and after them the queries: noisy patterns, or chains of tokens."""
    generator = torch.Generator().manual_seed(0)
    count = EXAMPLES[net] + QUERIES
    if net == "cnn":
        labels = torch.randint(10, (count,), generator=generator)
        patterns = torch.randn(10, 3, 16, 16, generator=generator)
        return TensorDataset(0.3 * patterns[labels] + torch.randn(count, 3, 16, 16, generator=generator), labels)
    tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=generator)
    follows = torch.randperm(VOCABULARY, generator=generator)
    kept = torch.rand(tokens.shape, generator=generator) < 0.7
    for place in range(LENGTH):
        tokens[:, place + 1] = torch.where(kept[:, place], follows[tokens[:, place]], tokens[:, place + 1])
    return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def parts(net: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return training examples and queries."""
    every, count = examples_of(net), EXAMPLES[net]
    return TensorDataset(*every[:count]), TensorDataset(*every[count:])


def loss_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy."""
    return functional.cross_entropy(scores.flatten(0, -2), labels.flatten())


# -- in a process of its own: ours


def lightning_module(net: str) -> Any:
    """Return the net as a LightningModule."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = NETS[net]()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return loss_of(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if net == "gpt":
                return torch.optim.AdamW(self.parameters(), lr=1e-3)
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Module()


def record(net: str, runs: int, root: Path) -> None:
    """Train and record the runs of a net."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_dtda import TrajectoryRecorder

    for seed in range(runs):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_epochs=EPOCHS[net],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[TrajectoryRecorder(root)],
        )
        trainer.fit(lightning_module(net), DataLoader(parts(net)[0], BATCH, shuffle=True))


def hand_over(root: Path, path: Path) -> None:
    """Write the trained parameters of the runs for other packages."""
    from lightning_dtda import Ensemble

    final = [run.theta(run.steps) for run in Ensemble.open(root)]
    torch.save([{name.removeprefix("network."): part for name, part in theta.items()} for theta in final], path)


def of_ours(net: str, method: str, runs: str, _parameters: str, first: int | None) -> Tensor:
    """Return our responses ``(runs, queries, examples)``."""
    from lightning_dtda import Ensemble, InfluenceFunctions, attribute, estimators

    curvatures = {
        "identity": lambda: estimators.Identity(),
        "ekfac": lambda: estimators.EKFAC(samples=1, rescale=False),
        "ekfac-exact": lambda: estimators.EKFAC(rescale=False),
    }
    train, asked = parts(net)
    estimator = InfluenceFunctions(curvature=curvatures[method]())
    return attribute(
        Ensemble.open(runs)[:first], lightning_module(net), train, queries=asked, estimator=estimator, progress=False
    ).responses


# -- in a process of its own: the others


def of_kronfluence(net: str, method: str, _runs: str, parameters: str, first: int | None) -> Tensor:
    """Return kronfluence's scores ``(runs, queries, examples)``."""
    from kronfluence import analyzer, arguments
    from kronfluence import task as tasks

    class Task(tasks.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            scores = model(batch[0]).flatten(0, -2)
            labels = batch[1].flatten()
            if sample:
                labels = torch.multinomial(functional.softmax(scores.detach(), -1), 1).flatten()
            # the sum over examples of their mean losses
            return functional.cross_entropy(scores, labels, reduction="sum") / (len(labels) / len(batch[0]))

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    train, asked = parts(net)
    found = []
    for run, theta in enumerate(torch.load(parameters)[:first]):
        torch.manual_seed(run)
        network = NETS[net]().eval()
        network.load_state_dict(theta)
        with tempfile.TemporaryDirectory() as directory:
            model = analyzer.prepare_model(network, Task())
            analysis = analyzer.Analyzer(
                "net", model, Task(), cpu=True, disable_tqdm=True, output_dir=directory, log_level=40
            )
            size = 256 if net == "cnn" else 64
            factors = arguments.FactorArguments(strategy=method)
            analysis.fit_all_factors("factors", train, per_device_batch_size=size, factor_args=factors)
            analysis.compute_pairwise_scores(
                *("scores", "factors", asked, train),
                per_device_query_batch_size=len(asked),
                per_device_train_batch_size=size,
                score_args=arguments.ScoreArguments(damping_factor=None),  # a tenth of the mean eigenvalue
            )
            found.append(analysis.load_pairwise_scores("scores")["all_modules"] / len(train))
    return torch.stack(found)


def of_curvlinops(net: str, _method: str, _runs: str, parameters: str, first: int | None) -> Tensor:
    """Fit curvlinops' EK-FAC to each run, with one sampled label for an output; it has no scores to return."""
    from curvlinops import EKFACLinearOperator
    from torch.utils.data import DataLoader

    for theta in torch.load(parameters)[:first]:
        network = NETS[net]().eval()
        network.load_state_dict(theta)
        layers = [one for one in network.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        weights = [weight for layer in layers for weight in layer.parameters()]
        flat = nn.Sequential(network, nn.Flatten(0, -2)) if net == "gpt" else network
        data = [(inputs, labels.flatten()) for inputs, labels in DataLoader(parts(net)[0], 256 if net == "cnn" else 64)]
        operator = EKFACLinearOperator(
            *(flat, nn.CrossEntropyLoss(), weights, data),
            fisher_type="mc",
            mc_samples=1,
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        operator.compute_eigenvalue_correction()
    return torch.zeros(())


SIDES = {"ours": of_ours, "kronfluence": of_kronfluence, "curvlinops": of_curvlinops}


def work(options: argparse.Namespace) -> None:
    """Answer by one method, and print what it took."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning_dtda", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    answer, arguments = SIDES[options.side], (options.net, options.method, options.runs, options.parameters)
    answer(*arguments, 1)
    started = time.process_time()
    scores = answer(*arguments, None)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.save(scores.detach().float(), options.output)
    print("\n" + json.dumps({"cpu": seconds, "MiB": peak}))


# -- all of it


def environment(directory: Path) -> Path:
    """Return the Python of the environment with kronfluence, made if there is none."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        torch_version = f"torch=={torch.__version__.partition('+')[0]}"  # the same for both sides
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch_version, KRONFLUENCE], check=True)
    return python


def measure(python: str | Path, side: str, net: str, method: str, workspace: Path) -> dict[str, float]:
    """Run a method in a process; return what it says about itself."""
    command = [python, __file__, "--side", side, "--nets", net, "--method", method]
    command += ["--runs", workspace / f"{net}-runs", "--parameters", workspace / f"{net}.pt"]
    command += ["--output", workspace / f"{net}-{side}-{method}.pt"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} {method} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def agreement(first: Path, second: Path) -> float:
    """Return the mean rank correlation of scores over the examples."""

    def ranks(path: Path) -> Tensor:
        order = torch.load(path).flatten(0, 1).argsort(1).argsort(1).double()
        return (order - order.mean(1, keepdim=True)) / order.std(1, keepdim=True)

    one, other = ranks(first), ranks(second)
    return float((one * other).sum(1).mean() / (one.shape[1] - 1))


def compare(net: str, python: Path, options: argparse.Namespace, workspace: Path) -> list[dict[str, Any]]:
    """Measure all methods on a net."""
    record(net, options.seeds, workspace / f"{net}-runs")
    hand_over(workspace / f"{net}-runs", workspace / f"{net}.pt")
    found = []
    for method in options.methods:
        if net == "gpt" and method == "ekfac-exact":
            continue  # it would take 2,048 outputs of each sequence
        theirs = OURS[method]
        pairs = [
            (
                measure(sys.executable, "ours", net, method, workspace),
                measure(python, "kronfluence", net, theirs, workspace),
            )
            for _ in range(options.repeats)
        ]
        beside = [workspace / f"{net}-ours-{method}.pt", workspace / f"{net}-kronfluence-{theirs}.pt"]
        middle = [
            {key: statistics.median(pair[side][key] for pair in pairs) for key in ("cpu", "MiB")} for side in (0, 1)
        ]
        ratio = statistics.median(ours["cpu"] / other["cpu"] for ours, other in pairs)
        line = {"net": net, "runs": options.seeds, "method": method, "ratio": ratio, "agreement": agreement(*beside)}
        found.append(line | {"ours": middle[0], "kronfluence": middle[1]})
        print(json.dumps(found[-1]), flush=True)
    if "ekfac" in options.methods:
        fit = measure(sys.executable, "curvlinops", net, "ekfac", workspace)
        found.append({"net": net, "runs": options.seeds, "method": "curvlinops' fit", "curvlinops": fit})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Print the figures of each net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--environment", type=Path, help="the directory of kronfluence's environment")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each net")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workspace", type=Path, help="keep runs and scores in this directory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    for name in ("side", "method", "runs", "parameters", "output"):  # of a process that this file starts
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        (options.net,) = options.nets
        work(options)
        return
    if options.environment is None:
        parser.error("--environment is needed")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workspace = (options.workspace or Path(tempfile.mkdtemp())).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    python = environment(options.environment.absolute())
    found = [line for net in options.nets for line in compare(net, python, options, workspace)]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
