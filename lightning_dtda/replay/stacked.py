"""Derivatives of a step for all runs and directions at once: eager autograd, traced once per shape and then vectorized.

The eager implementation itself is traced, so there is only one implementation of the derivatives. A trace contains
plain tensor operations without the overhead of Python, which dominates for a small network. Random numbers are inputs
of the trace; they are drawn beforehand from the recorded states, in the order of the training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.compatibility import tree_flatten
from lightning_dtda.replay.eager import Eager, Products, parts_of
from lightning_dtda.replay.examples import Examples
from lightning_dtda.replay.outputs import Outputs
from lightning_dtda.replay.passes import Pass
from lightning_dtda.replay.stand_ins import Time
from lightning_dtda.replay.steps import ByName, MicroBatchInputs, StepBatch
from lightning_dtda.replay.traces import (
    CannotTraceError,
    Trace,
    check_close,
    first_line,
    in_order,
    make_graph,
    other_times,
)

_log = logging.getLogger(__name__)

_TIMELY = "the loss depends on the epoch, the step or the learning rate"

OfPass = Callable[[Pass, list[Tensor]], list[Tensor]]
"""Function of a pass and further tensors that returns tensors."""


class Stacked(Eager):
    """Computes the derivatives of steps for all runs and directions at once, if a step can be traced.

    Args:
        eager: The eager implementation, whose module and cuts are shared. Steps that cannot be traced run eagerly.
    """

    _compared = 3, 2
    """Numbers of runs and directions for which a trace is compared with eager autograd. Both exceed one, since torch's
    ``vmap`` rules may be wrong when nested; they differ, so that mixed-up dimensions are noticed."""

    def __init__(self, eager: Eager) -> None:
        super().__init__(eager.replica)
        self.cuts = eager.cuts
        self._traces: dict[Any, Trace | None] = {}

    @property
    def has_traced(self) -> bool:
        """Whether at least one step was traced and agrees with eager autograd."""
        return any(trace is not None for trace in self._traces.values())

    @override
    def gradient(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        names = list(self.replica.circumstances.updated_buffers)
        weights = theta.new_ones(len(theta), batch.size) if weights is None else weights
        current = dict(buffers)
        total = torch.zeros_like(theta)
        for number, (part, inputs) in enumerate(parts_of(batch.passes[0])):
            found = self._run(self._gradient_of, batch, number, theta, current, [weights[:, part]])
            if found is None:
                return super().gradient(batch, theta, buffers, weights)
            gradient, *after = found
            total += inputs.factor * gradient
            if inputs.keeps_statistics:
                current |= dict(zip(names, after, strict=True))
        return total, {name: current[name] for name in names}

    @override
    def products(
        self, batch: StepBatch, theta: Tensor, buffers: ByName, directions: Tensor, statistics_cotangents: ByName
    ) -> Products:
        before = {name: statistics_cotangents[name] for name in sorted(statistics_cotangents)}
        terms, gradients, total = [], torch.zeros_like(theta), None
        for number, (_, inputs) in reversed(list(enumerate(parts_of(batch.passes[0])))):
            cotangents = before.values() if inputs.keeps_statistics else map(torch.zeros_like, before.values())
            along = [directions if inputs.factor == 1 else directions * inputs.factor, *cotangents]
            found = self._run(self._products_of, batch, number, theta, buffers, along, len(along))
            if found is None:
                return super().products(batch, theta, buffers, directions, statistics_cotangents)
            gradient, products, of_examples, *of_statistics = found
            gradients += inputs.factor * gradient[:, 0]
            # products that are the same for all directions may come as an expanded view
            total = products.contiguous() if total is None else total.add_(products)
            terms.append(of_examples)
            if inputs.keeps_statistics:
                before = dict(zip(before, of_statistics, strict=True))
        assert total is not None  # every step has a micro-batch
        return Products(torch.cat(terms[::-1], 2), total, before, gradients)

    # -- traces

    def _gradient_of(self, one: Pass, _weights: list[Tensor]) -> list[Tensor]:
        names = self.replica.circumstances.updated_buffers
        after = self.replica.buffers(names) | one.statistics
        return [self.replica.layout.flatten(one.gradient), *(after[name].clone() for name in names)]

    def _products_of(self, one: Pass, along: list[Tensor]) -> list[Tensor]:
        names, flatten = sorted(self.statistics.names), self.replica.layout.flatten
        curved, terms, of_statistics = one.products(
            self._parameters(along[0]), dict(zip(names, along[1:], strict=True))
        )
        return [flatten(one.gradient).detach(), flatten(curved), terms, *(of_statistics[name] for name in names)]

    def _run(
        self,
        function: OfPass,
        batch: StepBatch,
        number: int,
        theta: Tensor,
        buffers: ByName,
        extra: list[Tensor],
        directions: int = 0,
    ) -> list[Tensor] | None:
        """Apply a function to the passes of all runs for a micro-batch; return ``None`` if they cannot be traced.

        Args:
            function: Function of a pass.
            batch: Batch of the step.
            number: Number of the micro-batch.
            theta: Parameters ``(runs, P)``.
            buffers: Buffers and frozen parameters, each ``(runs, ...)``.
            extra: Example weights ``(runs, B)``, or tensors to differentiate along, each ``(runs, queries, ...)``.
            directions: Number of tensors to differentiate along; 0 if ``extra`` holds weights.
        """
        leaves = batch.leaves(number)
        inputs, states = batch.passes[0][number], [passes[number].states for passes in batch.passes]
        if leaves is None or any(other.keys() != states[0].keys() for other in states):
            return None
        shapes = [leaf.shape[1:] for leaf in leaves]
        key = (function.__name__, inputs.examples, inputs.keeps_statistics, frozenset(states[0]), *shapes)
        arguments = [theta, *in_order(buffers), *leaves, *extra]
        if key not in self._traces:
            self._traces[key] = None
            first = [part[(0,) * (2 if directions else 1)] for part in extra]
            sample = [part[0] for part in arguments[: -len(extra)]] + first
            try:
                self._traces[key] = self._trace(function, inputs, sorted(buffers), sample, directions)
            except Exception as error:  # the user's code may raise anything; torch cannot vectorize every operation
                name = type(self.replica.module).__name__
                _log.info("Steps of %s are run one by one, not stacked: %s", name, first_line(error))
        trace = self._traces[key]
        return None if trace is None else self._run_trace(trace, arguments, states)

    def _run_trace(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor] | None:
        return self._plainly(trace, arguments, states)

    def _plainly(self, trace: Trace, arguments: list[Tensor], states: list[ByName]) -> list[Tensor]:
        return trace.run(arguments, states)

    def _trace(
        self, function: OfPass, inputs: MicroBatchInputs, names: list[str], sample: list[Tensor], directions: int
    ) -> Trace:
        """Trace a function of a pass, and compare the trace with eager autograd.

        Args:
            function: Function of a pass.
            inputs: Inputs of the pass.
            names: Names of the buffers.
            sample: Parameters, buffers, the tensors of a batch, and the further arguments of the function.
            directions: Number of further arguments that differ between queries.

        Raises:
            CannotTraceError: If a trace cannot be made, or computes something else.
        """
        is_weighted = not directions
        extras = directions or 1

        def reference(theta: Tensor, extra: list[Tensor], time: Time) -> list[Tensor]:
            buffers = dict(zip(names, sample[1:], strict=False))
            weights = extra[0] if is_weighted else None
            here = replace(inputs, time=time)
            with self.passed(here, theta, buffers, weights, create_graph=not is_weighted) as one:
                return function(one, extra)

        def traced(
            parameters: list[Tensor], buffers: dict[str, Tensor], batch: Any, extra: list[Tensor]
        ) -> list[Tensor]:
            weights = extra[0] if is_weighted else None
            return function(self._pass(inputs, batch, parameters, buffers, weights, not is_weighted), extra)

        if inputs.states.keys() - {"cpu", "cuda"}:
            raise CannotTraceError("random numbers are drawn from generators other than torch's global ones")
        reference(sample[0], sample[-extras:], inputs.time)  # run first to learn where weights act
        structure = tree_flatten(inputs.batch())[1]
        trace = Trace(make_graph(self, traced, names, structure, sample), self, directions)
        runs, along = self._compared
        shape = (runs, along) if directions else (runs,)
        places = [(run, run % along)[: len(shape)] for run in range(runs)]
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(*shape, *part.shape, generator=generator).to(part) for part in sample[-extras:]]
        theta = torch.stack([sample[0] * (1 + 0.01 * run) for run in range(runs)])
        others = [torch.stack([tensor] * runs) for tensor in sample[1:-extras]]
        found = self._plainly(trace, [theta, *others, *given], [inputs.states] * runs)
        for place in places:
            check_close(found, place, reference(theta[place[0]], [part[place] for part in given], inputs.time))
        for time in other_times(inputs.time):
            check_close(found, places[0], reference(theta[0], [part[places[0]] for part in given], time), _TIMELY)
        return trace


OfExample = Callable[[Tensor, Outputs, list[Tensor], list[Tensor]], list[Tensor]]
"""Function of an example's loss, the network's outputs, the parameters and further tensors that returns tensors."""


def each_example(
    eager: Eager,
    kept: dict[Any, Trace | None],
    what: str,
    examples: Examples,
    indices: Tensor,
    theta: Tensor,
    buffers: ByName,
    time: Time,
    states: ByName,
    function: OfExample,
    extra: Sequence[Tensor] = (),
    calls: dict[str, list[Any]] | None = None,
) -> list[Tensor]:
    """Apply a function to the passes of examples, each in a batch of its own, in evaluation mode.

    Args:
        eager: Eager implementation that runs the module.
        kept: Cache of traces, by ``what`` and shapes.
        what: Name of the computation, for the cache and log messages.
        examples: All examples.
        indices: Indices of the B examples to use ``(B,)``.
        theta: Parameters ``(P,)``.
        buffers: Buffers and frozen parameters by name.
        time: Time of the training.
        states: States of the random number generators before each pass.
        function: Function to apply.
        extra: Further arguments of the function, each ``(B, ...)``.
        calls: Lists that each pass fills; they are emptied before each pass.

    Returns:
        The results, each ``(B, ...)``.
    """
    replica = eager.replica
    chosen = indices.tolist()  # read before tracing, which cannot read the values of tensors

    def of(
        batch: Any, parameters: list[Tensor], more: list[Tensor], number: int = 0, time: Time = time
    ) -> list[Tensor]:
        for of_layer in (calls or {}).values():
            of_layer.clear()
        index = chosen[number]
        inputs = MicroBatchInputs(1, time, states, lambda rows: examples.collated([index] * len(rows)))
        loss = replica.training_loss(batch, time, states)
        found = function(loss, Outputs(loss, eager.cut(loss, inputs), parameters), parameters, more)
        return [part.detach() for part in found]

    def alone(number: int, time: Time = time) -> list[Tensor]:
        with replica.generators.kept(), replica.passing(training=False):
            replica.load(theta, buffers)
            batch = examples.collated([chosen[number]])
            return of(batch, replica.parameters, [tensor[number] for tensor in extra], number, time)

    leaves = examples.tensors(indices[:, None]) if len(indices) > 1 else None
    if leaves is not None:
        shared, mapped = [theta, *in_order(buffers)], [*leaves, *extra]
        key = (what, frozenset(states), *(part.shape[1:] for part in mapped))
        if key not in kept:
            kept[key] = None
            wanted = [alone(0), alone(1)]  # this also learns where weights act
            try:
                structure = tree_flatten(examples.collated([0]))[1]
                sample = [*shared, *(part[0] for part in mapped)]
                graph = make_graph(
                    eager,
                    lambda parameters, _, batch, more: of(batch, parameters, more),
                    sorted(buffers),
                    structure,
                    sample,
                    training=False,
                )
                trace = Trace(graph, eager)
                found = trace.each(shared, [part[:2] for part in mapped], states)
                for number, alike in enumerate(wanted):
                    check_close(found, (number,), alike)
                for later in other_times(time):  # the trace is reused for other runs and steps
                    check_close(found, (0,), alone(0, later), _TIMELY)
                kept[key] = trace
            except Exception as error:  # the user's code may raise anything; torch cannot vectorize every operation
                _log.info("%s are computed one example at a time: %s", what, first_line(error))
        if (known := kept[key]) is not None:
            return known.each(shared, mapped, states)
    results = [alone(number) for number in range(len(chosen))]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]
