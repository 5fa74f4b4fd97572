"""Kronecker-factored curvatures, layer by layer; the factors are those of curvlinops."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, Solution, check_damping
from lightning_dtda.estimators.curvatures.diagonal import gauss_newton_diagonal
from lightning_dtda.estimators.curvatures.embeddings import embedding_factors
from lightning_dtda.estimators.curvatures.layers import Layer, layers_of
from lightning_dtda.estimators.curvatures.solvers import Products
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.replay.outputs import Outputs, watched
from lightning_dtda.trajectory.storage import read_json, read_tensors, write_json, write_tensors

_log = logging.getLogger(__name__)

_VECTORS = 24
"""Vectors of P numbers that an example takes at the most while eigenvalues are corrected: its gradient in two bases,
steps between them, and activations, which are fewer."""

_SEEN = 3
"""Examples from which it is seen whether an embedding is looked up by each of them."""

_CUTOFF = 1e-7
"""Share of the largest eigenvalue that counts as zero: what single precision leaves of one in the factors."""


class KFAC(Curvature):
    r"""Kronecker-factored approximate curvature of the Gauss-Newton matrix.

    A block for each linear or convolutional layer, weight and bias together, and each embedding, and nothing between
    layers: with inputs a and the derivatives g of :math:`A_n` (see :class:`~lightning_dtda.estimators.GaussNewton`) by
    the layer's outputs,

    .. math:: G_{\text{layer}} \approx \left(\frac1N \sum_n a_n a_n^\top\right) \otimes
        \left(\frac1N \sum_n g_n g_n^\top\right)

    (Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407, for convolutions; Eschenhagen et al.,
    arXiv 2311.00636, "expand", for layers that share weights over positions). Parameters of other layers, and those
    that several layers share, get the diagonal of the Gauss-Newton matrix; which ones is logged. Factors are computed
    by `curvlinops <https://curvlinops.readthedocs.io>`_, which ``pip install "lightning-dtda[kfac]"`` brings.

    Blocks without what couples layers give solutions that point well and are several times too long. Each solution x
    for a vector v is therefore rescaled, for which one product with the true matrix is needed (Martens and Grosse),
    and responses are in the measurement's unit:

    .. math:: x \leftarrow \frac{\langle v, x \rangle}{\langle x, (G + \delta) x \rangle}\, x

    Args:
        damping: :math:`\delta`; ``"auto"`` is a hundredth of the mean eigenvalue, 0 the pseudo-inverse.
        samples: How many random combinations of the C outputs' derivatives stand for all of them; ``None`` is all of
            them, exact.
        seed: Of the samples.
        rescale: Whether solutions are rescaled.
        cache: A directory where the factors of each run are kept, to be read by the next call.

    Raises:
        AttributionError: If an argument is out of range, or curvlinops is not installed.
    """

    arguments = ("damping", "samples", "seed", "rescale")
    auto_damping: ClassVar[float] = 0.01
    """Less than elsewhere: the length of solutions, which small eigenvalues spoil first, is set by rescaling."""
    is_corrected: ClassVar[bool] = False
    """Whether the eigenvalues are corrected."""

    def __init__(
        self,
        damping: Damping = "auto",
        samples: int | None = None,
        seed: int = 0,
        rescale: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        if samples is not None and samples < 1:
            raise AttributionError(f"samples={samples}; give at least 1, or None for all outputs.")
        try:
            import curvlinops  # noqa: F401
        except ImportError as error:
            raise AttributionError(
                f'Kronecker factors need curvlinops ({error}). pip install "lightning-dtda[kfac]", or use '
                "GaussNewton()."
            ) from error
        self.damping = check_damping(damping)
        self.samples = samples
        self.seed = seed
        self.rescale = rescale
        self.cache = cache

    @override
    def fit(self, objective: Objective) -> KroneckerSpectrum:
        if objective.scale is not None:
            raise AttributionError(
                f"The parameters of {objective.run.path} move at different rates: the optimizer scales each gradient's "
                "entries, or parameter groups have learning rates of their own. Kronecker factors have no such matrix. "
                "Use GaussNewton() or ExactHessian()."
            )
        layers = _layers(objective)
        in_layers = {name for layer in layers for name in layer.parameters}
        others = [name for name in objective.layout.names if name not in in_layers]
        if others:
            _log.info("The diagonal of the Gauss-Newton matrix stands for the curvature of %s.", ", ".join(others))
        path = None if self.cache is None else _cache_file(objective, self)
        tensors = None if path is None else _read(path)
        if tensors is None:
            tensors = _factors(objective, layers, self)
            tensors["diagonal"] = gauss_newton_diagonal(objective) if others else torch.zeros_like(objective.theta)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path.with_suffix(".json"), {"factors": write_tensors(path, tensors)})
        blocks = [_block(number, layer, tensors, objective) for number, layer in enumerate(layers)]
        products = objective.gauss_newton_products if self.rescale else None
        return KroneckerSpectrum(blocks, tensors["diagonal"].to(objective.theta) + objective.penalty, products)

    @override
    def passes(self, objective: Objective) -> float:
        return 10.0


class EKFAC(KFAC):
    r"""KFAC with corrected eigenvalues: in the eigenvectors of KFAC's factors, those that fit the matrix best.

    .. math:: G_{\text{layer}} \approx U \Lambda U^\top, \qquad U = U_a \otimes U_g, \qquad
        \Lambda_{ii} = \frac1N \sum_n (A_n U)_{ni}^2

    (George et al., arXiv 1806.03884; Grosse et al., arXiv 2308.03296, for influence functions). Arguments, errors and
    the treatment of other parameters are those of :class:`KFAC`.
    """

    is_corrected = True


@dataclass(frozen=True)
class Block:
    """A layer's block in the eigenvectors of its factors.

    Args:
        weight: Where the weight lies in the parameters, as ``(d_out, d_in)``.
        bias: Where the bias lies; ``None`` if there is none. It is the last column of the input side.
        left: Eigenvectors of the derivatives' factor ``(d_out, d_out)``. ``None`` for an embedding's weight
            ``(rows, d)``, which has those of the derivatives on the right, and each row for itself on the left.
        right: Eigenvectors of the inputs' factor ``(d_in, d_in)``, one more with a bias.
        values: Eigenvalues ``(d_out, d_in)``, one column more with a bias.
    """

    weight: slice
    bias: slice | None
    left: Tensor | None
    right: Tensor
    values: Tensor


class KroneckerSpectrum(Spectrum):
    """Blocks of layers, and a diagonal for all else.

    Args:
        blocks: The layers'.
        diagonal: ``(P,)``, of which entries that no block has count.
        products: Vectors ``(Q, P)`` to the true matrix times each of them, for rescaling; ``None`` for no rescaling.
    """

    cutoff = _CUTOFF

    def __init__(self, blocks: list[Block], diagonal: Tensor, products: Products | None = None) -> None:
        self._blocks = blocks
        self._products = products
        self._diagonal = diagonal
        self._others = torch.ones_like(diagonal, dtype=torch.bool)
        for block in blocks:
            for part in (block.weight, *([] if block.bias is None else [block.bias])):
                self._others[part] = False
        self.values = torch.cat([diagonal[self._others], *(block.values.flatten() for block in blocks)])

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        solution = super().solve(vectors, damping).vectors
        if self._products is None:
            return Solution(solution)
        curved = ((self._products(solution) + damping * solution) * solution).sum(1, keepdim=True)
        length = (vectors * solution).sum(1, keepdim=True) / curved.clamp_min(torch.finfo(curved.dtype).tiny)
        return Solution(solution * length)

    @override
    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        result = torch.empty_like(vectors)
        result[:, self._others] = vectors[:, self._others] * function(self._diagonal[self._others])
        for block in self._blocks:
            matrix = vectors[:, block.weight].reshape(len(vectors), len(block.values), -1)
            if block.bias is not None:
                matrix = torch.cat([matrix, vectors[:, block.bias, None]], 2)
            turned = matrix @ block.right if block.left is None else block.left.T @ matrix @ block.right
            matrix = turned * function(block.values) @ block.right.T
            if block.left is not None:
                matrix = block.left @ matrix
            if block.bias is not None:
                result[:, block.bias] = matrix[:, :, -1]
                matrix = matrix[:, :, :-1]
            result[:, block.weight] = matrix.flatten(1)
        return result


def _layers(objective: Objective) -> list[Layer]:
    """Find the layers that have factors."""
    found = layers_of(objective, (nn.Linear, nn.Conv2d, nn.Embedding))
    examples = min(_SEEN, objective.examples)
    calls = objective.calls([layer.name for layer in found], examples)

    def has_factors(layer: Layer) -> bool:
        own = objective.module.get_submodule(layer.name)
        if isinstance(own, nn.Conv2d):
            return own.groups == 1 and own.padding_mode == "zeros"
        if isinstance(own, nn.Embedding):
            # of positions, say, the same rows are looked up for all examples at once
            is_plain = own.max_norm is None and not own.scale_grad_by_freq
            return is_plain and len(calls[layer.name][0][0]) == examples
        return True

    return [layer for layer in found if has_factors(layer)]


def _factors(objective: Objective, layers: list[Layer], curvature: KFAC) -> dict[str, Tensor]:
    """Compute eigenvectors and eigenvalues of the layers' blocks."""
    columns = 1
    if objective.has_root:
        columns = objective.outputs if curvature.samples is None else min(curvature.samples, objective.outputs)
    elif layers:
        _log.info(
            "The Kronecker factors are those of the training labels' gradients: the loss is no mean over examples."
        )
    is_embedding = [isinstance(objective.module.get_submodule(layer.name), nn.Embedding) for layer in layers]
    others = [number for number, looks_up in enumerate(is_embedding) if not looks_up]
    embeddings = [number for number, looks_up in enumerate(is_embedding) if looks_up]
    tensors: dict[str, Tensor] = {}
    if others:
        found = _watched_factors(objective, [layers[number] for number in others], curvature, columns)
        tensors |= _named(others, found)
    if embeddings:
        parts = _Columns(objective, columns, curvature.seed)
        of_embeddings = [layers[number] for number in embeddings]
        rows = [len(objective.module.get_parameter(layer.parameters[0])) for layer in of_embeddings]
        pairs = embedding_factors(
            lambda: _lookups(objective, of_embeddings, parts), rows, objective.examples, curvature.is_corrected
        )
        # inputs were seen once for each column
        seen = 1 if curvature.is_corrected else columns
        tensors |= _named(embeddings, [(None, right, values / seen) for right, values in pairs])
    # sums over the examples, as the loss that curvlinops is given
    return {
        name: (tensor / objective.examples if name.endswith("values") else tensor).detach().contiguous()
        for name, tensor in tensors.items()
    }


def _named(numbers: list[int], found: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> dict[str, Tensor]:
    names = ("left", "right", "values")
    return {
        f"{number}.{name}": tensor
        for number, of_layer in zip(numbers, found, strict=True)
        for name, tensor in zip(names, of_layer, strict=True)
        if tensor is not None
    }


def _lookups(objective: Objective, layers: list[Layer], parts: _Columns) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield which rows of embeddings are looked up by a batch, and the derivatives by what is found there."""
    names = [layer.name for layer in layers]
    paddings: list[Any] = [objective.module.get_submodule(name).padding_idx for name in names]
    for part, _ in parts:
        with (
            watched(objective.module, names) as calls,
            objective.undifferentiated(part.indices, part.seed, nullcontext()) as (loss, outputs),
        ):
            of_batch = [calls[name][0] for name in names]
            results = [result for _, result in of_batch]
            if part.column is None:
                found = list(torch.autograd.grad(part.factor * loss, results))
            else:
                found = outputs.pull(_arriving(outputs, part.column, len(part.indices)), results)
        yield [
            (rows, gradient if padding is None else gradient * rows.ne(padding)[..., None])
            for (rows, _), gradient, padding in zip(of_batch, found, paddings, strict=True)
        ]


def _watched_factors(
    objective: Objective, layers: list[Layer], curvature: KFAC, columns: int
) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Compute eigenvectors of either side and eigenvalues of layers' blocks by curvlinops.

    It knows three losses of a module's output, and watches what goes forwards and backwards through the layers. Here
    its module is the training step, which goes backwards itself: from the network's outputs, where a column of the root
    of their Hessian is put in, so that the "empirical" Fisher matrix over all columns is the Gauss-Newton matrix. Where
    the loss has no root of single examples, it goes back from the loss, and what comes out is the Fisher matrix of the
    training labels.
    """
    from curvlinops import EKFACLinearOperator, KFACLinearOperator

    by_name = dict(objective.module.named_parameters())
    parameters = [by_name[name] for layer in layers for name in layer.parameters]
    operator = (EKFACLinearOperator if curvature.is_corrected else KFACLinearOperator)(
        _Step(objective, layers, parameters),
        nn.MSELoss(reduction="sum"),
        parameters,
        _Columns(objective, columns, curvature.seed),
        check_deterministic=False,
        fisher_type="empirical",
        separate_weight_and_bias=False,
        num_data=objective.examples,
        num_per_example_loss_terms=1,
        batch_size_fn=lambda part: len(part.indices),
    )
    if curvature.is_corrected:
        operator.compute_eigenvalue_correction()
    else:
        operator.compute_kronecker_factors()
    state = operator.state_dict()
    found = []
    for number in range(len(layers)):
        name = f"watched.{number}"
        if curvature.is_corrected:
            left = state["gradient_covariances_eigenvectors"][name]
            right = state["input_covariances_eigenvectors"][name]
            values = state["corrected_eigenvalues"][name]
            # a layer without a bias has its eigenvalues parameter by parameter
            values = next(iter(values.values())) if isinstance(values, dict) else values
        else:
            of_left, left = torch.linalg.eigh(state["gradient_covariances"][name])
            # inputs were seen once for each column
            of_right, right = torch.linalg.eigh(state["input_covariances"][name] / columns)
            values = of_left[:, None] * of_right
        found.append((left, right, values))
    return found


@dataclass(frozen=True)
class _Part:
    """Some examples, and what is to arrive at their outputs.

    Args:
        indices: The examples.
        seed: Of the random numbers that the loss draws.
        column: Of their roots ``(B, C)``; ``None`` for the gradients that arrive by themselves.
        factor: What those are multiplied with.
    """

    indices: Tensor
    seed: int | None
    column: Tensor | None
    factor: float = 1.0


class _Step(nn.Module):
    """The training step as curvlinops calls it: from examples to a number for each.

    What curvlinops watches are copies of the layers, with the same parameters, which stand in for them here and not
    where the roots are computed.

    Args:
        objective: The objective.
        layers: The layers.
        parameters: Theirs.
    """

    def __init__(self, objective: Objective, layers: list[Layer], parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._objective = objective
        self._of_layers = parameters
        self._originals = [objective.module.get_submodule(layer.name) for layer in layers]
        memo = {id(parameter): parameter for parameter in objective.module.parameters()}
        self.watched = nn.ModuleList(copy.deepcopy(original, dict(memo)) for original in self._originals)

    @override
    def forward(self, part: _Part) -> Tensor:
        with self._objective.undifferentiated(part.indices, part.seed, self._standing_in()) as (loss, outputs):
            if part.column is None:
                torch.autograd.grad(part.factor * loss, self._of_layers, allow_unused=True)
            else:
                outputs.pull(_arriving(outputs, part.column, len(part.indices)), self._of_layers)
        # curvlinops has seen what it is to see: what it will differentiate goes past the layers
        return torch.stack([parameter.sum() for parameter in self._of_layers]).sum().expand(len(part.indices), 1)

    @contextmanager
    def _standing_in(self) -> Iterator[None]:
        for original, standing_in in zip(self._originals, self.watched, strict=True):
            original.forward = standing_in.__call__
        try:
            yield
        finally:
            for original in self._originals:
                vars(original).pop("forward", None)


def _arriving(outputs: Outputs, column: Tensor, examples: int) -> list[Tensor]:
    if others := [shape for shape in outputs.shapes if shape[0] != examples]:
        raise AttributionError(
            f"The network's outputs have the shape {tuple(others[0])} for {examples} examples, which Kronecker "
            "factors are not made of. Use GaussNewton() or Diagonal()."
        )
    sizes = [torch.Size(shape).numel() // examples for shape in outputs.shapes]
    return [part.reshape(shape) for part, shape in zip(column.split(sizes, 1), outputs.shapes, strict=True)]


class _Columns:
    """The training data as curvlinops wants them, batch by batch.

    Each batch comes once for each column of the root, or for each random combination of columns. What the targets are
    plays no part: the gradients are replaced on their way.
    """

    def __init__(self, objective: Objective, columns: int, seed: int) -> None:
        self._objective = objective
        self._columns = columns
        self._seed = seed

    def __iter__(self) -> Iterator[tuple[_Part, Tensor]]:
        objective = self._objective
        generator = torch.Generator().manual_seed(self._seed)
        if not objective.has_root:
            for indices, seed, factor in objective.parts(self._size):
                # each example's own share of the mean loss, whose square is the Fisher matrix's
                yield _Part(indices, seed, None, factor), objective.theta.new_zeros(len(indices), 1)
            return
        for indices in torch.arange(objective.examples).split(self._size):
            roots = objective.loss_roots(indices)
            if self._columns < objective.outputs:
                signs = torch.randint(2, (len(indices), roots.shape[2], self._columns), generator=generator)
                roots = roots @ (signs.to(roots) * 2 - 1) * self._columns**-0.5
            for column in range(self._columns):
                yield _Part(indices, None, roots[:, :, column]), objective.theta.new_zeros(len(indices), 1)

    @property
    def _size(self) -> int:
        per_example = _VECTORS * self._objective.size * self._objective.theta.itemsize
        return max(1, int(self._objective.memory / per_example))


def _block(number: int, layer: Layer, tensors: dict[str, Tensor], objective: Objective) -> Block:
    right, values = (tensors[f"{number}.{part}"].to(objective.theta) for part in ("right", "values"))
    left = tensors[f"{number}.left"].to(objective.theta) if f"{number}.left" in tensors else None
    # of a bias with another weight decay, which no eigenvector of the block would have
    penalty = objective.penalty[layer.weight.start]
    return Block(layer.weight, layer.bias, left, right, values.clamp_min(0) + penalty)


def _cache_file(objective: Objective, curvature: KFAC) -> Path:
    settings = {key: value for key, value in curvature.settings().items() if key not in ("damping", "rescale")}
    facts = [settings, objective.run.checksum, objective.step, str(objective.theta.dtype)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(str(curvature.cache)) / f"{objective.run.name}-{digest}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read factors from the cache; ``None`` if they are not there, or damaged."""
    try:
        return read_tensors(path.parent, read_json(path.with_suffix(".json"))["factors"])
    except (TrajectoryError, KeyError):
        return None
