"""UCI Concrete: does exact removal predict retraining better than derivatives do, and what does noise allow?

    python -m benchmarks.concrete_exact --data concrete.txt --truth concrete_truth.safetensors --output concrete-exact

Records 64 runs as ``examples/concrete`` does, stacked. Repeats each without each of the tenths of ``concrete_truth``
(``ExactRemoval``), and predicts the same by influence functions. Prints the scores of 20 and of 64 runs against the
retrainings with their intervals, the noise ceiling, and how well 64 of the retrainings predict the others. Takes seven
minutes on one core, and as long again for the truth. Another call continues.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.concrete_truth import QUERIES, concrete, truth
from benchmarks.scoring import ceiling, predicted, scores
from examples.concrete.concrete import ConcreteRegressor
from examples.concrete.evaluation import make_trainer
from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, attribute, record
from lightning_dtda.estimators import ExactRemoval, GaussNewton
from lightning_dtda.evaluation.functional import linear_datamodeling_score

RUNS = (20, 64)


def main() -> None:
    """Record, retrain, attribute, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the table as text")
    parser.add_argument("--truth", type=Path, required=True, help="the file of the retrained measurements")
    parser.add_argument("--output", type=Path, required=True, help="a directory for runs and attributions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = concrete(options.data)
    recorder = TrajectoryRecorder(options.output / "runs")
    record(lambda: (make_trainer(), ConcreteRegressor(), data), recorder, max(RUNS), stacked=True, progress=False)
    real = truth(data, options.truth)
    asked = (Ensemble.open(options.output / "runs"), ConcreteRegressor(), data)
    question = {"queries": Subset(data.validation, range(QUERIES)), "measurement": "prediction", "progress": False}
    tenths = [sorted(rows) for rows in real["removed"].tolist()]
    exact = attribute(*asked, **question, removals=tenths, estimator=ExactRemoval(), output=options.output / "exact")
    curvature = InfluenceFunctions(GaussNewton(damping=0.03))
    linear = attribute(*asked, **question, estimator=curvature, output=options.output / "gauss-newton")
    samples: dict[str, Tensor] = {
        "exact removal": (exact.baseline.double()[..., None] + exact.responses[:].double()).permute(2, 0, 1),
        "Gauss-Newton, damping 0.03": predicted(linear.responses[:], linear.baseline, real["removed"]),
    }
    for name, found in samples.items():
        for runs in RUNS:
            print(f"{name}, {runs} runs: {scores(found[:, :runs], exact.baseline[:runs], real)}", flush=True)
    print(f"noise of the truth: {ceiling(exact.baseline, real)}")
    most = max(RUNS)
    others = real["measurements"][:, most:], real["baseline"][most:], "wasserstein"
    retrained = real["measurements"][:, :most], real["baseline"][:most]
    for name, those in {
        f"{most} retrainings": retrained,
        "exact removal": (samples["exact removal"], exact.baseline),
    }.items():
        score = float(linear_datamodeling_score(*those, *others, replicates=0)["score"])
        print(f"Wasserstein distance of the other retrainings, predicted by {name}: {score:.3f}")


if __name__ == "__main__":
    main()
