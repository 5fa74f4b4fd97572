"""The training objective of a run at a checkpoint: products with its curvature matrices, and their roots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.example_gradients import LARGEST_CHUNK, ExampleGradients
from lightning_dtda.replay.outputs import Outputs, watched
from lightning_dtda.replay.passes import Pass

_LOOKED_AT, _DIRECTIONS = 32, 4
"""Number of examples, and of random directions of their outputs, used to test the sign of the loss's curvature."""


class RootRows(NamedTuple):
    """Rows of a root of the Gauss-Newton matrix for B examples."""

    indices: Tensor
    """Indices of the examples."""
    rows: Tensor
    """Derivatives by the requested parameters ``(B * C, n)``."""
    layers: list[tuple[Tensor, Tensor]]
    """For each requested layer, derivatives by its outputs ``(B * C, d_out)``, and its inputs ``(B, d_in)``."""


class Objective(ExampleGradients):
    r"""The mean training loss of a run at a step, with the module in evaluation mode.

    .. math:: L(\theta) = \frac1N \sum_n l_n(\theta) + \frac12 \sum_p \gamma_p \theta_p^2

    where :math:`\gamma` is the weight decay of optimizers that add it to the gradient (decoupled weight decay is not
    part of any objective). For an optimizer that maximizes, the losses have a minus sign. The losses are those of the
    training: if they depend on the batch (class weights normalised over it, a mean over its tokens), examples pass
    through the module in batches of the training's size, and :math:`l_n` includes its coefficient in the batch.

    Args:
        replay: Replay of one run.
        step: Step t; ``None`` for the end of training.
        memory: Maximum memory of a computation in bytes.
        chunks: Numbers of examples that fit in the memory, as found earlier for runs of the same shape.
        scale: s ``(P,)``, for scaled coordinates: all derivatives are by :math:`\phi` at
            :math:`\theta + s \odot \phi`, so matrices are those of the parameters multiplied by s on both sides.
        decay: Weight decay ``(P,)`` that is added to :math:`\gamma`.
        draws: Random draws for a loss that uses random numbers; the objective is the mean over them.
        kept: Traces to reuse from one run to the next.

    Raises:
        AttributionError: If the optimizer minimizes for some parameters and maximizes for others.
    """

    def hessian_products(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return the Hessian of L, or of the mean over ``chosen`` examples, times each of ``vectors`` ``(Q, P)``."""

        def product(one: Pass, direction: list[Tensor]) -> Tensor:
            return self.layout.flatten(one.products(direction)[0])

        return self._products("Hessian products", product, vectors, chosen)

    def gauss_newton_products(self, vectors: Tensor) -> Tensor:
        r"""Return the Gauss-Newton matrix of L times each of ``vectors`` ``(Q, P)``.

        .. math:: G = \frac1N \sum_n J_n^\top \nabla^2\ell_n(z_n) J_n + \nabla^2 R(\theta) +
            \operatorname{diag}(\gamma), \qquad J_n = \frac{d z_n}{d \theta}

        where R is the part of the loss that depends on the parameters directly (a penalty in ``training_step``).
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
            # in a mean over B examples, each term and each gradient has the factor 1 / B
            return self._sign * len(weights) * found

        return self._products("Fisher products", product, vectors)

    def _products(
        self, what: str, product: Callable[[Pass, list[Tensor]], Tensor], vectors: Tensor, chosen: Tensor | None = None
    ) -> Tensor:
        """Return a matrix times each of ``vectors`` ``(Q, P)``: the mean over examples, plus the weight decay."""
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
        """Number of the network's outputs per example, C.

        Raises:
            AttributionError: If the loss of a batch is not a mean over examples, or depends on parameters directly.
        """
        self.refuse_root("A root of the Gauss-Newton matrix")
        with self.passed(torch.arange(1), self._seeds[0]) as one:
            return sum(part.numel() for part in one.outputs.gradient())

    @cached_property
    def lacks_curvature(self) -> str | None:
        """Why the Gauss-Newton matrix does not describe the loss, ``None`` if it does; determined on one batch."""
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
        """Return symmetric roots of the Hessians of examples' losses by their outputs ``(B, C, C)``.

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
                    "The network has different numbers of outputs for different examples, so the Gauss-Newton matrix "
                    f'has no root of one shape ({error}). Use GaussNewton(solver="cg") or Hessian(...).'
                ) from error
        return self.roots_of(total)

    def roots_of(self, hessians: Tensor) -> Tensor:
        """Return symmetric roots of Hessians of losses by outputs ``(B, C, C)``.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        values, vectors = torch.linalg.eigh(hessians)
        self.refuse_concave(values)
        return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT

    def refuse_concave(self, values: Tensor) -> None:
        """Raise an error if the loss is not convex in the outputs.

        Raises:
            AttributionError: If there are negative eigenvalues beyond rounding.
        """
        floor = -self.theta.new_tensor(torch.finfo(self.theta.dtype).eps).sqrt() * values.abs().amax()
        if bool((values < floor).any()):
            raise AttributionError(
                f"The training loss of {self.run.path} is not convex in the network's outputs (smallest eigenvalue "
                f"{float(values.min()):.2g}): its Gauss-Newton matrix has no root. Use Hessian(...) or ExactHessian()."
            )

    def roots(
        self, columns: Tensor | None = None, layers: Sequence[str] = (), among: Tensor | None = None
    ) -> Iterator[RootRows]:
        r"""Yield rows of a root of the Gauss-Newton matrix, for B examples at a time.

        .. math:: A_n = \left(\nabla^2\ell_n(z_n)\right)^{1/2} J_n, \qquad
            G = \frac1N \sum_n A_n^\top A_n + \operatorname{diag}(\gamma)

        Args:
            columns: Indices of the parameters to differentiate by; ``None`` for all of them.
            layers: Names of submodules whose inputs and derivatives are returned as well; each must be called once,
                with one tensor.
            among: Columns of all calls, if there are several with some columns each, which then share a trace.

        Raises:
            AttributionError: If a loss is not convex in the outputs.
        """
        if columns is not None and (among is None or not len(columns)):
            among = columns
        for indices in torch.arange(self.examples).split(self._rows_at_once(self.outputs, among)):
            yield self.root_rows(indices, columns, layers, among)

    def squared_rows(self, indices: Tensor, roots: Tensor, columns: Tensor) -> Tensor:
        """Return the sum of squares ``(n,)`` of some columns of the root of some examples.

        Args:
            indices: Indices of the examples.
            roots: Roots of the Hessians of their losses by the outputs, or combinations of their columns ``(B, C, S)``.
            columns: Indices of the parameters ``(n,)``.
        """
        total = self.theta.new_zeros(len(columns))
        for some in torch.arange(len(indices)).split(self._rows_at_once(roots.shape[2], columns)):
            total += self.root_rows(indices[some], columns, roots=roots[some]).rows.square_().sum(0)
        return total

    def _rows_at_once(self, rows: int, columns: Tensor | None) -> int:
        """Return how many examples, each with a number of rows of the root, fit in the memory."""
        width = sum(self.layout.sizes[number] for number in self._containing(columns)) + self.size // 4
        per_example = 3 * rows * max(width, 1) * self.theta.itemsize
        return min(LARGEST_CHUNK, max(1, int(self.memory / per_example)))

    def _containing(self, columns: Tensor | None) -> list[int]:
        """Return the numbers of the parameter tensors that contain some columns; of all if not given."""
        if columns is None:
            return list(range(len(self.layout.names)))
        ends = torch.tensor(self.layout.sizes, device=columns.device).cumsum(0)
        return torch.searchsorted(ends, columns.contiguous(), right=True).unique().tolist()

    def root_rows(
        self,
        indices: Tensor,
        columns: Tensor | None = None,
        layers: Sequence[str] = (),
        among: Tensor | None = None,
        roots: Tensor | None = None,
    ) -> RootRows:
        """Return what :meth:`roots` yields, for the given examples; ``roots`` as in :meth:`squared_rows`."""
        roots = self.loss_roots(indices) if roots is None else roots
        numbers = self._containing(columns if among is None else among)

        def rows(loss: Tensor, outputs: Outputs, parameters: list[Tensor], extra: list[Tensor]) -> list[Tensor]:
            of_layers = [calls[name][0] for name in layers]
            by = [*(parameters[number] for number in numbers), *(result for _, result in of_layers)]
            found = [outputs.pull(outputs.split(column), by) for column in extra[0].unbind(1)]
            nothing = extra[0].new_zeros(0)
            of_parameters = torch.stack(
                [torch.cat([nothing, *(part.reshape(-1) for part in one[: len(numbers)])]) for one in found]
            )
            if len(extra) > 1:
                of_parameters = of_parameters[:, extra[1]]
            derivatives = [
                torch.stack([one[len(numbers) + n].reshape(-1) for one in found]) for n in range(len(layers))
            ]
            return [of_parameters, *derivatives, *(value.reshape(-1) for value, _ in of_layers)]

        key = f"roots {numbers} {' '.join(layers)}"
        # the columns are an input of each example, so one trace serves all choices
        chosen = [] if columns is None else [self._places(columns, numbers).expand(len(indices), -1)]
        with watched(self.module, layers) as calls:
            found = self._of_each(key, indices, self._seeds[0], rows, [roots, *chosen], calls=calls)
        of_parameters, *rest = found
        derivatives, inputs = rest[: len(layers)], rest[len(layers) :]
        if self.scale is not None:
            of_parameters = of_parameters * (self.scale if columns is None else self.scale[columns])
        pairs = [(of_one.flatten(0, 1), value) for of_one, value in zip(derivatives, inputs, strict=True)]
        return RootRows(indices, of_parameters.flatten(0, 1), pairs)

    def _places(self, columns: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the places of columns in the vector of the given parameter tensors alone."""
        sizes = torch.tensor(self.layout.sizes, device=columns.device)
        left_out = torch.ones_like(sizes)
        left_out[list(numbers)] = 0
        before = (sizes * left_out).cumsum(0)
        return columns - before[torch.searchsorted(sizes.cumsum(0), columns.contiguous(), right=True)]

    def calls(self, names: Sequence[str], examples: int = 1) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Return inputs and results of each call of some submodules, for the first examples."""
        seed = self._seeds[0]  # computed before the module is watched, because it takes a pass itself
        with watched(self.module, names) as calls, self._loss(torch.arange(examples), seed):
            return calls

    @cached_property
    def has_root(self) -> bool:
        """Whether the Gauss-Newton matrix has a root in which each row belongs to one example."""
        if not self._is_free or self._seeds != [None]:
            return False
        try:
            with self.passed(torch.arange(1)) as one:
                return one.beyond is None
        except Exception:  # the user's code may fail in any way on a batch of one
            return False

    def refuse_root(self, what: str) -> None:
        """Raise an error if the matrix has no root.

        Raises:
            AttributionError: If the loss is not a mean over single examples, or is random.
        """
        if not self.has_root:
            raise AttributionError(
                f"{what} needs a loss that is a mean over single examples and is not random. That of "
                f"{type(self.module).__name__} is not (class weights, a mean over tokens, a sum, noise ...). Use "
                'GaussNewton(solver="cg") or Hessian(...).'
            )
