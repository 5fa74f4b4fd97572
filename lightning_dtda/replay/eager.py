"""Derivatives of a step in plain eager autograd, one run and direction at a time: the reference, for any module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import grad

from lightning_dtda.errors import ReplayError
from lightning_dtda.replay.cut import Cuts, CutTensor, UnknownGraphError, edges_of, weighed, zeros
from lightning_dtda.replay.kernels import tolerated
from lightning_dtda.replay.outputs import Outputs
from lightning_dtda.replay.passes import Pass
from lightning_dtda.replay.replica import Replica
from lightning_dtda.replay.running_statistics import RunningStatistics
from lightning_dtda.replay.steps import ByName, MicroBatchInputs, StepBatch

_Observed: TypeAlias = tuple[Tensor, list[Tensor]]
"""The terms of a batch's examples, and the gradients that arrive at their rows."""

_IN_DOUBLE = 1e-8
"""Largest relative difference between two derivatives in double precision that counts as rounding."""


class Products(NamedTuple):
    r"""What the adjoint of a step needs, for R runs and Q directions.

    Args:
        terms: Terms :math:`d_n = \partial_{w_n} \langle g, v \rangle` ``(runs, queries, B)``, including the coefficient
            of the example in the step's loss.
        products: :math:`H v + \nabla_\theta \langle \mu, F \rangle` ``(runs, queries, P)``.
        statistics_cotangents: Cotangents of the running statistics before the step, each ``(runs, queries, ...)``.
        gradient: Gradient g ``(runs, P)``.
    """

    terms: Tensor
    products: Tensor
    statistics_cotangents: dict[str, Tensor]
    gradient: Tensor


class Eager:
    """Computes the derivatives of steps.

    Args:
        replica: Copy of the user's module.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.statistics = RunningStatistics(replica.module)
        self.cuts = Cuts()

    # -- stacked runs

    def gradient(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        r"""Return the gradient g of a step ``(runs, P)`` with example weights, and the updated buffers after it.

        Args:
            batch: Batch of the step.
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            weights: Example weights w ``(runs, B)``; ones if not given.
        """
        gradients, after = [], []
        names = self.replica.circumstances.updated_buffers
        for run, passes in enumerate(batch.passes):
            current = _of_run(buffers, run)
            total = torch.zeros_like(theta[run])
            for part, inputs in parts_of(passes):
                of_examples = None if weights is None else weights[run, part]
                with self.passed(inputs, theta[run], current, of_examples, create_graph=False) as one:
                    total += inputs.factor * self.replica.layout.flatten(one.gradient)
                    if inputs.keeps_statistics:
                        current |= {name: tensor.clone() for name, tensor in self.replica.buffers(names).items()}
                        current |= one.statistics
            gradients.append(total)
            after.append({name: current[name] for name in names})
        return torch.stack(gradients), _stacked(after)

    def products(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, directions: Tensor, statistics_cotangents: ByName
    ) -> Products:
        """Differentiate a step's gradient along directions v ``(runs, queries, P)``.

        Args:
            batch: Batch of the step.
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            directions: Directions v ``(runs, queries, P)``.
            statistics_cotangents: Cotangents of the running statistics after the step, each ``(runs, queries, ...)``.
        """
        runs, queries, _ = directions.shape
        terms = directions.new_zeros(runs, queries, batch.size)
        products = gradient = None
        before = {name: cotangents.clone() for name, cotangents in statistics_cotangents.items()}
        for run, passes in enumerate(batch.passes):
            for part, inputs in reversed(list(parts_of(passes))):
                with self.passed(inputs, theta[run], _of_run(buffers, run)) as one:
                    for query in range(queries):
                        along = directions[run, query]
                        direction = self._parameters(along if inputs.factor == 1 else along * inputs.factor)
                        cotangents = (
                            {name: c[run, query] for name, c in before.items()} if inputs.keeps_statistics else {}
                        )
                        is_last = query == queries - 1
                        curved, of_examples, of_statistics = one.products(direction, cotangents, is_last=is_last)
                        if products is None:  # not earlier: with a single query, the graph has been freed by now
                            products = torch.zeros_like(directions)
                        products[run, query] += self.replica.layout.flatten(curved)
                        del curved
                        terms[run, query, part] = of_examples
                        for name, cotangent in of_statistics.items():
                            before[name][run, query] = cotangent
                    gradient = torch.zeros_like(theta) if gradient is None else gradient
                    gradient[run] += inputs.factor * self.replica.layout.flatten(one.gradient)
        assert products is not None
        assert gradient is not None
        return Products(terms, products, before, gradient)

    def statistics_along(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, tangents: Tensor, before: ByName
    ) -> dict[str, Tensor]:
        """Return the tangents of the running statistics after a step, each ``(runs, removals, ...)``.

        Args:
            batch: Batch of the step.
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            tangents: Tangents of the parameters ``(runs, removals, P)``.
            before: Tangents of the running statistics before the step, each ``(runs, removals, ...)``.
        """
        if not before:
            return {}
        after = {name: tangent.clone() for name, tangent in before.items()}
        for run, passes in enumerate(batch.passes):
            for _, inputs in parts_of(passes):
                if not inputs.keeps_statistics:
                    continue
                with self.passed(inputs, theta[run], _of_run(buffers, run)) as one:
                    for removal in range(tangents.shape[1]):
                        own = {name: tangent[run, removal] for name, tangent in after.items()}
                        found = one.statistics_along(self._parameters(tangents[run, removal]), own)
                        for name, tangent in found.items():
                            after[name][run, removal] = tangent
        return after

    # -- one pass

    @contextmanager
    def passed(
        self,
        inputs: MicroBatchInputs,
        theta: Tensor,
        buffers: ByName,
        weights: Tensor | None = None,
        *,
        create_graph: bool = True,
        training: bool = True,
    ) -> Iterator[Pass]:
        """Run ``training_step`` for a micro-batch of a run; the pass is valid only inside the context.

        Args:
            inputs: Inputs of the micro-batch.
            theta: Parameters ``(P,)``.
            buffers: Buffers and frozen parameters by name.
            weights: Example weights w ``(B,)``; ones if not given.
            create_graph: Whether the gradient will be differentiated.
            training: Whether the module is in training mode.
        """
        replica = self.replica
        with replica.generators.kept(), replica.passing(training=training, twice=create_graph):
            replica.load(theta, {name: tensor.detach() for name, tensor in buffers.items()})
            yield self._pass(inputs, inputs.batch(), replica.parameters, buffers, weights, create_graph, training)

    def _pass(
        self,
        inputs: MicroBatchInputs,
        batch: Any,
        parameters: list[Tensor],
        buffers: ByName,
        weights: Tensor | None,
        create_graph: bool,
        training: bool = True,
    ) -> Pass:
        """Run ``training_step`` with the module's current parameters and buffers."""
        weights = parameters[0].new_ones(inputs.examples) if weights is None else weights
        names = self.statistics.names if training else []
        before = {name: buffers[name].detach().requires_grad_(create_graph) for name in names}
        followed: AbstractContextManager[dict[str, Tensor]]
        followed = self.statistics.followed(before) if training else nullcontext({})
        with followed as after:
            loss = self.replica.training_loss(batch, inputs.time, inputs.states)
        weights = weights.detach().requires_grad_(create_graph)
        return Pass(loss, self.cut(loss, inputs), parameters, weights, before, after, create_graph)

    def cut(self, loss: Tensor, inputs: MicroBatchInputs) -> list[CutTensor]:
        """Return the tensors at which weights act. For a new graph, they are found by leaving examples out.

        Raises:
            ReplayError: If there are none, or if another part of the gradient depends on the examples.
        """
        name = type(self.replica.module).__name__
        if loss.grad_fn is None:
            raise ReplayError(
                f"The loss of {name}.training_step does not depend on the trained parameters. Compute it without "
                "detach() or torch.no_grad(), and do not freeze all parameters that it depends on."
            )
        with suppress(UnknownGraphError):
            return self.cuts.find(loss, inputs.examples)
        tried: list[tuple[Tensor, int]] = []
        with self.replica.keeping_buffers():
            cut = self.cuts.learn(loss, inputs.examples, self._others(inputs, tried), name)
            if any(tensor.rows.repeats > 1 for tensor in cut) and self._are_interleaved(loss, cut, inputs):
                self.cuts.interleave()
                cut = self.cuts.find(loss, inputs.examples)
        self._check_beyond([(loss, inputs.examples), *tried], cut)
        return cut

    def _others(self, inputs: MicroBatchInputs, tried: list[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, int]]:
        """Yield the losses of batches with one example fewer or more, and append them to ``tried``."""
        name = type(self.replica.module).__name__
        failed: Exception | None = None
        for changed in inputs.less_or_more():
            batch = changed.batch()
            try:
                other = self.replica.training_loss(batch, inputs.time, inputs.states)
            except Exception as error:  # the user's code may raise anything for a batch of another size
                failed = error
                continue
            tried.append((other, changed.examples))
            yield tried[-1]
        if not tried:
            raise ReplayError(
                f"{name}.training_step fails for a batch with one example fewer or more than {inputs.examples} "
                f"({type(failed).__name__}: {failed}). Such batches are needed to find out which part of the loss "
                "belongs to which example. Make training_step accept batches of any size."
            ) from failed

    def _are_interleaved(self, loss: Tensor, cut: list[CutTensor], inputs: MicroBatchInputs) -> bool:
        """Return whether the rows of an example are adjacent, judged by which rows change when it is replaced."""
        direction = self._parameters(_direction(self.replica.layout.flatten(self.replica.parameters)))
        for position, replaced in inputs.replaced():
            other = self.replica.training_loss(replaced.batch(), inputs.time, inputs.states)
            pushed = [
                Outputs(of, z, self.replica.parameters, last_parametrised=False).push(direction)
                for of, z in ((loss, cut), (other, self.cuts.find(other, inputs.examples)))
            ]
            blocked, interleaved = 0.0, 0.0
            for tensor, one, two in zip(cut, *pushed, strict=True):
                if tensor.rows.repeats > 1 and one.shape == two.shape:
                    rows = (one - two).movedim(tensor.rows.axis, 0)
                    changes = rows.reshape(len(rows), -1).norm(dim=1)
                    blocked += float(changes.unflatten(0, (-1, inputs.examples))[:, position].sum())
                    interleaved += float(changes.unflatten(0, (inputs.examples, -1))[position].sum())
            if blocked or interleaved:
                return interleaved > blocked
        return False

    def _check_beyond(self, losses: Sequence[tuple[Tensor, int]], cut: list[CutTensor]) -> None:
        """Refuse a gradient that depends on the examples other than through the rows at which weights act."""
        replica = self.replica
        found = []
        for number, (loss, size) in enumerate(losses):
            try:
                of_loss = cut if number == 0 else self.cuts.find(loss, size)
            except UnknownGraphError:
                continue
            with weighed(of_loss, loss.new_zeros(size)):
                found.append(
                    grad(loss, replica.parameters, create_graph=number == 0, retain_graph=True, allow_unused=True)
                )
        tolerance = tolerated(replica.dtype, replica.device, _IN_DOUBLE)
        for parameter, name, *of_each in zip(replica.parameters, replica.layout.names, *found, strict=True):
            beyond = [zeros(one, parameter) for one in of_each]
            if not bool(beyond[0].detach().any()):
                continue
            allowed = tolerance * beyond[0].norm()
            depends = any(bool((other - beyond[0]).norm() > allowed) for other in beyond[1:])
            if not depends and beyond[0].requires_grad:
                slopes = grad(beyond[0].sum(), edges_of(cut), retain_graph=True, allow_unused=True)
                depends = any(slope is not None and bool(slope.any()) for slope in slopes)
            if depends:
                raise ReplayError(
                    f"The gradient of parameter {name} cannot be divided among the examples of a batch, because the "
                    "parameter acts on what was already summed over all of them (a learned weight between two losses, "
                    "a temperature of their similarities). Freeze the parameter, or use it before the sum over "
                    "examples."
                )

    def _parameters(self, vector: Tensor) -> list[Tensor]:
        return list(self.replica.layout.unflatten(vector).values())


def sharing(eager: Eager, inputs: MicroBatchInputs, theta: Tensor, buffers: ByName) -> dict[str, str]:
    """Determine what the examples of a batch share, and how the loss is reduced over them.

    Args:
        eager: Eager implementation that runs the passes.
        inputs: Inputs of the batch.
        theta: Parameters ``(P,)``.
        buffers: Buffers and frozen parameters by name.

    Returns:
        What the examples share in ``training`` and in ``evaluation`` mode: ``"none"``, ``"network"`` or ``"loss"``; and
        the ``reduction`` in evaluation mode: ``"mean"``, ``"sum"`` or ``"other"``.
    """
    direction = _direction(theta)
    training, evaluation = (_observed(eager, inputs, theta, buffers, direction, mode) for mode in (True, False))
    found = _shared(eager, inputs, theta, buffers, direction, training, True)
    # if equal to the bit, the module does the same in both modes, and the passes in evaluation mode can be skipped
    flat = [[terms, *arrived] for terms, arrived in (training, evaluation)]
    is_same = len(set(map(len, flat))) == 1 and all(map(torch.equal, *flat))
    return {
        "training": found,
        "evaluation": found if is_same else _shared(eager, inputs, theta, buffers, direction, evaluation, False),
        "reduction": _reduction(eager, inputs, theta, buffers, direction, evaluation),
    }


def _shared(
    eager: Eager,
    inputs: MicroBatchInputs,
    theta: Tensor,
    buffers: ByName,
    direction: Tensor,
    whole: _Observed,
    training: bool,
) -> str:
    """Determine what the examples of an observed batch share.

    One example is replaced by another. If that changes anything for the remaining examples, they share it: in the
    network through BatchNorm or mixup, in the loss through a divisor that depends on the batch, or a contrastive loss.
    """
    tolerance = tolerated(theta.dtype, theta.device, _IN_DOUBLE)
    for position, replaced in inputs.replaced():
        try:
            other = _observed(eager, replaced, theta, buffers, direction, training)
        except ReplayError:
            continue
        if [part.shape for part in whole[1]] != [part.shape for part in other[1]]:
            continue  # padding became shorter; it may not for another example
        kept = torch.arange(inputs.examples, device=theta.device) != position
        if any(
            bool(((a - b)[kept]).norm() > tolerance * a[kept].norm()) for a, b in zip(whole[1], other[1], strict=True)
        ):
            return "loss"
        if bool((whole[0] - other[0])[kept].norm() > tolerance * whole[0][kept].norm()):
            return "network"
    return "none"


def _reduction(
    eager: Eager, inputs: MicroBatchInputs, theta: Tensor, buffers: ByName, direction: Tensor, observed: _Observed
) -> str:
    """Determine how the loss is reduced over the examples of a batch observed in evaluation mode."""
    whole, _ = observed
    tolerance = tolerated(theta.dtype, theta.device, _IN_DOUBLE)
    if inputs.examples < 2:
        return "other"
    size = inputs.examples - 1
    try:
        part, _ = _observed(eager, inputs.of(range(size)), theta, buffers, direction, training=False)
    except ReplayError:
        return "other"
    whole = whole[:size]
    for kind, one, other in (("mean", whole * inputs.examples, part * size), ("sum", whole, part)):
        if bool((one - other).norm() <= tolerance * one.norm()):
            return kind
    return "other"


def _direction(theta: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(theta), generator=generator, dtype=torch.float64).to(theta)


def _observed(
    eager: Eager, inputs: MicroBatchInputs, theta: Tensor, buffers: ByName, direction: Tensor, training: bool
) -> _Observed:
    """Return the terms of the examples along a direction, and the gradients that arrive at their rows ``(B, ...)``."""
    with eager.passed(inputs, theta, buffers, training=training) as one:
        return one.terms(eager._parameters(direction)), one.arrived()


def parts_of(passes: Sequence[MicroBatchInputs]) -> Iterator[tuple[slice, MicroBatchInputs]]:
    """Yield the micro-batches of a step, each with the slice of the step's examples that it holds."""
    start = 0
    for inputs in passes:
        yield slice(start, start + inputs.examples), inputs
        start += inputs.examples


def _of_run(buffers: ByName, run: int) -> dict[str, Tensor]:
    return {name: tensor[run] for name, tensor in buffers.items()}


def _stacked(of_runs: Sequence[ByName]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in of_runs]) for name in of_runs[0]}
