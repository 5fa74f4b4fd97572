"""Let other packages attribute the runs of the benchmark.

    python -m ground_truth.outside --work work --environments work/environments
    python -m ground_truth.leaderboard --work work

The first line records the 20 runs of ``leaderboard.py``, if that was not done, and hands their parameters, the examples
and the queries to ``benchmarks/peers.py``. It calls each package in an environment of its own, which is created from
PyPI if it does not exist, and keeps what it answers in ``work/TASK/outside``, one file a method. The second line scores
all files there beside this library's estimators. Another call does only what is missing.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers, problems
from benchmarks.side_by_side import environment, trial
from ground_truth.benchmark import TRUTHS, load
from ground_truth.leaderboard import recorded
from lightning_dtda import Ensemble

BOTH = ("dattri-cg-10", "dattri-cg-50", "kronfluence-ekfac", "kronfluence-ekfac-heuristic")
METHODS = {"concrete": (*BOTH, "dattri-trak"), "mnist": (*BOTH, "dattri-trak-of-margins")}
NO_UNIT = ("dattri-trak-of-margins",)


def hand_over(name: str, ensemble: Ensemble, path: Path) -> None:
    """Write what another package gets to know: parameters of the runs, examples and queries."""
    task = load(name)
    parts = [*task.train.tensors, *task.queries.tensors]
    of_queries = dict(zip(("inputs", "targets", "queries", "query_targets"), parts, strict=True))
    tensors = problems.tensors_of(ensemble) | of_queries
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in tensors.items()}, path)


def measured(name: str, path: Path) -> torch.Tensor:
    """Return the measurements ``(runs, queries)`` of the networks that were handed over."""
    problem = problems.load(name, str(path))
    with torch.no_grad():
        outputs = [problem.trained(run)(problem.asked.tensors[0]) for run in range(len(problem.final))]
        return torch.stack([problem.measurement(each, problem.asked.tensors[1]) for each in outputs])


def main() -> None:
    """Record if need be, hand over, let the packages answer, and keep their answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="a directory for runs and answers")
    parser.add_argument("--environments", required=True, type=Path, help="a directory for the packages' environments")
    parser.add_argument("--task", choices=list(TRUTHS), action="append", help="all by default")
    parser.add_argument(
        "--method", choices=sorted({*METHODS["concrete"], *METHODS["mnist"]}), action="append", help="all by default"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.task or TRUTHS:
        folder = options.work.resolve() / name
        handed, outside = folder / "handed-over.safetensors", folder / "outside"
        outside.mkdir(parents=True, exist_ok=True)
        hand_over(name, recorded(name, folder / "leaderboard"), handed)
        baseline = measured(name, handed)
        for method in [each for each in METHODS[name] if each in (options.method or METHODS[name])]:
            package, output = peers.METHODS[method][0], outside / f"{method}.safetensors"
            if output.exists():
                continue
            # absolute, not resolved: an environment's python is a link to one without its packages
            python, answer = environment(options.environments.absolute(), package), folder / f"{method}.safetensors"
            command = [python, "-m", "benchmarks.peers", "--problem", name, "--task", handed, "--method", method]
            figures = trial([*command, "--output", answer])
            print(f"{name}, {method}: {figures['cpu']:.0f} s of processor time", flush=True)
            tensors = {"responses": load_file(answer)["scores"]}
            if method not in NO_UNIT:
                tensors["baseline"] = baseline
            save_file(tensors, output)


if __name__ == "__main__":
    main()
