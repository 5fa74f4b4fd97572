"""Scores by other packages, for the comparisons, which run this file in a separate environment for each.

    python -m benchmarks.peers --method dattri-cg-10 --problem concrete --task task.safetensors --output scores.sf

Does not use lightning_dtda. The output has ``scores`` ``(runs, queries, examples)`` in the sign and unit of our
responses: the predicted change of the measurement if the example is removed, (1/N) grad m^T H^-1 grad l_n with H the
curvature of the mean loss, or the derivative of the training itself. Prints JSON: memory, and seconds for all runs,
including reading but not imports and a first run as a warm-up.

Workarounds for properties of kronfluence 1.0.1, dattri 0.3.0, dattri-llm 0.1.0, curvlinops 3.0.1, bergson 2.5.1 and
traker 0.3.2:

- dattri and traker average scores over checkpoints, so each run is scored separately.
- dattri sums the inverses over batches of the training set, so the set is passed as one batch.
- traker divides the inverse by its mean, so its scores have no unit; they are reported as they are.
- curvlinops has no scores, so gradients of single examples are computed with ``torch.func``.
- bergson's unroller is used outside its framework for language models, with the original batches and learning rates. It
  trains the runs again; one that is sensitive to rounding may end elsewhere.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problems import Problem, load
from benchmarks.side_by_side import account

PROJECTION = 2048
DAMPING = 0.1  # of TRAK's ridge and of conjugate gradients, in the unit of a curvature of the mean loss

# -- kronfluence


def kronfluence(problem: Problem, strategy: str, damping: float | None) -> Tensor:
    """Influence functions with the true Fisher matrix, as in the examples of kronfluence."""
    from kronfluence import analyzer, arguments
    from kronfluence import task as tasks

    class Task(tasks.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            outputs = model(batch[0])
            return problem.losses(outputs, problem.sampled(outputs.detach()) if sample else batch[1]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return problem.measurement(model(batch[0]), batch[1]).sum()

    scores = []
    for run in range(len(problem.final)):
        torch.manual_seed(run)  # of the sampled targets
        with tempfile.TemporaryDirectory() as directory:
            model = analyzer.prepare_model(problem.trained(run), Task())
            analysis = analyzer.Analyzer(
                *("problem", model, Task()), cpu=True, disable_tqdm=True, output_dir=directory, log_level=40
            )
            factors = arguments.FactorArguments(strategy=strategy)
            analysis.fit_all_factors("factors", problem.train, per_device_batch_size=problem.batch, factor_args=factors)
            analysis.compute_pairwise_scores(
                *("scores", "factors", problem.asked, problem.train),
                per_device_query_batch_size=len(problem.asked),
                per_device_train_batch_size=problem.batch,
                score_args=arguments.ScoreArguments(damping_factor=damping),
            )
            scores.append(analysis.load_pairwise_scores("scores")["all_modules"] / len(problem.train))
    return torch.stack(scores)


# -- curvlinops


def gradients(problem: Problem, model: nn.Module, names: list[str], data: DataLoader, of: Any) -> Iterator[Tensor]:
    """Yield gradients ``(B, P)`` of single examples by some parameters."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(some: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return of(functional_call(model, parameters | some, inputs[None]), targets[None]).sum()

    chosen = {name: parameters[name] for name in names}
    for inputs, targets in data:
        found = vmap(grad(one), (None, 0, 0))(chosen, inputs, targets)
        yield torch.cat([found[name].flatten(1) for name in names], 1)


def curvlinops(problem: Problem, curvature: str, damping: float) -> Tensor:
    """EK-FAC of linear and convolutional layers, or conjugate gradients on the Gauss-Newton matrix."""
    from curvlinops import (
        CGInverseLinearOperator,
        EKFACLinearOperator,
        GGNLinearOperator,
        KFACInverseLinearOperator,
    )

    scores = []
    for run in range(len(problem.final)):
        model = problem.trained(run)
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        known = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        named = dict(model.named_parameters())
        names = [name for name in (known if curvature == "ekfac" else named) if name in named]
        weights = [named[name] for name in names]
        is_sequence = problem.train[0][1].ndim == 1
        flat = nn.Sequential(model, nn.Flatten(0, -2)) if is_sequence else model
        regression = isinstance(problem.criterion, nn.MSELoss)
        data = [(inputs, y[:, None] if regression else y.flatten()) for inputs, y in problem.batches()]
        asked = DataLoader(problem.asked, len(problem.asked))
        (wanted,) = gradients(problem, model, names, asked, problem.measurement)
        if curvature == "ekfac":
            operator = EKFACLinearOperator(
                *(flat, problem.criterion, weights, data),
                check_deterministic=False,
                separate_weight_and_bias=False,
            )
            inverse: Any = KFACInverseLinearOperator(operator, damping=damping, use_exact_damping=True)
            solved = inverse @ wanted.T
        else:
            operator = GGNLinearOperator(flat, problem.criterion, weights, data, check_deterministic=False)
            damped = operator + damping * _identity_like(operator)
            solved = CGInverseLinearOperator(damped, max_iter=10, max_tridiag_iter=0, tolerance=1e-4) @ wanted.T
        rows = gradients(problem, model, names, DataLoader(problem.train, 64), problem.losses)
        scores.append(torch.cat([part @ solved for part in rows]).T.detach() / len(problem.train))
    return torch.stack(scores)


def _identity_like(operator: Any) -> Any:
    from curvlinops.examples import IdentityLinearOperator

    shapes = [tuple(shape) for shape in operator._in_shape]
    return IdentityLinearOperator(shapes, operator.device, operator.dtype)


# -- dattri


def whole(data: TensorDataset) -> DataLoader:
    """Return a loader of one batch, in order."""
    return DataLoader(data, len(data), shuffle=False)


Loss = Callable[[Tensor, Tensor], Tensor]


def dattri_task(problem: Problem, run: int, loss: Loss, target: Loss | None = None) -> Any:
    """Return dattri's description of a run; loss and target (the measurement) take outputs and targets."""
    from dattri.task import AttributionTask

    model, axes = problem.trained(run), problem.train[0][0].ndim

    def called(of: Loss, parameters: dict[str, Tensor], batch: Any) -> Tensor:
        inputs, targets = batch
        if inputs.ndim == axes:
            inputs, targets = inputs[None], targets[None]
        return of(functional_call(model, parameters, inputs), targets)

    def measurement(outputs: Tensor, targets: Tensor) -> Tensor:
        return problem.measurement(outputs, targets).sum()

    return AttributionTask(
        loss_func=partial(called, loss),
        model=model,
        checkpoints=problem.final[run],
        target_func=partial(called, target or measurement),
    )


@torch.no_grad()  # otherwise useless graphs are built and kept: seven times slower, 17 GiB
def dattri_cg(problem: Problem, iterations: int, damping: float) -> Tensor:
    """Conjugate gradients on the damped Hessian."""
    from dattri.algorithm.influence_function import IFAttributorCG

    # its Hessian's products are computed for all queries of a batch at once
    together = len(problem.asked) if problem.batch == len(problem.train) else 1
    scores = []
    for run in range(len(problem.final)):
        task = dattri_task(problem, run, lambda outputs, targets: problem.losses(outputs, targets).mean())
        attributor = IFAttributorCG(task, max_iter=iterations, regularization=damping)
        attributor.cache(whole(problem.train))
        asked = DataLoader(problem.asked, together, shuffle=False)
        scores.append(attributor.attribute(whole(problem.train), asked).T / len(problem.train))
    return torch.stack(scores)


def dattri_ekfac(problem: Problem) -> Tensor:
    """EK-FAC of the linear layers; others are left out."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return problem.losses(outputs, targets).mean()

    scores = []
    for run in range(len(problem.final)):
        asked = dattri_task(problem, run, loss)
        # the Fisher matrix is that of what it calls the target
        attributor = IFAttributorEKFAC(dattri_task(problem, run, loss, loss), damping=DAMPING)
        attributor.cache(whole(problem.train))
        attributor.task = asked
        found = attributor.attribute(whole(problem.train), whole(problem.asked))
        scores.append(found.T.detach() / len(problem.train))
    return torch.stack(scores)


def dattri_llm_ekfac(problem: Problem, damping: float) -> Tensor:
    """EK-FAC of the hooked layers, damped by a multiple of the mean eigenvalue."""
    from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor

    scores = []
    for run in range(len(problem.final)):
        with tempfile.TemporaryDirectory() as directory:
            settings = AttributionArguments(
                output_dir=directory,
                per_device_train_batch_size=problem.batch,
                per_device_eval_batch_size=len(problem.asked),
                use_cpu=True,
            )
            task = AttributionTask(
                loss_func=lambda model, batch: problem.losses(model(batch[0]), batch[1]).sum(),
                model=problem.trained(run),
                target_func=lambda model, batch: problem.measurement(model(batch[0]), batch[1]).sum(),
            )
            found = EKFACAttributor(settings, task=task).attribute(
                problem.train, problem.asked, damping=damping, relative_damping=True
            )
            scores.append(found.scores.T / len(problem.train))
    return torch.stack(scores)


# -- TRAK: of problems with one output, which is the measurement; and of classifiers, whose margin is the measurement


def ridge(problem: Problem, enlarged: float) -> float:
    """Return the damping of the projected Gram matrix that corresponds to DAMPING of the loss's Gauss-Newton matrix.

    That matrix is 2/N Phi^T Phi, with the gradients of predictions in the rows of Phi. Both packages divide gradients
    by the square root of the number of parameters; their projections enlarge the Gram matrix by a factor of their own.
    """
    parameters = sum(each.numel() for each in problem.final[0].values())
    return DAMPING * len(problem.train) / 2 * enlarged / parameters


@torch.no_grad()
def dattri_trak(problem: Problem) -> Tensor:
    """TRAK with predictions as model outputs."""
    from dattri.algorithm.trak import TRAKAttributor

    scores = []
    for run in range(len(problem.final)):
        model = problem.trained(run)

        def one_less_slope(parameters: Any, example: tuple[Tensor, Tensor], model: nn.Module = model) -> Tensor:
            # dattri multiplies by 1 - p, the slope of a cross entropy; the squared error's is 2 (f - y)
            outputs = functional_call(model, parameters, example[0]).squeeze(-1)
            return 1 - 2 * (outputs - example[1])

        attributor = TRAKAttributor(
            # what dattri calls a loss here is differentiated for Phi
            dattri_task(problem, run, lambda outputs, targets: outputs.sum()),
            one_less_slope,
            projector_kwargs={"proj_dim": PROJECTION, "proj_max_batch_size": 32, "proj_seed": run, "device": "cpu"},
            regularization=ridge(problem, 1),  # projected gradients keep their length
        )
        attributor.cache(whole(problem.train))
        # (2 Phi^T Phi + N damping)^-1 is half of what is inverted there
        scores.append(attributor.attribute(whole(problem.asked)).T / 2)
    return torch.stack(scores)


@torch.no_grad()
def dattri_trak_of_margins(problem: Problem) -> Tensor:
    """TRAK with margins as model outputs, and dattri's defaults; the scores have no unit."""
    from dattri.algorithm.trak import TRAKAttributor

    def probability(parameters: Any, example: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        inputs, target = example
        return (-problem.losses(functional_call(model, parameters, inputs[None]), target[None])).exp()

    scores = []
    for run in range(len(problem.final)):
        attributor = TRAKAttributor(
            dattri_task(problem, run, lambda outputs, targets: problem.measurement(outputs, targets).sum()),
            partial(probability, model=problem.trained(run)),
            projector_kwargs={"proj_seed": run},
        )
        attributor.cache(whole(problem.train))
        # an example supports the margin that is larger with it
        scores.append(-attributor.attribute(whole(problem.asked)).T)
    return torch.stack(scores)


@torch.no_grad()
def trak(problem: Problem) -> Tensor:
    """TRAK's own package, with predictions as model outputs."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class Prediction(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, target: Tensor) -> Tensor:
            return functional_call(model, (weights, buffers), inputs[None]).squeeze()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            outputs = functional_call(model, (weights, buffers), batch[0])
            return 2 * (outputs - batch[1][:, None]).detach()

    scores = []
    with tempfile.TemporaryDirectory() as directory:
        traker = TRAKer(
            *(problem.trained(0), Prediction(), len(problem.train)),
            save_dir=directory,
            device="cpu",
            proj_dim=PROJECTION,
            use_half_precision=False,
            lambda_reg=ridge(problem, PROJECTION),  # the projection's entries have variance 1
            logging_level=logging.ERROR,
        )
        for run, final in enumerate(problem.final):
            traker.load_checkpoint(final, run)
            for batch in whole(problem.train):
                traker.featurize(batch, num_samples=len(problem.train))
            traker.finalize_features([run])
            traker.start_scoring_checkpoint(f"run-{run}", final, run, len(problem.asked))
            for batch in whole(problem.asked):
                traker.score(batch, num_samples=len(problem.asked))
            scores.append(torch.as_tensor(traker.finalize_scores(f"run-{run}", [run])).T.clone())
    return torch.stack(scores)


# -- bergson


class Steps:
    """The batches of a run, in the form that bergson's trainer expects.

    Args:
        problem: The problem.
        run: Number of the run.
    """

    def __init__(self, problem: Problem, run: int) -> None:
        self.inputs, self.targets = problem.train.tensors
        self.order, self.device = problem.orders[run], torch.device("cpu")
        self.weights = nn.Parameter(torch.ones(len(self.inputs)))
        self.requires_grad = True

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rows = self.order[step]
        return {
            "input_ids": self.inputs[rows],
            "labels": self.targets[rows],
            "example_weight": self.weights[rows],
            "shift_loss_mask": torch.ones(len(rows)),
        }


class WeightedLoss(nn.Module):
    """A network that returns the weighted mean loss of a batch.

    Args:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.network, self.losses = problem.make(), problem.losses

    def forward(self, input_ids: Tensor, labels: Tensor, example_weight: Tensor, shift_loss_mask: Tensor) -> Tensor:
        """Return the loss."""
        return (example_weight * self.losses(self.network(input_ids), labels)).mean()


def bergson_unrolled(problem: Problem) -> Tensor:
    """Metagradients of the training (MAGIC), a sweep for each query; trainings by SGD."""
    import torchopt
    from bergson.magic.trainer import BackwardState, Trainer

    rates = problem.rates

    def rate(count: Any) -> Tensor:
        return rates[torch.as_tensor(count).long().clamp(max=len(rates) - 1)]

    scores = []
    for run in range(len(problem.final)):
        data, asked = Steps(problem, run), DataLoader(problem.asked, 1)
        model = WeightedLoss(problem)
        model.network.load_state_dict(problem.initial[run])
        trainer, state = Trainer.initialize(model, torchopt.sgd(rate, momentum=problem.momentum or 0.0))
        with tempfile.TemporaryDirectory() as directory:
            final = trainer.train(state, data, save_dir=directory).to("cpu").detach_()
            found = []
            for inputs, targets in asked:
                end = final.to("cpu")
                end.requires_grad = True
                named = {name.removeprefix("network."): each for name, each in end.params.items()}
                measurement = problem.measurement(functional_call(problem.make(), named, inputs), targets).sum()
                slopes = torch.autograd.grad(measurement, list(end.params.values()))
                floating = end.differentiable_tensors()[len(slopes) :]
                start = BackwardState(
                    dict(zip(end.params, slopes, strict=True)),
                    [torch.zeros_like(one) for one in floating],
                    torch.zeros_like(data.weights),
                )
                end.detach_()
                back = trainer.backward(directory, data, start, end, cleanup=False)
                found.append(-back.weight_grads.detach())
        scores.append(torch.stack(found))
    return torch.stack(scores)


Method = Callable[[Problem], Tensor]
METHODS: dict[str, tuple[str, Method]] = {
    "kronfluence-identity": ("kronfluence", partial(kronfluence, strategy="identity", damping=None)),
    "kronfluence-ekfac": ("kronfluence", partial(kronfluence, strategy="ekfac", damping=1e-8)),  # its default
    # a tenth of the mean eigenvalue
    "kronfluence-ekfac-heuristic": ("kronfluence", partial(kronfluence, strategy="ekfac", damping=None)),
    "curvlinops-ekfac": ("curvlinops", partial(curvlinops, curvature="ekfac", damping=1e-2)),
    "curvlinops-cg": ("curvlinops", partial(curvlinops, curvature="cg", damping=DAMPING)),
    "dattri-cg-10": ("dattri", partial(dattri_cg, iterations=10, damping=1e-2)),
    "dattri-cg-50": ("dattri", partial(dattri_cg, iterations=50, damping=1e-1)),
    "dattri-ekfac": ("dattri", dattri_ekfac),
    "dattri-trak": ("dattri", dattri_trak),
    "dattri-trak-of-margins": ("dattri", dattri_trak_of_margins),
    "trak": ("dattri", trak),
    "dattri-llm-ekfac": ("dattri-llm", partial(dattri_llm_ekfac, damping=0.1)),
    "bergson-unrolled": ("bergson", bergson_unrolled),
}
"""For each method, the package whose environment it runs in, and the function that computes its scores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--problem", required=True, choices=("concrete", "mnist", "cnn", "gpt"))
    parser.add_argument("--task", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--runs", type=int, help="of the first runs only")
    parser.add_argument("--queries", type=int, help="of the first queries only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    method = METHODS[options.method][1]

    def answer(runs: int | None, queries: int | None) -> None:
        problem = load(options.problem, options.task, queries).first(runs)
        scores = method(problem)
        assert scores.shape == (len(problem.final), len(problem.asked), len(problem.train)), scores.shape
        save_file({"scores": scores.detach().float().contiguous()}, Path(options.output))

    answer(1, 1)  # for its imports
    account(lambda: answer(options.runs, options.queries))


if __name__ == "__main__":
    main()
