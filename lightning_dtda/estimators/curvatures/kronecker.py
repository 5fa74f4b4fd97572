"""Kronecker-factored curvatures, layer by layer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, Solution, check_damping
from lightning_dtda.estimators.curvatures.diagonal import gauss_newton_diagonal
from lightning_dtda.estimators.curvatures.factors import (
    SampledRoot,
    Samples,
    fit_factors,
    quadratic_forms,
    with_factors,
)
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.layer_gradients import WatchedLayer
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.trajectory.schema import FLOATS, Expected, FileEntry, check_tensors, conform
from lightning_dtda.trajectory.storage import read_json, read_tensors, write_json, write_tensors

_log = logging.getLogger(__name__)

_CUTOFF = 1e-7
"""Fraction of the largest eigenvalue below which eigenvalues count as zero: rounding in single precision."""


Lengths: TypeAlias = Callable[[Tensor], Tensor]


class KFAC(Curvature):
    r"""Kronecker-factored approximate curvature of the Gauss-Newton matrix.

    The matrix has one block for each linear or convolutional layer (weight and bias together) and each embedding, and
    is zero between layers. With the layer's inputs a, and the derivatives g by its outputs in :math:`A_n` (see
    :class:`~lightning_dtda.estimators.GaussNewton`),

    .. math:: G_{\text{layer}} \approx \left(\frac1N \sum_n a_n a_n^\top\right) \otimes
        \left(\frac1N \sum_n g_n g_n^\top\right)

    (Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407, for convolutions; Eschenhagen et al.,
    arXiv 2311.00636, "expand", for layers that share weights over positions). Parameters of other layers, and those
    that several layers share, use the diagonal of the Gauss-Newton matrix; the log says which ones. A grouped
    convolution has a block for each group.

    Because blocks ignore the coupling between layers, solutions have a good direction but are several times too long.
    Each solution x for a vector v is therefore rescaled with the true matrix, using the same samples of the outputs
    (Martens and Grosse), so responses are in the measurement's unit:

    .. math:: x \leftarrow \frac{\langle v, x \rangle}{\langle x, (G + \delta) x \rangle}\, x

    Args:
        damping: :math:`\delta`; ``"auto"`` for a hundredth of the mean eigenvalue, 0 for the pseudo-inverse.
        samples: Number of random combinations of the C outputs' derivatives per example; ``None`` to use all outputs,
            which is exact. ``"auto"`` aims at 1,024 combinations over all examples: all outputs for a network with few
            outputs and examples, and one combination for a language model, which has an output for each token of the
            vocabulary at each position.
        seed: Seed of the samples.
        rescale: Whether to rescale solutions.
        cache: Directory where the factors of each run are stored and read again by later calls.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("damping", "samples", "seed", "rescale")
    auto_damping: ClassVar[float] = 0.01
    """Smaller than elsewhere, because small eigenvalues mainly distort the length of solutions, which is rescaled."""
    is_corrected: ClassVar[bool] = False
    """Whether eigenvalues are corrected as in EKFAC."""

    def __init__(
        self,
        damping: Damping = "auto",
        samples: Samples = "auto",
        seed: int = 0,
        rescale: bool = True,
        cache: str | Path | None = None,
    ) -> None:
        if not (samples in (None, "auto") or (isinstance(samples, int) and samples >= 1)):
            raise AttributionError(f'samples={samples!r}; give "auto", a positive number, or None for all outputs.')
        self.damping = check_damping(damping)
        self.samples = samples
        self.seed = seed
        self.rescale = rescale
        self.cache = cache

    @override
    def fit(self, objective: Objective) -> KroneckerSpectrum:
        if objective.scale is not None:
            raise AttributionError(
                f"The parameters of {objective.run.path} move at different rates, because the optimizer scales the "
                "entries of the gradient or parameter groups have different learning rates. Kronecker factors do not "
                "support this. Use GaussNewton() or ExactHessian()."
            )
        known = objective.layers
        layers = {} if known is None else {number: known.layers[number] for number in with_factors(known)}
        in_layers = {place.start for layer in layers.values() for place in (layer.weight, layer.bias) if place}
        starts = [0, *accumulate(objective.layout.sizes)]
        others = [name for name, start in zip(objective.layout.names, starts, strict=False) if start not in in_layers]
        if others:
            _log.info("Using the diagonal of the Gauss-Newton matrix for these parameters: %s.", ", ".join(others))
        root = None if known is None else SampledRoot(objective, known, self.samples, self.seed)
        path = None if self.cache is None else _cache_file(objective, self)
        tensors = None if path is None else _read(path, layers, objective)
        if tensors is None:
            tensors = _fitted(objective, root, self.is_corrected)
            if path is not None:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path.with_suffix(".json"), {"factors": write_tensors(path, tensors)})
                except OSError as error:
                    raise AttributionError(
                        f"cache={str(self.cache)!r} cannot be written to ({error}). Choose another directory, or None."
                    ) from error
        blocks = [block for number, layer in layers.items() for block in _blocks(number, layer, tensors, objective)]
        lengths = _lengths(objective, root) if self.rescale else None
        return KroneckerSpectrum(blocks, tensors["diagonal"].to(objective.theta) + objective.penalty, lengths)

    @override
    def passes(self, objective: Objective) -> float:
        return 10.0


class EKFAC(KFAC):
    r"""KFAC with corrected eigenvalues: the best fit to the matrix in the eigenvectors of KFAC's factors.

    .. math:: G_{\text{layer}} \approx U \Lambda U^\top, \qquad U = U_a \otimes U_g, \qquad
        \Lambda_{ii} = \frac1N \sum_n (A_n U)_{ni}^2

    (George et al., arXiv 1806.03884; Grosse et al., arXiv 2308.03296, for influence functions). Arguments, errors and
    the treatment of other parameters are the same as for :class:`KFAC`.
    """

    is_corrected = True


@dataclass(frozen=True)
class Block:
    """A layer's block in the eigenvectors of its factors.

    Args:
        weight: Place of the weight ``(d_out, d_in)`` in the parameters.
        bias: Place of the bias, which is the last column on the input side; ``None`` if there is none.
        left: Eigenvectors of the derivatives' factor ``(d_out, d_out)``; ``None`` for the weight ``(rows, d)`` of an
            embedding, which has the eigenvectors of the derivatives on the right, and the identity on the left.
        right: Eigenvectors of the inputs' factor ``(d_in, d_in)``; one more with a bias.
        values: Eigenvalues ``(d_out, d_in)``; one more column with a bias.
    """

    weight: slice
    bias: slice | None
    left: Tensor | None
    right: Tensor
    values: Tensor


class KroneckerSpectrum(Spectrum):
    r"""Blocks of layers, and a diagonal for all else.

    Args:
        blocks: Blocks of the layers.
        diagonal: Diagonal ``(P,)``; only entries outside of all blocks are used.
        lengths: Function from vectors x ``(Q, P)`` to :math:`\langle x, G x \rangle` ``(Q,)`` with the true matrix, for
            rescaling; ``None`` for no rescaling.
    """

    cutoff = _CUTOFF

    def __init__(self, blocks: list[Block], diagonal: Tensor, lengths: Lengths | None = None) -> None:
        self._blocks = blocks
        self._lengths = lengths
        self._diagonal = diagonal
        self._others = torch.ones_like(diagonal, dtype=torch.bool)
        for block in blocks:
            for part in (block.weight, *([] if block.bias is None else [block.bias])):
                self._others[part] = False
        self.values = torch.cat([diagonal[self._others], *(block.values.flatten() for block in blocks)])

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        solution = super().solve(vectors, damping).vectors
        if self._lengths is None:
            return Solution(solution)
        curved = self._lengths(solution)[:, None] + damping * solution.square().sum(1, keepdim=True)
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


def _lengths(objective: Objective, root: SampledRoot | None) -> Lengths:
    """Return a function that computes quadratic forms with the Gauss-Newton matrix."""
    if root is None or root.known.others or not objective.has_root:
        return lambda vectors: (objective.gauss_newton_products(vectors) * vectors).sum(1)

    def lengths(vectors: Tensor) -> Tensor:
        return quadratic_forms(root, vectors) + (objective.penalty * vectors.square()).sum(1)

    return lengths


def _fitted(objective: Objective, root: SampledRoot | None, is_corrected: bool) -> dict[str, Tensor]:
    """Compute eigenvectors and eigenvalues of the layers' blocks, and the diagonal of everything else."""
    if not objective.has_root:
        _log.info(
            "The Kronecker factors use gradients of the training labels, because the loss is random or not a mean over "
            "single examples."
        )
    tensors: dict[str, Tensor] = {}
    diagonal, unknown = torch.zeros_like(objective.theta), torch.ones_like(objective.theta, dtype=torch.bool)
    if root is not None:
        unknown[:] = False
        for place in root.known.places_of_others:
            unknown[place] = True
        found, diagonal = fit_factors(root, is_corrected)
        tensors = {f"{number}.{name}": one for number, of_layer in found.items() for name, one in of_layer.items()}
    columns = unknown.nonzero()[:, 0]
    if len(columns):
        if root is not None and objective.has_root:
            diagonal[columns] = root.diagonal(columns)
        else:
            diagonal[columns] = gauss_newton_diagonal(objective, columns)
    return {name: tensor.contiguous() for name, tensor in (tensors | {"diagonal": diagonal}).items()}


def _blocks(number: int, layer: WatchedLayer, tensors: dict[str, Tensor], objective: Objective) -> Iterator[Block]:
    """Yield a layer's block, or one for each group of channels."""
    assert layer.weight is not None  # else it has no factors
    rights, values = (tensors[f"{number}.{name}"].to(objective.theta) for name in ("right", "values"))
    lefts = tensors[f"{number}.left"].to(objective.theta) if f"{number}.left" in tensors else None
    # also for a bias with a different weight decay, which would change the eigenvectors of the block
    penalty = objective.penalty[layer.weight.start]
    groups = len(values)

    def of_group(place: slice, group: int) -> slice:
        size = (place.stop - place.start) // groups
        return slice(place.start + group * size, place.start + (group + 1) * size)

    for group in range(groups):
        yield Block(
            of_group(layer.weight, group),
            None if layer.bias is None else of_group(layer.bias, group),
            None if lefts is None else lefts[group],
            rights[group],
            values[group].clamp_min(0) + penalty,
        )


def _cache_file(objective: Objective, curvature: KFAC) -> Path:
    settings = {key: value for key, value in curvature.settings().items() if key not in ("damping", "rescale")}
    facts = [settings, objective.run.checksum, objective.step, str(objective.theta.dtype)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return Path(str(curvature.cache)) / f"{objective.run.name}-{digest}.safetensors"


def _read(path: Path, layers: Mapping[int, WatchedLayer], objective: Objective) -> dict[str, Tensor] | None:
    """Read factors from the cache; ``None`` if they are missing, damaged or of other layers."""
    expected: dict[str, Expected] = {"diagonal": (FLOATS, objective.theta.shape)}
    for number, layer in layers.items():
        groups, inputs, outputs = (f"{size} of {number}" for size in ("groups", "inputs", "outputs"))
        expected[f"{number}.values"] = FLOATS, (groups, outputs, inputs)
        expected[f"{number}.right"] = FLOATS, (groups, inputs, inputs)
        if not isinstance(layer.module, nn.Embedding):
            expected[f"{number}.left"] = FLOATS, (groups, outputs, outputs)
    try:
        index = read_json(path.with_suffix(".json"))
        conform(index, dict[str, FileEntry], path)
        tensors = read_tensors(path.parent, index["factors"])
        check_tensors(tensors, expected, path)
    except (TrajectoryError, KeyError):
        return None
    places = {number: [place for place in (layer.weight, layer.bias) if place] for number, layer in layers.items()}
    sizes = {number: sum(place.stop - place.start for place in each) for number, each in places.items()}
    return tensors if all(tensors[f"{number}.values"].numel() == size for number, size in sizes.items()) else None
