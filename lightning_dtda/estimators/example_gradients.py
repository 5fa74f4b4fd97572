"""The losses of a run's training examples at a checkpoint, and their gradients, streamed over the examples."""

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
from lightning_dtda.replay.outputs import Outputs
from lightning_dtda.replay.passes import Pass
from lightning_dtda.replay.random_states import drawn_from
from lightning_dtda.replay.stacked import each_example
from lightning_dtda.replay.steps import MicroBatchInputs
from lightning_dtda.trajectory import ParameterLayout
from lightning_dtda.units import human_bytes

_log = logging.getLogger(__name__)

_MOST_DRAWS = 4
"""Maximum number of passes over the data set with a random loss: the examples already average out most of the noise."""

_LEARNED = 2
"""Number of examples used to find out which layers' gradients are known."""

_SEVERAL = 3
"""Number of vectors at which layer-wise gradients pay off although some parameters need passes of single examples."""

_PAGES = 2**25
"""Bytes of temporaries above which fresh memory pages cost more time than larger batches save."""

LARGEST_CHUNK = 1024
"""Maximum number of examples in one pass; more save nothing."""


class Chunk(NamedTuple):
    """How many examples a computation takes at once.

    Args:
        examples: Maximum number of examples.
        per_example: Bytes per example.
    """

    examples: int
    per_example: int


class ExampleGradients:
    """Passes of training examples through a run's module at one step, and the gradients of their losses.

    The base class of :class:`~lightning_dtda.estimators.objective.Objective`, which documents the arguments.
    """

    def __init__(
        self,
        replay: Replay,
        step: int | None = None,
        *,
        memory: float,
        chunks: dict[str, Chunk] | None = None,
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
        r"""Weight decay :math:`\gamma` ``(P,)``, in the scaled coordinates if there is a scale."""

    @property
    def size(self) -> int:
        """Number of parameters P."""
        return len(self.theta)

    @property
    def examples(self) -> int:
        """Number of training examples N."""
        return len(self._replay.examples)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the parameters."""
        return self._replay.layout

    @property
    def module(self) -> LightningModule:
        """The module that examples pass through; it holds the run's parameters during :meth:`passes`."""
        return self._replay.eager.replica.module

    def is_of(self, replay: Replay, step: int | None, memory: float) -> bool:
        """Whether this is the objective of a replay's run at a step with this memory, in unscaled coordinates."""
        mine = self.run, self.step, self.memory, self._replay.eager
        return mine == (replay.runs[0], replay.steps if step is None else step, memory, replay.eager)

    # -- passes of examples

    @contextmanager
    def passed(self, indices: Tensor, seed: int | None = None, create_graph: bool = True) -> Iterator[Pass]:
        """Pass some examples through the module together.

        Args:
            indices: Indices of the examples.
            seed: Seed of the random numbers that the loss draws.
            create_graph: Whether derivatives of the gradient will be needed.
        """
        with self._replay.eager.passed(
            self._inputs(indices, seed), self.theta, self._buffers, training=False, create_graph=create_graph
        ) as one:
            yield one

    @contextmanager
    def undifferentiated(
        self, indices: Tensor, seed: int | None, forwards: AbstractContextManager[object]
    ) -> Iterator[tuple[Tensor, Outputs]]:
        """Pass some examples through the module together, and yield their loss and outputs without a backward pass.

        Args:
            indices: Indices of the examples.
            seed: Seed of the random numbers that the loss draws.
            forwards: Context of the forward pass.
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
        r"""Pass all examples through the module, batch by batch, and once for each draw if the loss is random.

        If the loss is a mean over single examples, batches are as large as the memory allows. Otherwise, they have the
        size of the training's batches and consist of random examples, the same ones each time. The loss is

        .. math:: \frac1N \sum_b |b|\, L_b(\theta)

        Args:
            what: Name of what is computed, for errors and as the key of the memory found.
            each: Function that computes it for a batch, to find its memory.
            chosen: Indices of the examples; all if not given.

        Yields:
            Indices of the examples, the factor of the pass in the sum over examples, and the pass.
        """
        for indices, seed, factor in self.parts(self._chunk(what, each), chosen):
            with self.passed(indices, seed) as one:
                yield indices, factor, one

    def parts(self, largest: int, chosen: Tensor | None = None) -> Iterator[tuple[Tensor, int | None, float]]:
        """Yield the examples that :meth:`passes` passes together, the seed of their draws, and the factor.

        Args:
            largest: Maximum number of examples in a batch, if the loss does not depend on it.
            chosen: Indices of the examples; all if not given.
        """
        for indices in self._batches(largest, chosen):
            for seed in self._seeds:
                yield indices, seed, self._sign * len(indices) / len(self._seeds)

    def slopes(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        r"""Return :math:`\langle \nabla l_n(\theta), v \rangle` for each of ``vectors`` ``(Q, P)``, as ``(Q, N)``.

        If examples' gradients are known layer by layer, one backward pass serves all vectors. Otherwise, each vector
        takes its own double backward pass.

        Args:
            vectors: Vectors v.
            chosen: Indices of the examples; all if not given. The result is zero for the others.
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
        """Yield indices of B examples at a time, and the gradients of their losses ``(B, P)``.

        Args:
            held: Number of additional vectors of length P per example that the caller holds at the same time, including
                those it still holds when it asks for the next batch.
        """
        per_example = (2 + held) * self.size * self.theta.itemsize
        if per_example > self.memory:
            raise AttributionError(
                f"Gradients of one example take {human_bytes(per_example)}; {human_bytes(self.memory)} can be used. "
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
        """Add gradients for one draw to ``total`` ``(B, P)``, for the examples at the places ``some`` of a batch."""
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

    # -- implementation

    @cached_property
    def layers(self) -> LayerGradients | None:
        """Layers with known gradients of single examples, determined on a few of them; ``None`` if there are none."""
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
        except Exception as error:  # the user's code may fail in any way on such a batch
            _log.info("Gradients of single examples are not available layer by layer: %s", error)
            return None
        self._has_penalty = bool(penalty.any())
        return None if known.is_empty else known

    @cached_property
    def _layers(self) -> LayerGradients | None:
        """The known layers, if they and passes of single examples together give complete gradients."""
        # a pass of one example includes the penalty, and has a different loss if that depends on the batch
        if (known := self.layers) is None or (known.others and (self._has_penalty or not self._is_free)):
            return None
        return known

    @cached_property
    def _of_others(self) -> Tensor:
        """Indices of the parameters that do not belong to a known layer."""
        starts = [0, *accumulate(self.layout.sizes)]
        numbers = [] if self._layers is None else self._layers.others
        return torch.cat([torch.arange(starts[n], starts[n + 1], device=self.theta.device) for n in numbers])

    def _gradients_by_others(self, indices: Tensor, seed: int | None) -> Tensor:
        """Return examples' gradients ``(B, n)`` by parameters outside known layers, from batches of one."""
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
        """Apply a function to a separate pass of each example: all at once if a pass can be traced, else one by one."""
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
        """Whether the loss of a batch is the mean over losses of single examples."""
        shared = self.run.manifest.shared
        return shared["evaluation"] == "none" and shared["reduction"] == "mean"

    @cached_property
    def _seeds(self) -> list[int | None]:
        """Seeds of the draws if the loss is random; otherwise ``[None]``."""
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
        """Split examples into batches: of the training's size if the loss depends on it, else of the given size."""
        if self._is_free:
            return (torch.arange(self.examples) if chosen is None else chosen).split(min(largest, LARGEST_CHUNK))
        if chosen is None:
            chosen = torch.randperm(self.examples, generator=torch.Generator().manual_seed(0))
        return chosen.split(len(self.run.micro_batches(0)[0].indices))

    def _chunk(self, what: str, each: Callable[[Pass], object]) -> int:
        """Return how many examples can be passed at once for a computation on a pass."""

        def run(indices: Tensor) -> None:
            with self.passed(indices, self._seeds[0]) as one:
                each(one)

        return self.examples_at_once(what, run)

    def examples_at_once(self, what: str, run: Callable[[Tensor], object], enough: float = inf) -> int:
        """Return how many examples at a time fit in the memory; all of them if the loss depends on their number.

        Args:
            what: Name of what is computed.
            run: Function that computes it for some examples.
            enough: Number of bytes above which larger batches save no time.

        Raises:
            AttributionError: If not even a few examples fit.
        """
        if not self._is_free:
            return self.examples
        if what not in self._chunks:
            # memory per example is found with two batch sizes, because much of the memory is shared
            few, many = min(2, self.examples), min(8, self.examples)
            run(torch.arange(few))  # the first call allocates what is not part of a chunk
            alone, more = (peak_memory(partial(run, torch.arange(count)), self.theta.device) for count in (few, many))
            per_example = max((more - alone) / max(many - few, 1), alone / few / 8, 1)
            if alone > self.memory:
                raise AttributionError(
                    f"{what[0].upper() + what[1:]} of {few} examples take {human_bytes(alone)}; "
                    f"{human_bytes(self.memory)} can be used. Raise memory_budget, or use fewer queries at a time."
                )
            some = few + (min(self.memory, max(enough, alone)) - alone) // per_example
            self._chunks[what] = Chunk(int(min(LARGEST_CHUNK, some)), int(per_example))
        return min(self.examples, self._chunks[what].examples)

    def _descended(self, groups: Sequence[Hyperparameters]) -> float:
        """Return the sign of the loss in the objective that the optimizer minimizes."""
        maximizes = {bool(group.get("maximize")) for group in groups}
        if len(maximizes) > 1:
            raise AttributionError(
                f"The optimizer of {self.run.path} minimizes the loss for some parameters and maximizes it for others, "
                "so there is no single objective. Use UnrolledDifferentiation(), which needs none."
            )
        return -1.0 if maximizes.pop() else 1.0

    def _scaled(self, vectors: Tensor) -> Tensor:
        """Convert derivatives by the parameters into derivatives by the scaled coordinates."""
        return vectors if self.scale is None else vectors * self.scale

    def _parameters(self, vector: Tensor) -> list[Tensor]:
        return list(self.layout.unflatten(vector).values())


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([zeros(one, like).reshape(-1) for one, like in zip(found, parameters, strict=True)])
