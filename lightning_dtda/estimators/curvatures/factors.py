"""Kronecker factors of layers, from their inputs and the derivatives in a root of the Gauss-Newton matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.solvers import root_times
from lightning_dtda.estimators.layer_gradients import (
    Call,
    LayerGradients,
    WatchedLayer,
    at_positions,
    gradients,
    without_padding,
)
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay.cut import edges_of
from lightning_dtda.replay.outputs import Outputs

_KEPT = 1 / 8
"""Fraction of the memory for columns of the root, which are needed in three passes."""

_ENOUGH_BYTES = 2**27
"""Bytes of a batch above which larger batches save little: 20, 40 and 77 sequences of a GPT took equal time to 5 %."""

_STEPS = 24
"""Number of products with the Hessian by the outputs, to compute its root times a random combination of outputs. For
cross entropy the error is 5 %, much less than that of sampling. With fewer outputs, the root is computed explicitly."""

_ENOUGH = 1024
"""Default number of columns of the root over all examples; an average over that number has an error of about 4 %. Each
column of a batch costs a backward pass."""

Samples: TypeAlias = int | Literal["auto"] | None


class LayerFactors:
    r"""Factors of a linear layer, or of each group of a convolution; the bias is a last input with value one.

    With inputs :math:`a_{nt}` and derivatives :math:`g_{nt}` at the T positions of an example,

    .. math:: \left(\frac1{NT} \sum_{nt} a_{nt} a_{nt}^\top\right) \otimes
        \left(\frac1N \sum_{nt} g_{nt} g_{nt}^\top\right)

    Args:
        layer: The layer.
    """

    def __init__(self, layer: WatchedLayer) -> None:
        self._layer = layer
        self._of_inputs: Any = 0
        self._of_derivatives: Any = 0
        self._corrected: Any = 0

    def add(self, inputs: Tensor, derivatives: Tensor, is_first: bool) -> None:
        """Add a batch; ``is_first`` if its inputs have not been added yet with another column of derivatives."""
        entering, leaving = (part.permute(1, 2, 0, 3) for part in self._matrices(inputs, derivatives))
        if is_first:
            flat = entering.flatten(2)
            self._of_inputs = self._of_inputs + flat @ flat.mT / entering.shape[3]
        flat = leaving.flatten(2)
        self._of_derivatives = self._of_derivatives + flat @ flat.mT

    def decompose(self) -> None:
        """Compute the eigenvectors of the factors."""
        self._inputs, self._right = eigen(self._of_inputs)
        self._derivatives, self._left = eigen(self._of_derivatives)

    def correct(self, inputs: Tensor, derivatives: Tensor, is_first: bool) -> None:
        """Add a batch to the corrected eigenvalues; ``is_first`` as in :meth:`add`."""
        entering, leaving = self._matrices(inputs, derivatives)
        if is_first:
            self._entering = self._right.mT @ entering
        entering, leaving = self._entering, self._left.mT @ leaving
        if entering.shape[3] == 1:
            found = torch.einsum("bgo,bgi->goi", leaving[..., 0].square(), entering[..., 0].square())
        else:
            found = (leaving @ entering.mT).square_().sum(0)
        self._corrected = self._corrected + found

    def tensors(self, examples: int, is_corrected: bool) -> dict[str, Tensor]:
        """Return eigenvectors and eigenvalues, each ``(groups, ...)``."""
        plain = self._derivatives[:, :, None] * self._inputs[:, None] / examples**2
        values = self._corrected / examples if is_corrected else plain
        return {"left": self._left, "right": self._right, "values": values}

    def _matrices(self, inputs: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        entering, leaving = at_positions(self._layer.module, inputs.to(derivatives.dtype), derivatives)
        if self._layer.bias is not None:
            entering = torch.cat([entering, torch.ones_like(entering[:, :, :1])], 2)
        return entering, leaving


class EmbeddingFactors:
    """Factors of an embedding: a linear layer on one-hot vectors, whose inputs have a diagonal factor.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: WatchedLayer) -> None:
        self._module: Any = layer.module
        self._frequencies: Any = 0
        self._of_derivatives: Any = 0
        self._corrected: Any = 0

    def add(self, inputs: Tensor, derivatives: Tensor, is_first: bool) -> None:
        """Add a batch; ``is_first`` if its inputs have not been added yet with another column of derivatives."""
        derivatives = without_padding(self._module, inputs, derivatives).flatten(0, -2)
        if is_first:
            counts = torch.bincount(inputs.flatten(), minlength=len(self._module.weight))
            self._frequencies = self._frequencies + counts.to(derivatives) / inputs[0].numel()
        self._of_derivatives = self._of_derivatives + derivatives.mT @ derivatives

    def decompose(self) -> None:
        """Compute the eigenvectors of the derivatives' factor."""
        self._derivatives, self._right = eigen(self._of_derivatives)

    def correct(self, inputs: Tensor, derivatives: Tensor, is_first: bool) -> None:
        """Add a batch to the corrected eigenvalues; ``is_first`` as in :meth:`add`."""
        of_rows = without_padding(self._module, inputs, derivatives).flatten(1, -2) @ self._right
        total = of_rows.new_zeros(len(inputs), *self._module.weight.shape)
        total.scatter_add_(1, inputs.flatten(1)[..., None].expand(-1, -1, total.shape[2]), of_rows)
        self._corrected = self._corrected + total.square_().sum(0)

    def tensors(self, examples: int, is_corrected: bool) -> dict[str, Tensor]:
        """Return right eigenvectors and eigenvalues, each ``(1, ...)``."""
        plain = self._frequencies[:, None] * self._derivatives / examples**2
        values = self._corrected / examples if is_corrected else plain
        return {"right": self._right[None], "values": values[None]}


def with_factors(known: LayerGradients) -> list[int]:
    """Return the numbers of the layers that have factors: those called once, with a weight that is not shared."""
    uses = Counter(place.start for layer in known.layers for place in (layer.weight, layer.bias) if place is not None)

    def has_factors(number: int, layer: WatchedLayer) -> bool:
        if isinstance(layer.module, nn.Embedding) and number in known.spread:
            return False  # position embeddings: the same rows for all examples
        is_own = layer.weight is not None and all(uses[one.start] == 1 for one in (layer.weight, layer.bias) if one)
        return is_own and known.times[number] == 1 and layer.has_matrix

    return [number for number, layer in enumerate(known.layers) if has_factors(number, layer)]


def fit_factors(root: SampledRoot, is_corrected: bool) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
    """Compute the factors of layers, and the diagonal of the matrix for other known parameters.

    Args:
        root: Root of the matrix.
        is_corrected: Whether to correct the eigenvalues to the best fit with these eigenvectors.

    Returns:
        Eigenvectors and eigenvalues by number of the layer; and the diagonal without the penalty ``(P,)``, zero in
        layers with factors.
    """
    objective, known = root.objective, root.known
    factors: dict[int, Any] = {
        number: (EmbeddingFactors if isinstance(known.layers[number].module, nn.Embedding) else LayerFactors)(
            known.layers[number]
        )
        for number in with_factors(known)
    }
    diagonal = torch.zeros_like(objective.theta)
    for part in root.parts():
        others: dict[int, Tensor] = {}
        for call, derivatives in part.pairs:
            if call.layer in factors:
                factors[call.layer].add(call.inputs, derivatives, part.is_first)
                continue
            for place, of_examples in gradients(known.layers[call.layer], call.inputs, derivatives):
                others[place.start] = others.get(place.start, 0) + of_examples
        for start, of_examples in others.items():
            diagonal[start : start + of_examples.shape[1]] += of_examples.square().sum(0)
    for of_layer in factors.values():
        of_layer.decompose()
    if is_corrected:
        for part in root.parts():
            for call, derivatives in part.pairs:
                if call.layer in factors:
                    factors[call.layer].correct(call.inputs, derivatives, part.is_first)
    found = {number: of_layer.tensors(objective.examples, is_corrected) for number, of_layer in factors.items()}
    return found, diagonal / objective.examples


def quadratic_forms(root: SampledRoot, vectors: Tensor) -> Tensor:
    r"""Return :math:`\langle v, G v \rangle` without the penalty for each of ``vectors`` ``(Q, P)``, as ``(Q,)``.

    .. math:: \langle v, G v \rangle = \frac1N \sum_{nc} \langle A_{nc}, v \rangle^2

    One backward pass for each column of the root serves all vectors, while a product with G takes several for each.

    Args:
        root: Root in which each row belongs to one example, with layers that cover all parameters.
        vectors: Vectors v.
    """
    total = vectors.new_zeros(len(vectors))
    for part in root.parts():
        products = sum(root.known.products_of(call, derivatives, vectors) for call, derivatives in part.pairs)
        total += torch.as_tensor(products).square().sum(1)
    return total / root.objective.examples


class _Part(NamedTuple):
    """A batch with one column of the root: calls of layers, and derivatives by their outputs."""

    pairs: list[tuple[Call, Tensor]]
    is_first: bool


class SampledRoot:
    """The root of the Gauss-Newton matrix by the layers' outputs, or random combinations of its columns.

    If the matrix has no root in which each row belongs to one example, gradients of the losses are used as the only
    column, and the result is the Fisher matrix of the training labels.

    Args:
        objective: The objective.
        known: Layers with known gradients.
        samples: Number of random combinations of the outputs' derivatives per example; ``None`` for all outputs,
            ``"auto"`` to choose by the number of examples.
        seed: Seed of the samples.
    """

    def __init__(self, objective: Objective, known: LayerGradients, samples: Samples, seed: int) -> None:
        self.objective = objective
        self.known = known
        self._samples = samples
        self._seed = seed
        self._kept: list[list[list[Tensor]]] = []
        """Columns of the first batches, kept for further passes."""
        self._room = objective.memory * _KEPT

    def parts(self) -> Iterator[_Part]:
        """Iterate over batches of training examples, and over the columns of the root of each batch."""
        for number, (indices, draw, factor) in enumerate(self._batches()):
            yield from self._of_batch(indices, draw, factor, partial(self._columns, number))

    def diagonal(self, columns: Tensor) -> Tensor:
        """Return entries of the diagonal without the penalty ``(n,)``, from passes of single examples.

        Args:
            columns: Indices of the parameters.
        """
        total = columns.new_zeros(len(columns), dtype=self.objective.theta.dtype)
        for number, (indices, draw, factor) in enumerate(self._batches()):
            with self.objective.undifferentiated(indices, draw, nullcontext()) as (_, outputs):
                found = list(self._columns(number, outputs, factor, len(indices)))
            roots = torch.stack([torch.cat([part.reshape(len(indices), -1) for part in one], 1) for one in found], 2)
            total += self.objective.squared_rows(indices, roots, columns)
        return total / self.objective.examples

    def _batches(self) -> Iterator[tuple[Tensor, int | None, float]]:
        """Return the batches of all passes, which have the size of those in training if there is no root."""
        size = self.objective.examples
        if self.objective.has_root:
            size = self.objective.examples_at_once("Kronecker factors", self._trial, _ENOUGH_BYTES) // 2
        return self.objective.parts(max(1, size))

    def _trial(self, indices: Tensor) -> None:
        """Run a trial of the memory that examples take, including their gradients, one layer at a time."""
        for part in self._of_batch(
            indices, None, 1.0, partial(_columns, self.objective, self._samples, self._generator(0))
        ):
            for call, derivatives in part.pairs:
                for _ in gradients(self.known.layers[call.layer], call.inputs, derivatives):
                    pass

    def _of_batch(
        self,
        indices: Tensor,
        draw: int | None,
        factor: float,
        columns: Callable[[Outputs, float, int], Iterator[list[Tensor]]],
    ) -> Iterator[_Part]:
        """Iterate over the columns of a batch."""
        with (
            self.known.watched(len(indices)) as noted,
            self.objective.undifferentiated(indices, draw, nullcontext()) as (loss, outputs),
        ):
            calls = self.known.checked(noted)
            edges = [call.result for call in calls]
            if not self.objective.has_root:
                found = torch.autograd.grad(factor * loss, edges, allow_unused=True)
                yield _Part([pair for pair in zip(calls, found, strict=True) if pair[1] is not None], True)
                return
            leaving = edges_of(outputs.tensors)
            for number, column in enumerate(columns(outputs, factor, len(indices))):
                found = torch.autograd.grad(leaving, edges, column, retain_graph=True, allow_unused=True)
                yield _Part([pair for pair in zip(calls, found, strict=True) if pair[1] is not None], number == 0)

    def _columns(self, batch: int, outputs: Outputs, factor: float, examples: int) -> Iterator[list[Tensor]]:
        """Yield a batch's columns, from the first pass if they were kept."""
        if batch < len(self._kept):
            yield from self._kept[batch]
            return
        made = []
        for column in _columns(self.objective, self._samples, self._generator(batch), outputs, factor, examples):
            if self._room > 0:
                self._room -= sum(part.nbytes for part in column)
                made.append(column)
            yield column
        if self._room > 0:
            self._kept.append(made)

    def _generator(self, batch: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self._seed, batch)) % 2**63)


def combinations(samples: Samples, examples: int) -> int | None:
    """Return the number of random combinations per example; ``None`` for all outputs.

    Args:
        samples: That number, ``None``, or ``"auto"``.
        examples: N, the number of training examples.
    """
    return math.ceil(_ENOUGH / examples) if samples == "auto" else samples


def _columns(
    objective: Objective,
    samples: Samples,
    generator: torch.Generator,
    outputs: Outputs,
    factor: float,
    examples: int,
) -> Iterator[list[Tensor]]:
    """Yield columns of the examples' roots, or random combinations of them; each has one tensor per output tensor."""
    like = outputs.gradient()
    if others := [part.shape for part in like if part.ndim == 0 or len(part) != examples]:
        raise AttributionError(
            f"The network's outputs have the shape {tuple(others[0])} for {examples} examples; Kronecker factors need "
            "one row for each example. Use GaussNewton() or Diagonal()."
        )
    sizes = [part[0].numel() for part in like]

    def as_outputs(flat: Tensor) -> list[Tensor]:
        return [part.reshape(one.shape).to(one.dtype) for part, one in zip(flat.split(sizes, 1), like, strict=True)]

    def products(flat: Tensor) -> Tensor:
        """Multiply each row by the Hessian of its example's loss by the outputs."""
        curved = outputs.curve(as_outputs(flat))
        return factor * torch.cat([part.reshape(examples, -1) for part in curved], 1).to(objective.theta)

    count, theta = sum(sizes), objective.theta
    taken = combinations(samples, objective.examples)
    if taken is not None and taken < count:
        signs = torch.randint(2, (taken, examples, count), generator=generator).to(theta) * 2 - 1
        signs *= taken**-0.5
        if count > _STEPS:
            for drawn in signs:
                found, values = root_times(products, drawn, _STEPS)
                objective.refuse_concave(values)
                yield as_outputs(found)
            return
    units = torch.eye(count, dtype=theta.dtype, device=theta.device)
    roots = objective.roots_of(torch.stack([products(unit.expand(examples, -1)) for unit in units], 1))
    if taken is not None and taken < count:
        roots = roots @ signs.permute(1, 2, 0)
    for column in roots.unbind(2):
        yield as_outputs(column)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of positive semi-definite matrices ``(..., n, n)``.

    For a singular matrix (a layer with many dead units, in single precision), LAPACK's eigensolver may fail or return
    NaN. The singular value decomposition still converges and gives the same vectors.
    """
    with suppress(torch.linalg.LinAlgError):
        values, vectors = torch.linalg.eigh(matrix)
        if bool(vectors.isfinite().all()):
            return values, vectors
    vectors, values, _ = torch.linalg.svd(matrix)
    return values, vectors
