"""Scores by other packages, for ``influence_functions.py``, which runs this file in an environment of their own.

    python benchmarks/peers.py --method dattri-cg-10 --task task.safetensors --output scores.safetensors

Knows nothing of lightning_dtda. The task has the final parameters of the runs ``(runs, ...)``, the training rows'
``inputs`` and ``targets``, and the ``queries``; the measurement is the prediction. The output has ``scores``
``(runs, queries, examples)`` in the sign and unit of our responses: the predicted change of the measurement if the
example is removed, (1/N) grad m^T H^-1 grad l_n with H the curvature of the mean loss. What is printed is JSON: wall
seconds, reading and all runs included, imports and a first run for warming up not; and memory.

Faults of the packages that are worked around, as of kronfluence 1.0.1, dattri 0.3.0 and traker 0.3.2:

- dattri and traker average scores over checkpoints; each run is asked for on its own.
- dattri sums the inverses over batches of the training set; it is given as one batch.
- traker divides the inverse by its mean, so that its scores have no unit; they are given as they are.
"""

import argparse
import json
import logging
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PROJECTION = 2048
DAMPING = 0.1  # of TRAK's ridge, in the unit of a curvature of the mean loss; without it the matrix is singular


def network(width: int) -> nn.Sequential:
    """Return the network of ``examples/concrete``."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class Task:
    """What is asked: final parameters of the runs, training rows and queries."""

    def __init__(self, path: str) -> None:
        tensors = load_file(path)
        self.inputs, self.targets, self.queries = (tensors.pop(name) for name in ("inputs", "targets", "queries"))
        self.runs = [
            {name: each[run] for name, each in tensors.items()} for run in range(len(next(iter(tensors.values()))))
        ]
        self.train = TensorDataset(self.inputs, self.targets)
        # a query's target is never looked at
        self.asked = TensorDataset(self.queries, torch.zeros(len(self.queries)))

    def network(self, run: int) -> nn.Sequential:
        """Return the trained network of a run."""
        trained = network(len(self.runs[run]["0.bias"]))
        trained.load_state_dict(self.runs[run])
        return trained.eval()


def kronfluence(task: Task, runs: int, damping: float | None) -> Tensor:
    """EK-FAC with the true Fisher matrix, as in kronfluence's own example of a regression."""
    from kronfluence import analyzer, arguments
    from kronfluence import task as tasks

    class Regression(tasks.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0]).squeeze(-1)
            # (f - y)^2 is the negative log likelihood of a normal distribution of variance 1/2
            targets = torch.normal(outputs.detach(), math.sqrt(0.5)) if sample else batch[1]
            return (outputs - targets).square().sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return model(batch[0]).sum()

    scores = []
    for run in range(runs):
        torch.manual_seed(run)  # of the sampled targets
        with tempfile.TemporaryDirectory() as directory:
            model = analyzer.prepare_model(task.network(run), Regression())
            analysis = analyzer.Analyzer(
                "concrete", model, Regression(), cpu=True, disable_tqdm=True, output_dir=directory, log_level=40
            )
            analysis.fit_all_factors("factors", task.train, per_device_batch_size=len(task.train))
            analysis.compute_pairwise_scores(
                "scores",
                "factors",
                task.asked,
                task.train,
                per_device_query_batch_size=len(task.asked),
                per_device_train_batch_size=len(task.train),
                score_args=arguments.ScoreArguments(damping_factor=damping),
            )
            scores.append(analysis.load_pairwise_scores("scores")["all_modules"] / len(task.train))
    return torch.stack(scores)


def whole(data: TensorDataset) -> DataLoader:
    """Return a loader of one batch, in order."""
    return DataLoader(data, len(data), shuffle=False)


def dattri_task(task: Task, run: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return dattri's description of a run; the loss takes predictions and targets."""
    from dattri.task import AttributionTask

    model = task.network(run)

    def of_batch(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, batch[0]).squeeze(-1), batch[1])

    def prediction(parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, batch[0]).sum()

    return AttributionTask(loss_func=of_batch, model=model, checkpoints=task.runs[run], target_func=prediction)


@torch.no_grad()  # the graphs of the results would be built for nothing, and kept: seven times as slow, 17 GiB
def dattri_cg(task: Task, runs: int, iterations: int, damping: float) -> Tensor:
    """Conjugate gradients on the damped Hessian."""
    from dattri.algorithm.influence_function import IFAttributorCG

    scores = []
    for run in range(runs):
        attributor = IFAttributorCG(
            dattri_task(task, run, nn.functional.mse_loss), max_iter=iterations, regularization=damping
        )
        attributor.cache(whole(task.train))
        scores.append(attributor.attribute(whole(task.train), whole(task.asked)).T / len(task.train))
    return torch.stack(scores)


def ridge(task: Task, enlarged: float) -> float:
    """Return what is added to the projected Gram matrix, for a DAMPING of the mean loss's Gauss-Newton matrix.

    That matrix is 2/N Phi^T Phi, with the gradients of predictions in the rows of Phi. Both packages divide gradients
    by the square root of the number of parameters; their projections enlarge the Gram matrix by a factor of their own.
    """
    parameters = sum(each.numel() for each in task.runs[0].values())
    return DAMPING * len(task.train) / 2 * enlarged / parameters


@torch.no_grad()
def dattri_trak(task: Task, runs: int) -> Tensor:
    """TRAK with predictions as model outputs."""
    from dattri.algorithm.trak import TRAKAttributor

    scores = []
    for run in range(runs):
        model = task.network(run)

        def one_less_slope(parameters: Any, example: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            # dattri multiplies by 1 - p, the slope of a cross entropy; the squared error's is 2 (f - y)
            outputs = torch.func.functional_call(model, parameters, example[0]).squeeze(-1)
            return 1 - 2 * (outputs - example[1])

        attributor = TRAKAttributor(
            # what dattri calls a loss here is differentiated for Phi
            dattri_task(task, run, lambda outputs, targets: outputs.sum()),
            one_less_slope,
            projector_kwargs={"proj_dim": PROJECTION, "proj_max_batch_size": 32, "proj_seed": run, "device": "cpu"},
            regularization=ridge(task, 1),  # projected gradients keep their length
        )
        attributor.cache(whole(task.train))
        # (2 Phi^T Phi + N damping)^-1 is half of what is inverted there
        scores.append(attributor.attribute(whole(task.asked)).T / 2)
    return torch.stack(scores)


@torch.no_grad()
def trak(task: Task, runs: int) -> Tensor:
    """TRAK's own package, with predictions as model outputs."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Prediction(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, target: Tensor) -> Tensor:
            return torch.func.functional_call(model, (weights, buffers), inputs[None]).squeeze()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            outputs = torch.func.functional_call(model, (weights, buffers), batch[0])
            return 2 * (outputs - batch[1][:, None]).detach()

    scores = []
    with tempfile.TemporaryDirectory() as directory:
        traker = TRAKer(
            task.network(0),
            Prediction(),
            len(task.train),
            save_dir=directory,
            device="cpu",
            proj_dim=PROJECTION,
            use_half_precision=False,
            lambda_reg=ridge(task, PROJECTION),  # the projection's entries have variance 1
            logging_level=logging.ERROR,
        )
        for run in range(runs):
            traker.load_checkpoint(task.runs[run], run)
            for batch in whole(task.train):
                traker.featurize(batch, num_samples=len(task.train))
            traker.finalize_features([run])
            traker.start_scoring_checkpoint(f"run-{run}", task.runs[run], run, len(task.asked))
            for batch in whole(task.asked):
                traker.score(batch, num_samples=len(task.asked))
            scores.append(torch.as_tensor(traker.finalize_scores(f"run-{run}", [run])).T.clone())
    return torch.stack(scores)


METHODS: dict[str, Callable[[Task, int], Tensor]] = {
    "kronfluence-ekfac": partial(kronfluence, damping=1e-8),  # its default
    "kronfluence-ekfac-heuristic": partial(kronfluence, damping=None),  # a tenth of the mean eigenvalue
    "dattri-cg-10": partial(dattri_cg, iterations=10, damping=1e-2),
    "dattri-cg-50": partial(dattri_cg, iterations=50, damping=1e-1),
    "dattri-trak": dattri_trak,
    "trak": trak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method = METHODS[options.method]
    method(Task(options.task), 1)  # for its imports
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    task = Task(options.task)
    scores = method(task, len(task.runs))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert scores.shape == (len(task.runs), len(task.queries), len(task.inputs)), scores.shape
    save_file({"scores": scores.detach().float().contiguous()}, options.output)
    sys.stdout.flush()
    memory = {"peak MiB": peak / 1024, "after one run MiB": base / 1024}
    print("\n" + json.dumps({"seconds": seconds, "cpu": cpu} | memory))


if __name__ == "__main__":
    main()
