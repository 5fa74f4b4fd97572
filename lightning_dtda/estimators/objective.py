"""What a run's training minimised, at one of its checkpoints: derivatives, streamed over the training examples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.layer_gradients import LayerGradients, OtherWayError
from lightning_dtda.execution.memory import peak_memory
from lightning_dtda.optimizers import Hyperparameters
from lightning_dtda.replay import Draws, Replay
from lightning_dtda.replay.cut import zeros
from lightning_dtda.replay.outputs import Outputs, watched
from lightning_dtda.replay.passes import Pass
from lightning_dtda.replay.random_states import drawn_from
from lightning_dtda.replay.stacked import each_example
from lightning_dtda.replay.steps import MicroBatchInputs
from lightning_dtda.trajectory import ParameterLayout
from lightning_dtda.units import human_bytes

_log = logging.getLogger(__name__)

_LOOKED_AT, _DIRECTIONS = 32, 4
"""Examples, and random directions of their outputs, along which the loss's curvature is looked at."""

_MOST_DRAWS = 4
"""Draws of a random loss, of the whole data set: that many examples leave little noise in its mean."""

_LEARNED = 2
"""Examples from which it is seen by which layers' weights their gradients are known."""

_SEVERAL = 3
"""Vectors from which on the passes of single examples are worth it that layers that are not known take."""

_PAGES = 2**25
"""Bytes of temporaries from which on fresh pages cost more time than larger batches save."""

_LARGEST_CHUNK = 1024
"""Examples that are passed at once at the most: more gain nothing."""


class RootRows(NamedTuple):
    """Rows of a root of the Gauss-Newton matrix, those of B examples."""

    indices: Tensor
    """Which examples."""
    rows: Tensor
    """By the parameters that were asked for ``(B * C, n)``."""
    layers: list[tuple[Tensor, Tensor]]
    """By the outputs of each layer that was asked for ``(B * C, d_out)``, and its inputs ``(B, d_in)``."""


class Objective:
    r"""The mean training loss of a run at a step, with the module in evaluation mode.

    .. math:: L(\theta) = \frac1N \sum_n l_n(\theta) + \frac12 \sum_p \gamma_p \theta_p^2

    with :math:`\gamma` the weight decay of optimizers that add it to the gradient (a decoupled one is no part of any
    objective), and minus the losses for an optimizer that maximizes them. The losses are those that were trained on:
    where they depend on the batch (class weights normalised by it, a mean over its tokens), examples pass through the
    module in batches as large as those of the training, and :math:`l_n` has the coefficient that it has there.

    Args:
        replay: One run.
        step: t; ``None`` is the end of the training.
        memory: Bytes that what is computed at once may take.
        chunks: How many examples at a time stay within it, as found for runs of the same shape before.
        scale: s ``(P,)``, for other coordinates: of what follows, all derivatives are by :math:`\phi` at
            :math:`\theta + s \odot \phi`, so that matrices are those of the parameters with s on either side.
        decay: Added to :math:`\gamma` ``(P,)``.
        draws: Of a loss that draws random numbers, which is the mean over them.
        kept: Traces, kept from one run to the next.

    Raises:
        AttributionError: If the optimizer minimises by some parameters and maximizes by others.
    """

    def __init__(
        self,
        replay: Replay,
        step: int | None = None,
        *,
        memory: float,
        chunks: dict[str, int] | None = None,
        scale: Tensor | None = None,
        decay: Tensor | None = None,
        draws: Draws | None = None,
        kept: dict[Any, Any] | None = None,
    ) -> None:
        step = replay.steps if step is None else step
        self.run = replay.runs[0]
        self.step = step
        theta, buffers = replay.trained(step)
        self.theta = theta[0]
        self.memory = memory
        self._replay = replay
        self._buffers = {name: buffer[0] for name, buffer in buffers.items()}
        self._chunks = {} if chunks is None else chunks
        self._draws = draws or Draws()
        self._kept = {} if kept is None else kept
        self.scale = scale
        groups = replay.hyperparameters(max(step - 1, 0))
        self._sign = self._descended(groups)
        of_groups = [replay.update.update.penalty(group) for group in groups]
        penalty = replay.update.by_parameter(self.theta.new_tensor(of_groups))
        if scale is not None:
            penalty = penalty * scale.square()
        self.penalty = penalty if decay is None else penalty + decay
        r""":math:`\gamma` ``(P,)``, in the coordinates that are asked for."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.theta)

    @property
    def examples(self) -> int:
        """N."""
        return len(self._replay.examples)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters."""
        return self._replay.layout

    @property
    def module(self) -> LightningModule:
        """The module that examples pass through; it holds the run's parameters within :meth:`passes`."""
        return self._replay.eager.replica.module

    def is_of(self, replay: Replay, step: int | None, memory: float) -> bool:
        """Whether this is the objective of a replay's run at a step, in the parameters themselves."""
        mine = self.run, self.step, self.memory, self._replay.eager
        return mine == (replay.runs[0], replay.steps if step is None else step, memory, replay.eager)

    # -- passes of examples

    @contextmanager
    def passed(self, indices: Tensor, seed: int | None = None, create_graph: bool = True) -> Iterator[Pass]:
        """Pass some examples through the module together.

        Args:
            indices: Which.
            seed: Of the random numbers that the loss draws.
            create_graph: Whether derivatives of the gradient will be asked for.
        """
        with self._replay.eager.passed(
            self._inputs(indices, seed), self.theta, self._buffers, training=False, create_graph=create_graph
        ) as one:
            yield one

    @contextmanager
    def undifferentiated(
        self, indices: Tensor, seed: int | None, forwards: AbstractContextManager[object]
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """Pass some examples through the module together, and yield their loss and outputs before any backward pass.

        Args:
            indices: Which.
            seed: Of the random numbers that the loss draws.
            forwards: What the one forward pass is made in.
        """
        with self._loss(indices, seed, forwards) as (loss, inputs):
            yield loss, Outputs(loss, self._replay.eager.cut(loss, inputs), self._replay.eager.replica.parameters)

    @contextmanager
    def _loss(
        self,
        indices: Tensor,
        seed: int | None,
        forwards: AbstractContextManager[object] | None = None,
        twice: bool = True,
    ) -> Iterator[tuple[Tensor, MicroBatchInputs]]:
        inputs, replica = self._inputs(indices, seed), self._replay.eager.replica
        with replica.generators.kept(), replica.passing(training=False, twice=twice):
            replica.load(self.theta, self._buffers)
            with forwards or nullcontext():
                loss = replica.training_loss(inputs.batch(), inputs.time, inputs.states)
            yield loss, inputs

    def _inputs(self, indices: Tensor, seed: int | None) -> MicroBatchInputs:
        rows = indices.tolist()
        return MicroBatchInputs(
            len(rows),
            self._replay.time(self.step),
            {} if seed is None else self._states(seed),
            lambda some: self._replay.examples.collated([rows[row] for row in some]),
        )

    def passes(
        self, what: str, each: Callable[[Pass], object], chosen: Tensor | None = None
    ) -> Iterator[tuple[Tensor, float, Pass]]:
        r"""Pass all examples through the module, batch by batch, and draw by draw where the loss draws random numbers.

        Where examples share nothing but a mean, batches are as large as the memory allows. Else they are as large as in
        training, and made of examples at random, the same ones each time: the loss is

        .. math:: \frac1N \sum_b |b|\, L_b(\theta)

        Args:
            what: Is computed, for errors and for what is known of its memory.
            each: Computes it for a batch, when its memory is measured.
            chosen: Which examples; all if not given.

        Yields:
            Which examples, what the pass's share of their sum is to be multiplied with, and the pass.
        """
        for indices, seed, factor in self.parts(self._chunk(what, each), chosen):
            with self.passed(indices, seed) as one:
                yield indices, factor, one

    def parts(self, largest: int, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, int | None, float]]:
        """Yield which examples :meth:`passes` passes together, the seed of their draws, and the factor.

        Args:
            largest: How many at once, at most, where it does not matter to the loss.
            chosen: Which examples; all if not given.
        """
        for indices in self._batches(largest, chosen):
            for seed in self._seeds:
                yield indices, seed, self._sign * len(indices) / len(self._seeds)

    def slopes(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        r"""Return :math:`\langle \nabla l_n(\theta), v \rangle` for each of ``vectors`` ``(Q, P)``, as ``(Q, N)``.

        Where examples' gradients are known layer by layer, one backward pass does for all vectors. Else each vector
        takes one of its own, through the derivative of the gradient.

        Args:
            vectors: v.
            chosen: Which examples; all if not given. Others are left at zero.
        """
        scaled = self._scaled(vectors)
        result = vectors.new_zeros(len(vectors), self.examples)
        layers = self._layers
        if layers is None or (layers.others and len(vectors) < _SEVERAL):
            for indices, factor, one in self.passes(
                "slopes", lambda one: one.terms(self._parameters(scaled[0])), chosen
            ):
                for number, vector in enumerate(scaled):
                    result[number, indices] += factor * one.terms(self._parameters(vector))
            return result

        def of_batch(indices: Tensor, seed: int | None) -> Tensor:
            with layers.watched(len(indices)) as calls, self._loss(indices, seed, twice=False) as (loss, _):
                found = layers.products(loss, calls, scaled)
            if layers.others:
                found += scaled[:, self._of_others] @ self._gradients_by_others(indices, seed).T / len(indices)
            return found

        try:
            size = self.examples_at_once(
                f"slopes of {len(vectors)}", lambda indices: of_batch(indices, self._seeds[0]), _PAGES
            )
            for indices, seed, factor in self.parts(size, chosen):
                result[:, indices] += factor * of_batch(indices, seed)
        except OtherWayError:
            self._layers = None
            return self.slopes(vectors, chosen)
        return result

    def gradients(self, held: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the gradients of examples' losses ``(B, P)``, B examples at a time, and which examples they are.

        Args:
            held: Further vectors of P numbers for each example that the caller has at the same time. What it still has
                when it asks for the next ones counts too.
        """
        per_example = (2 + held) * self.size * self.theta.itemsize
        if per_example > self.memory:
            raise AttributionError(
                f"Gradients of one example take {human_bytes(per_example)}; {human_bytes(self.memory)} may be used. "
                "Raise memory_budget."
            )
        chunk = max(1, int(self.memory / per_example))
        for indices in self._batches(chunk):
            for some in torch.arange(len(indices)).split(chunk):
                total = self.theta.new_zeros(len(some), self.size)
                for seed in self._seeds:
                    self._add_gradients(total, indices, some, seed)
                yield indices[some], self._scaled(total)

    def _add_gradients(self, total: Tensor, indices: Tensor, some: Tensor, seed: int | None) -> None:
        """Add the gradients of a batch's losses at some places of it, of one draw, to ``total`` ``(B, P)``."""
        factor = self._sign * len(indices) / len(self._seeds)
        if (layers := self._layers) is not None:
            try:
                with layers.watched(len(indices)) as calls, self._loss(indices, seed, twice=False) as (loss, _):
                    layers.add_gradients(loss, calls, total, some, factor)
                if layers.others:
                    of_one = factor / len(indices)
                    total[:, self._of_others] += of_one * self._gradients_by_others(indices[some], seed)
                return
            except OtherWayError:
                self._layers = None
                total.zero_()
        if self._is_free:
            (rows,) = self._of_each(
                "gradients", indices, seed, lambda loss, outputs, parameters, extra: [_gradient(loss, parameters)]
            )
            total += rows * (factor / len(indices))
            return
        with self.passed(indices, seed) as one:
            for place, row in enumerate(some.tolist()):
                total[place] += factor * self.layout.flatten(one.share_of(row))

    def hessian_products(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the Hessian of L times each of ``vectors`` ``(Q, P)``, or that of the ``chosen`` examples' mean."""

        def product(one: Pass, direction: list[Tensor]) -> Tensor:
            return self.layout.flatten(one.products(direction)[0])

        return self._products("Hessian products", product, vectors, chosen)

    def gauss_newton_products(self, vectors: Tensor) -> Tensor:
        r"""Return the Gauss-Newton matrix of L times each of ``vectors`` ``(Q, P)``.

        .. math:: G = \frac1N \sum_n J_n^\top \nabla^2\ell_n(z_n) J_n + \nabla^2 R(\theta) +
            \operatorname{diag}(\gamma), \qquad J_n = \frac{d z_n}{d \theta}

        with what the loss has of the parameters beside the network's outputs, R: a penalty in ``training_step``.
        """

        def product(one: Pass, direction: list[Tensor]) -> Tensor:
            outputs = one.outputs
            product = self.layout.flatten(outputs.pull(outputs.curve(outputs.push(direction))))
            return product if one.beyond is None else product + self.layout.flatten(one.curve_beyond(direction))

        return self._products("Gauss-Newton products", product, vectors)

    def fisher_products(self, vectors: Tensor) -> Tensor:
        r"""Return the Fisher matrix of the training labels times each of ``vectors`` ``(Q, P)``.

        .. math:: F = \frac1N \sum_n \nabla l_n \nabla l_n^\top + \operatorname{diag}(\gamma)
        """

        def product(one: Pass, direction: list[Tensor]) -> Tensor:
            weights = one.terms(direction)
            found = self.layout.flatten(one.weighted(weights))
            found = found if one.beyond is None else found - self.layout.flatten(one.beyond)
            # of a mean over B examples, each term and each gradient is one B-th
            return self._sign * len(weights) * found

        return self._products("Fisher products", product, vectors)

    def _products(
        self, what: str, product: Callable[[Pass, list[Tensor]], Tensor], vectors: Tensor, chosen: Tensor | None = None
    ) -> Tensor:
        """Return a matrix times each of ``vectors`` ``(Q, P)``: the mean of what it is of batches, and the decay."""
        scaled = self._scaled(vectors)
        result = torch.zeros_like(vectors)
        count = self.examples if chosen is None else len(chosen)
        for _, factor, one in self.passes(what, lambda one: product(one, self._parameters(scaled[0])), chosen):
            for number, vector in enumerate(scaled):
                result[number] += factor / count * product(one, self._parameters(vector))
        return self._scaled(result).addcmul_(vectors, self.penalty)

    # -- roots of the Gauss-Newton matrix

    @cached_property
    def outputs(self) -> int:
        """C, the number of the network's outputs for an example.

        Raises:
            AttributionError: If the loss of the batch is no mean over examples, or depends on parameters past all
            outputs.
        """
        self.refuse_root("A root of the Gauss-Newton matrix")
        with self.passed(torch.arange(1), self._seeds[0]) as one:
            return sum(part.numel() for part in one.outputs.gradient())

    @cached_property
    def lacks_curvature(self) -> str | None:
        """Why the Gauss-Newton matrix says nothing of the loss; ``None`` where it does. Seen on one batch."""
        chunk = self._chunk("loss curvatures", lambda one: one.outputs.gradient())
        indices = self._batches(chunk)[0][:_LOOKED_AT]
        generator = torch.Generator().manual_seed(0)
        curvatures = []
        with self.passed(indices, self._seeds[0]) as one:
            for _ in range(_DIRECTIONS):
                along = [
                    torch.randn(tuple(part.shape), generator=generator, dtype=torch.float64).to(part)
                    for part in one.outputs.gradient()
                ]
                curved = one.outputs.curve(along)
                curvatures.append(float(sum((u * c).sum() for u, c in zip(along, curved, strict=True))))
        if not any(curvatures) and one.beyond is None:
            return "the loss has no curvature in the network's outputs (an absolute error?)"
        if self._sign * min(curvatures) < -1e-6 * max(map(abs, curvatures)):
            return "the loss is not convex in the network's outputs"
        return None

    def loss_roots(self, indices: Tensor) -> Tensor:
        """Return symmetric roots of the examples' losses' Hessians by their outputs ``(B, C, C)``.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        count = self.outputs
        total = self.theta.new_zeros(len(indices), count, count)
        for seed in self._seeds:
            try:
                (hessians,) = self._of_each(
                    "loss Hessians", indices, seed, lambda loss, outputs, parameters, extra: [outputs.hessian()]
                )
                total += hessians * (self._sign / len(self._seeds))
            except RuntimeError as error:
                raise AttributionError(
                    "The network has other numbers of outputs for other examples, so that the Gauss-Newton matrix has "
                    f'no root of one shape ({error}). Use GaussNewton(solver="cg") or Hessian(...).'
                ) from error
        return self.roots_of(total)

    def roots_of(self, hessians: Tensor) -> Tensor:
        """Return symmetric roots of losses' Hessians by their outputs ``(B, C, C)``.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        values, vectors = torch.linalg.eigh(hessians)
        self.refuse_concave(values)
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    def refuse_concave(self, values: Tensor) -> None:
        """Refuse a loss whose Hessians by the outputs have negative eigenvalues.

        Raises:
            AttributionError: If there are some, beyond rounding.
        """
        floor = -self.theta.new_tensor(torch.finfo(self.theta.dtype).eps).sqrt() * values.abs().amax()
        if bool((values < floor).any()):
            raise AttributionError(
                f"The training loss of {self.run.path} is not convex in the network's outputs (smallest eigenvalue "
                f"{float(values.min()):.2g}): its Gauss-Newton matrix has no root. Use Hessian(...) or ExactHessian()."
            )

    def roots(self, columns: Tensor | None = None, layers: Sequence[str] = ()) -> Iterator[RootRows]:
        r"""Yield rows of a root of the Gauss-Newton matrix, those of B examples at a time.

        .. math:: A_n = \left(\nabla^2\ell_n(z_n)\right)^{1/2} J_n, \qquad
            G = \frac1N \sum_n A_n^\top A_n + \operatorname{diag}(\gamma)

        Args:
            columns: The parameters by which to differentiate; ``None`` is all of them.
            layers: Names of submodules that are called once, with one tensor, and whose inputs and derivatives are
                wanted as well.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        width = (self.size if columns is None else len(columns)) + self.size // 4
        per_example = 3 * self.outputs * max(width, 1) * self.theta.itemsize
        chunk = min(_LARGEST_CHUNK, max(1, int(self.memory / per_example)))
        for indices in torch.arange(self.examples).split(chunk):
            yield self.root_rows(indices, columns, layers)

    def root_rows(self, indices: Tensor, columns: Tensor | None = None, layers: Sequence[str] = ()) -> RootRows:
        """Return what :meth:`roots` yields, of some examples."""
        roots = self.loss_roots(indices)

        def rows(loss: Tensor, outputs: Outputs, parameters: list[Tensor], extra: list[Tensor]) -> list[Tensor]:
            of_layers = [calls[name][0] for name in layers]
            by = [*parameters, *(result for _, result in of_layers)]
            found = [outputs.pull(outputs.split(column), by) for column in extra[0].unbind(1)]
            of_parameters = torch.stack([self.layout.flatten(one[: len(parameters)]) for one in found])
            if len(extra) > 1:
                of_parameters = of_parameters[:, extra[1]]
            derivatives = [
                torch.stack([one[len(parameters) + n].reshape(-1) for one in found]) for n in range(len(layers))
            ]
            return [of_parameters, *derivatives, *(value.reshape(-1) for value, _ in of_layers)]

        key = f"roots {' '.join(layers)}"
        # which columns is given to each example, so that one trace does for all that are asked for
        chosen = [] if columns is None else [columns.expand(len(indices), -1)]
        with watched(self.module, layers) as calls:
            found = self._of_each(key, indices, self._seeds[0], rows, [roots, *chosen], calls=calls)
        of_parameters, *rest = found
        derivatives, inputs = rest[: len(layers)], rest[len(layers) :]
        if self.scale is not None:
            of_parameters = of_parameters * (self.scale if columns is None else self.scale[columns])
        pairs = [(of_one.flatten(0, 1), value) for of_one, value in zip(derivatives, inputs, strict=True)]
        return RootRows(indices, of_parameters.flatten(0, 1), pairs)

    def calls(self, names: Sequence[str], examples: int = 1) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return what some submodules are called with, and return, for the first examples."""
        seed = self._seeds[0]  # known before the module is watched: it is seen from a pass
        with watched(self.module, names) as calls, self._loss(torch.arange(examples), seed):
            return calls

    # -- how it is done

    @cached_property
    def layers(self) -> LayerGradients | None:
        """Layers by whose weights examples' gradients are known, as seen from a few examples; ``None`` without any."""
        indices, seed = self._batches(_LEARNED)[0], self._seeds[0]
        known = LayerGradients(self.module, self.layout)
        try:
            with self.passed(indices, seed) as one:
                beyond = one.weighted(torch.zeros(len(indices), dtype=self.theta.dtype, device=self.theta.device))
                shares = [one.share_of(row) for row in range(min(_LEARNED, len(indices)))]
            penalty = self.layout.flatten(beyond)
            of_examples = torch.stack([self.layout.flatten(share) for share in shares]) - penalty
            with known.watched(len(indices)) as calls, self._loss(indices, seed, twice=False) as (loss, _):
                known.learn(loss, calls, of_examples)
        except Exception as error:  # whatever the user's code does with a batch of two, or positions of each example
            _log.info("No layer's gradients are known: %s", error)
            return None
        self._has_penalty = bool(penalty.any())
        return None if known.is_empty else known

    @cached_property
    def _layers(self) -> LayerGradients | None:
        """The known layers, where they and passes of single examples make up whole gradients."""
        # a pass of one has the penalty in it, and another loss where that depends on the batch
        if (known := self.layers) is None or (known.others and (self._has_penalty or not self._is_free)):
            return None
        return known

    @cached_property
    def _of_others(self) -> Tensor:
        """Where the parameters lie that are of no known layer."""
        starts = [0, *accumulate(self.layout.sizes)]
        numbers = [] if self._layers is None else self._layers.others
        return torch.cat([torch.arange(starts[n], starts[n + 1], device=self.theta.device) for n in numbers])

    def _gradients_by_others(self, indices: Tensor, seed: int | None) -> Tensor:
        """Return examples' gradients ``(B, n)`` by parameters that are of no known layer, each in a batch of one."""
        numbers = [] if self._layers is None else self._layers.others

        def rows(loss: Tensor, _outputs: Outputs, parameters: list[Tensor], _extra: list[Tensor]) -> list[Tensor]:
            return [_gradient(loss, [parameters[number] for number in numbers])]

        return self._of_each(f"gradients by {numbers}", indices, seed, rows)[0]

    def _of_each(
        self,
        what: str,
        indices: Tensor,
        seed: int | None,
        function: Callable[[Tensor, Outputs, list[Tensor], list[Tensor]], list[Tensor]],
        extra: Sequence[Tensor] = (),
        calls: dict[str, list[Any]] | None = None,
    ) -> list[Tensor]:
        """Apply a function to each example's own pass: all at once where a pass can be traced, else one by one."""
        return each_example(
            self._replay.eager,
            self._kept,
            what,
            self._replay.examples,
            indices,
            self.theta,
            self._buffers,
            self._replay.time(self.step),
            {} if seed is None else self._states(seed),
            function,
            extra,
            calls,
        )

    @cached_property
    def _is_free(self) -> bool:
        """Whether the loss of a batch is the mean of losses of its examples alone."""
        shared = self.run.manifest.shared
        return shared["evaluation"] == "none" and shared["reduction"] == "mean"

    @cached_property
    def has_root(self) -> bool:
        """Whether the Gauss-Newton matrix has a root whose rows are those of single examples."""
        if not self._is_free or self._seeds != [None]:
            return False
        try:
            with self.passed(torch.arange(1)) as one:
                return one.beyond is None
        except Exception:  # whatever the user's code does with a batch of one
            return False

    def refuse_root(self, what: str) -> None:
        """Refuse what needs a root.

        Raises:
            AttributionError: If there is none.
        """
        if not self.has_root:
            raise AttributionError(
                f"{what} needs a loss that is the mean of losses of single examples and draws nothing at random; that "
                f"of {type(self.module).__name__} is not (class weights, a mean over tokens, a sum, noise ...). Use "
                'GaussNewton(solver="cg") or Hessian(...).'
            )

    @cached_property
    def _seeds(self) -> list[int | None]:
        """Of the draws of a loss that is random; one without a seed of any other."""
        before, generators = self._states(0), self._replay.eager.replica.generators
        with self._loss(torch.arange(min(2, self.examples)), 0):
            is_random = bool(drawn_from(before, generators.states()))
        return list(self._draws.of(-1)[:_MOST_DRAWS]) if is_random else [None]

    def _states(self, seed: int) -> dict[str, Tensor]:
        generators = self._replay.eager.replica.generators
        with generators.kept():
            generators.seed(seed)
            return generators.states()

    def _batches(self, largest: int, chosen: Tensor | None = None) -> tuple[Tensor, ...]:
        """Split examples into batches: of the training's size where the loss depends on it, else of the given size."""
        if self._is_free:
            return (torch.arange(self.examples) if chosen is None else chosen).split(min(largest, _LARGEST_CHUNK))
        if chosen is None:
            chosen = torch.randperm(self.examples, generator=torch.Generator().manual_seed(0))
        return chosen.split(len(self.run.micro_batches(0)[0].indices))

    def _chunk(self, what: str, each: Callable[[Pass], object]) -> int:
        """Return how many examples at a time may be passed for what is computed of a pass."""

        def run(indices: Tensor) -> None:
            with self.passed(indices, self._seeds[0]) as one:
                each(one)

        return self.examples_at_once(what, run)

    def examples_at_once(self, what: str, run: Callable[[Tensor], object], enough: float = inf) -> int:
        """Return how many examples at a time stay within the memory, where their number does not matter to the loss.

        Args:
            what: Is computed.
            run: Computes it for some examples.
            enough: Bytes of which more are of no use.

        Raises:
            AttributionError: If not even one does.
        """
        if not self._is_free:
            return self.examples
        if what not in self._chunks:
            # the module keeps what it needs for its outputs, per example; measured on two sizes, since much is shared
            few, many = min(2, self.examples), min(8, self.examples)
            run(torch.arange(few))  # the first call keeps what is no part of a chunk
            alone, more = (peak_memory(partial(run, torch.arange(count)), self.theta.device) for count in (few, many))
            per_example = max((more - alone) / max(many - few, 1), alone / few / 8, 1)
            if alone > self.memory:
                raise AttributionError(
                    f"{what[0].upper() + what[1:]} of {few} examples take {human_bytes(alone)}; "
                    f"{human_bytes(self.memory)} may be used. Raise memory_budget, or ask fewer queries at a time."
                )
            some = few + (min(self.memory, max(enough, alone)) - alone) // per_example
            self._chunks[what] = int(min(self.examples, _LARGEST_CHUNK, some))
        return self._chunks[what]

    def _descended(self, groups: Sequence[Hyperparameters]) -> float:
        """Return the sign of the loss in what the optimizer descends."""
        maximizes = {bool(group.get("maximize")) for group in groups}
        if len(maximizes) > 1:
            raise AttributionError(
                f"The optimizer of {self.run.path} minimises the loss by some parameters and maximizes it by others, "
                "which is the training of no objective. Use UnrolledDifferentiation(), which follows the steps."
            )
        return -1.0 if maximizes.pop() else 1.0

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Return vectors by the other coordinates: what a derivative by them is of one by the parameters."""
        return vectors if self.scale is None else vectors * self.scale

    def _parameters(self, vector: Tensor) -> list[Tensor]:
        return list(self.layout.unflatten(vector).values())


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([zeros(one, like).reshape(-1) for one, like in zip(found, parameters, strict=True)])
