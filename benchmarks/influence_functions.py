r"""Influence functions compared with those of other packages (``peers.py``): time, memory and fidelity. UCI Concrete.

    python -m benchmarks.influence_functions --data concrete.txt --runs runs/concrete --environments peers \
        --truth concrete_truth.safetensors --exact exact.safetensors --json result.json

20 runs x 20 queries x 927 examples, as trained by ``examples/concrete``; the measurement is the prediction. The runs,
the ground truth (``concrete_truth.py``: 40 removals of a tenth of the rows, 192 retrainings each) and the exact
responses (unrolling without a horizon) are created if they do not exist, and so is an environment for each of the other
packages, from PyPI. bergson's unroller takes minutes for each run, so it is used for one run and three queries only,
and only its agreement with the exact responses and its time for each are reported.

Every method runs in a separate process with the same number of threads, and is timed inside: all runs, including
reading, excluding imports. In each repeat, the reference, the first of ``--ours``, runs directly before every other
method, and the ratios of the first table are between the two; the second table has the ratios of each package to each
of ours, within a repeat. Seconds, memory and ratios are medians over repeats; CPU time is in brackets next to wall
time, for shared machines.

The scores (see ``scoring.py``) are Spearman's correlations over removals with real retraining. Variance and Wasserstein
distance need responses in the measurement's unit: brackets contain the score that a method would reach if all its
scores were multiplied by the single factor that fits the exact responses best. Scale is the slope of the scores over
the exact responses, as the median over queries.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import ours, peers, scoring
from benchmarks.concrete_truth import QUERIES, RATE, WIDTH, check, concrete, record, truth
from benchmarks.problems import tensors_of
from benchmarks.side_by_side import PACKAGES, environment, trial
from examples.concrete.concrete import ConcreteRegressor
from lightning_dtda import Ensemble
from lightning_dtda.statistics.differences import PAPERS

SLOW = {"bergson-unrolled": ["--runs", 1, "--queries", 3]}
"""Methods that compute only a part of the scores."""
PEERS = [
    *("dattri-cg-10", "dattri-cg-50", "dattri-ekfac", "dattri-trak", "trak", "dattri-llm-ekfac", "kronfluence-ekfac"),
    *("kronfluence-ekfac-heuristic", "curvlinops-ekfac", "curvlinops-cg", "bergson-unrolled"),
]


def hand_over(ensemble: Ensemble, data, path: Path) -> None:
    """Write the input of the other packages: runs, rows and queries."""
    rows = dict(zip(("inputs", "targets"), data.train.tensors, strict=True))
    tensors = tensors_of(ensemble) | rows | {"queries": data.validation.tensors[0][:QUERIES]}
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)


def check_exact(exact: dict[str, torch.Tensor], ensemble: Ensemble, data) -> None:
    """Refuse exact responses of other runs, by comparing the networks' predictions."""
    module = ConcreteRegressor(WIDTH, RATE)
    for run, measured in zip(ensemble, exact["baseline"], strict=True):
        module.load_state_dict(run.theta(run.steps))
        with torch.no_grad():
            predictions = module(data.validation.tensors[0][:QUERIES])
        torch.testing.assert_close(measured.float(), predictions, msg=f"--exact is not about {run.name}. Delete it.")


def ratios(figures: dict[str, list[list[dict[str, float]]]], own: list[str]) -> dict[str, dict[str, float]]:
    """Return for each method the median over repeats of its seconds over those of each of ours in the same repeat."""
    seconds = {
        name: [statistics.median(figure["seconds"] for figure in repeat) for repeat in repeats]
        for name, repeats in figures.items()
    }
    return {
        name: {
            each: statistics.median(a / b for a, b in zip(seconds[name], seconds[each], strict=True)) for each in own
        }
        for name in figures
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, result: dict) -> list[str]:
    """Return a method's line of the table."""

    def of(difference: str) -> str:
        raw, low, high = result["score"][difference]
        brackets = "" if difference == "mean" else f" ({result['score rescaled'][difference][0]:.3f})"
        return f"{raw:.3f} [{low:.2f}, {high:.2f}]{brackets}"

    return [
        name,
        f"{result['seconds']:.1f} ({result['cpu']:.1f})",
        f"{result['ratio']['seconds']:.2f} ({result['ratio']['cpu']:.2f})",
        f"{result['peak MiB']:.0f}",
        *(of(difference) for difference in PAPERS),
        f"{result['score of the mean, one run alone']:.3f}",
        f"{result['scale']:.3g}",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the table as text")
    parser.add_argument("--runs", required=True, type=Path, help="the directory of the recorded runs")
    parser.add_argument("--truth", required=True, type=Path, help="the file of the retrained measurements")
    parser.add_argument("--exact", required=True, type=Path, help="the file of the exact responses")
    parser.add_argument("--environments", required=True, type=Path, help="the directory of the packages' environments")
    parser.add_argument("--ours", nargs="*", default=list(ours.METHODS), choices=ours.METHODS)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=peers.METHODS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scores", type=Path, help="directory to keep the scores of all methods in")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if not options.ours:
        parser.error("--ours needs at least one method, the reference of the ratios")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    workspace = (options.scores or Path(tempfile.mkdtemp())).resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    data_path, runs, exact_path = (str(path.resolve()) for path in (options.data, options.runs, options.exact))
    data, ensemble = concrete(data_path), record(data_path, options.runs)
    print(check(ensemble, data), flush=True)
    retrained = truth(data, options.truth)
    hand_over(ensemble, data, workspace / "task.safetensors")

    def of_ours(name: str, output: object) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.ours", "--problem", "concrete", "--data", data_path]
        command += ["--runs", runs, "--method", name, "--output", output, "--threads", options.threads]
        return trial(command, options.threads)

    def run(name: str) -> dict[str, float]:
        output = workspace / f"{name}.safetensors"
        if name in ours.METHODS:
            return of_ours(name, output)
        # absolute: resolved, it is no environment
        python = environment(options.environments.absolute(), peers.METHODS[name][0])
        command = [python, "-m", "benchmarks.peers", "--problem", "concrete", "--task", workspace / "task.safetensors"]
        command += ["--method", name, "--output", output, "--threads", options.threads, *SLOW.get(name, ())]
        return trial(command, options.threads)

    if not options.exact.exists():
        of_ours("unrolled", exact_path)
    exact = load_file(exact_path)
    check_exact(exact, ensemble, data)
    reference, *others = [*options.ours, *options.peers]
    # of each method, by repeat; the reference is measured several times in each
    figures: dict[str, list[list[dict[str, float]]]] = {name: [] for name in (reference, *others)}
    beside: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu": []} for name in others}
    for repeat in range(options.repeats):
        figures[reference].append([])
        for name in others or [reference]:
            figures[reference][-1].append(before := run(reference))
            if name != reference:
                figures[name].append([figure := run(name)])
                for clock, quotients in beside[name].items():
                    quotients.append(figure[clock] / before[clock])
            print(f"repeat {repeat + 1}: {name} {figures[name][-1][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)

    results = {}
    for name, repeats in figures.items():
        trials = [figure for repeat in repeats for figure in repeat]
        scores = load_file(workspace / f"{name}.safetensors")["scores"]
        if name in SLOW:
            part = exact["scores"][: scores.shape[0], : scores.shape[1]]
            apart = float((scores - part).norm() / part.norm())
            each = statistics.median(figure["cpu"] for figure in trials) / len(scores) / scores.shape[1]
            print(f"{name}: {each:.1f} s (CPU) for a query of a run, {apart:.1g} of the exact responses apart")
            continue
        results[name] = scoring.evaluate(scores, exact["scores"], exact["baseline"], retrained) | {
            key: statistics.median(figure[key] for figure in trials) for key in trials[0]
        }
        quotients = beside.get(name, {"seconds": [1.0], "cpu": [1.0]})
        results[name] |= {"ratio": {clock: statistics.median(each) for clock, each in quotients.items()}}
        results[name]["repeats"] = repeats
        # a wrong sign, or another order of the examples, would be ours to mend
        assert results[name]["correlation with exact responses"] > 0, name
    limits = scoring.ceiling(exact["baseline"], retrained)

    header = [
        "method",
        "seconds (CPU)",
        f"times {reference}",
        "peak MiB",
        "mean",
        "variance",
        "W2",
        "one run alone",
        "scale",
    ]
    rows = [row(name, result) for name, result in results.items()]
    for label, key in (("half of the retrainings against the other", "split_half"), ("noise ceiling", "ceiling")):
        rows.append([label, "", "", "", *(f"{limit[key]:.3f}" for limit in limits.values()), "", ""])
    print(table(header, rows), end="\n\n")
    times = ratios(figures, options.ours)
    header = ["seconds over those of", *options.ours]
    print(
        table(
            header,
            [
                [name, *(f"{times[name][own]:.2f}" for own in options.ours)]
                for name in options.peers
                if name not in SLOW
            ],
        )
    )
    if options.json:
        settings = {"threads": options.threads, "repeats": options.repeats, "torch": torch.__version__}
        everything = {"settings": settings, "packages": PACKAGES, "methods": results, "noise": limits, "ratios": times}
        options.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
