r"""Influence functions and unrolling of a CNN and a GPT, compared with other packages: time, memory, agreement.

    python -m benchmarks.influence_of_nets --nets cnn gpt --environments peers --json result.json

The networks and their data are those of ``problems.py``, trained for a few epochs; the measurement is the loss on 20
queries. Missing environments of the packages are created from PyPI.

A method's time is the CPU seconds, on one thread, of its whole call: ``attribute(...)`` for ours; fitting factors and
computing scores, including files, for the others. Imports and a first call for one run are not counted. Every method
runs in a separate process. In each repeat, our method and the one it is compared with run one after the other, and
their ratio is taken within the repeat. Memory is the peak resident memory of the process. Agreement is Spearman's
correlation over examples between the scores of two methods, averaged over queries and runs: of ours with the one it is
compared with, and, with ``--exact``, of both with the exact responses (``UnrolledDifferentiation(horizon=None)``).

kronfluence and curvlinops leave all layers except linear and two-dimensional convolutional ones out of EK-FAC; dattri
leaves out all except linear ones. kronfluence and curvlinops draw one label for each output, which is their default;
EK-FAC here takes one random combination of the outputs (``samples=1``), or its default, which also sets the scale.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import peers
from benchmarks.ours import NetModule
from benchmarks.problems import BATCH, EPOCHS, NETS, parts, tensors_of
from benchmarks.side_by_side import environment, trial
from lightning_dtda import Ensemble, TrajectoryRecorder

FEW = 2
"""Number of queries of the first run for bergson's unroller, which takes a sweep for each."""

PAIRS = {
    "cnn": [
        ("identity", "kronfluence-identity"),
        ("ekfac-one-sample", "kronfluence-ekfac-heuristic"),
        ("ekfac", "kronfluence-ekfac-heuristic"),
        ("ekfac-one-sample", "curvlinops-ekfac"),
        ("ekfac-one-sample", "dattri-llm-ekfac"),
        ("cg-10", "curvlinops-cg"),
        ("hessian-cg-10-1e-2", "dattri-cg-10"),
        ("unrolled", "bergson-unrolled"),
    ],
    "gpt": [
        ("identity", "kronfluence-identity"),
        ("ekfac-one-sample", "kronfluence-ekfac-heuristic"),
        ("ekfac", "kronfluence-ekfac-heuristic"),
        ("ekfac-one-sample", "curvlinops-ekfac"),
        ("ekfac-one-sample", "dattri-llm-ekfac"),
    ],
}
"""Our methods, and the methods of other packages that each is compared with."""


def record(net: str, runs: int, root: Path) -> None:
    """Train and record the runs of a net."""
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
        trainer.fit(NetModule(net), DataLoader(parts(net)[0], BATCH, shuffle=True))


def agreement(first: Tensor, second: Tensor) -> float:
    """Return the mean rank correlation over examples between scores ``(runs, queries, examples)``.

    Packages return NaN for a run in which they fail; such queries are left out.
    """
    runs, queries = (min(sizes) for sizes in zip(first.shape[:2], second.shape[:2], strict=True))
    pair = [scores[:runs, :queries].flatten(0, 1) for scores in (first, second)]
    usable = torch.stack(pair).isfinite().all(2).all(0)
    ranks = [scores[usable].argsort(1).argsort(1).double() for scores in pair]
    one, other = ((order - order.mean(1, keepdim=True)) / order.std(1, keepdim=True) for order in ranks)
    return float((one * other).sum(1).mean() / (one.shape[1] - 1))


class Comparison:
    """The methods on one net.

    Args:
        net: Name of the net.
        options: Command line options.
        workspace: Directory of runs and scores.
    """

    def __init__(self, net: str, options: argparse.Namespace, workspace: Path) -> None:
        self.net, self.options, self.workspace = net, options, workspace
        self.runs, self.task = workspace / f"{net}-runs", workspace / f"{net}.safetensors"
        if not self.runs.exists():
            record(net, options.seeds, self.runs)
        save_file(tensors_of(Ensemble.open(self.runs)), self.task)
        if options.exact and not self.path("unrolled").exists():
            self.of_ours("unrolled")

    def path(self, method: str) -> Path:
        """Return the path of a method's scores."""
        return self.workspace / f"{self.net}-{method}.safetensors"

    def scores(self, method: str) -> Tensor:
        """Return a method's scores."""
        return load_file(self.path(method))["scores"]

    def of_ours(self, method: str) -> dict[str, float]:
        """Run one of our methods."""
        command = [sys.executable, "-m", "benchmarks.ours", "--problem", self.net, "--runs", self.runs]
        return trial([*command, "--method", method, "--output", self.path(method)])

    def of_peer(self, method: str) -> dict[str, float]:
        """Run another package's method."""
        python = environment(self.options.environments.absolute(), peers.METHODS[method][0])
        command = [python, "-m", "benchmarks.peers", "--problem", self.net, "--task", self.task]
        part = ["--runs", 1, "--queries", FEW] if method == "bergson-unrolled" else []
        return trial([*command, "--method", method, "--output", self.path(method), *part])

    def line(self, ours: str, theirs: str) -> dict[str, Any]:
        """Run a pair of methods; return its figures."""
        pairs = [(self.of_ours(ours), self.of_peer(theirs)) for _ in range(self.options.repeats)]
        sides = [
            {key: statistics.median(pair[side][key] for pair in pairs) for key in ("cpu", "peak MiB")}
            for side in (0, 1)
        ]
        scores = [self.scores(method) for method in (ours, theirs)]
        share = scores[1][..., 0].numel() / scores[0][..., 0].numel()  # of the runs and queries
        if self.options.exact:
            for side, found in zip(sides, scores, strict=True):
                side["agreement with exact"] = agreement(found, self.scores("unrolled"))
        for side, found in zip(sides, scores, strict=True):
            side["runs that are not finite"] = int((~found.isfinite().flatten(1).all(1)).sum())
        return {
            "net": self.net,
            "runs": self.options.seeds,
            "ours": {"method": ours, **sides[0]},
            "theirs": {"method": theirs, **sides[1]},
            "ratio for a query": share * statistics.median(mine["cpu"] / their["cpu"] for mine, their in pairs),
            "agreement": agreement(*scores),
        }


def main() -> None:
    """Print the figures of each net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--peers", nargs="*", default=list(peers.METHODS), choices=peers.METHODS)
    parser.add_argument("--environments", type=Path, required=True, help="the directory of the packages' environments")
    parser.add_argument("--exact", action="store_true", help="say how far methods agree with exact unrolling")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each net")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workspace", type=Path, help="keep runs and scores in this directory")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workspace = (options.workspace or Path(tempfile.mkdtemp())).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    found = []
    for net in options.nets:
        comparison = Comparison(net, options, workspace)
        for ours, theirs in PAIRS[net]:
            if theirs not in options.peers:
                continue
            try:
                found.append(comparison.line(ours, theirs))
            except RuntimeError as error:  # in one package; the figures of the others are still useful
                found.append({"net": net, "theirs": theirs, "failed": str(error)})
            print(json.dumps(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
