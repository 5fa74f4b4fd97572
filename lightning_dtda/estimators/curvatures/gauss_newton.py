"""The Gauss-Newton matrix, exact by the Gram matrix of output Jacobians, or by products with vectors."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, FittedCurvature, Solution, check_damping
from lightning_dtda.estimators.curvatures.exact_hessian import check_cutoff, default_cutoff
from lightning_dtda.estimators.curvatures.root import Root
from lightning_dtda.estimators.curvatures.solvers import (
    Products,
    check_iterations,
    check_preconditioner,
    conjugate_gradients,
    damped,
    fit_preconditioner,
    mean_eigenvalue,
)
from lightning_dtda.estimators.curvatures.spectrum import Function, Spectrum
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.estimators.projection import Projection, check_dimension, projection_to
from lightning_dtda.units import human_bytes

_log = logging.getLogger(__name__)


class GaussNewton(Curvature):
    r"""The (generalised) Gauss-Newton matrix of the training objective, for models of any size.

    .. math:: G = \frac1N \sum_n J_n^\top \nabla^2 \ell_n(z_n) J_n + \operatorname{diag}(\gamma)
        = \frac1N A^\top A + \operatorname{diag}(\gamma)

    with the Jacobian :math:`J_n` of the network's C outputs :math:`z_n`, the loss :math:`\ell_n` as a function of the
    outputs, and the weight decay :math:`\gamma` (Schraudolph, *Fast curvature matrix-vector products*, 2002). It has no
    negative eigenvalues, and equals the Hessian where the residuals are zero.

    ``solver="gram"`` is exact. By the Woodbury identity, with :math:`D = \delta + \gamma`,

    .. math:: (G + \delta)^{-1} = D^{-1} - D^{-1} \frac{A^\top}{\sqrt N} \left(I + \frac{A D^{-1} A^\top}{N}\right)^{-1}
        \frac{A}{\sqrt N} D^{-1}, \qquad G^+ = \frac{A^\top}{\sqrt N} (K^+)^2 \frac{A}{\sqrt N},

    the latter if damping and weight decay are zero, with the Gram matrix :math:`K = A A^\top / N` of size N C, which
    can be tens of thousands; P is not limited. ``solver="cg"`` uses only products with G, for several queries at once.

    Args:
        solver: ``"gram"``, ``"cg"`` or ``"auto"``. ``"auto"`` uses ``"gram"`` if the loss is a mean over examples and
            the Gram matrix fits in memory, and otherwise ``"cg"``. If the loss has no curvature or negative curvature
            in the network's outputs, ``"auto"`` uses the Fisher matrix of the training labels,
            :math:`\frac1N \sum_n \nabla l_n \nabla l_n^\top`, and logs a warning.
        damping: :math:`\delta`; ``"auto"`` for the mean eigenvalue, 0 for the pseudo-inverse.
        iterations: Maximum number of conjugate gradient iterations, after which the solution is used even if it has not
            converged; ``None`` to iterate until the tolerance is reached. Few iterations leave out small eigenvalues,
            which regularises like a damping.
        tolerance: Relative residual at which conjugate gradients stop.
        cutoff: Fraction of the largest eigenvalue below which the pseudo-inverse treats eigenvalues as zero; ``None``
            for N C times machine epsilon.
        projection: Dimension of a random projection of gradients that makes the root fit in memory; see
            ``lightning_dtda.estimators.projection.Projection``. ``None`` for no projection; models with at most this
            number of parameters are not projected either.
        seed: Seed of the projection.
        preconditioner: Preconditioner of conjugate gradients: a curvature M with a spectrum, such as
            :class:`~lightning_dtda.estimators.EKFAC`. Each residual is multiplied by :math:`(M + \delta_M)^{-1}`, where
            :math:`\delta_M` is the damping of M. About ten iterations then replace many.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("solver", "damping", "iterations", "tolerance", "cutoff", "projection", "seed", "preconditioner")

    def __init__(
        self,
        solver: Literal["auto", "gram", "cg"] = "auto",
        damping: Damping = "auto",
        iterations: int | None = None,
        tolerance: float = 1e-4,
        cutoff: float | None = None,
        projection: int | None = None,
        seed: int = 0,
        preconditioner: Curvature | None = None,
    ) -> None:
        if solver not in ("auto", "gram", "cg"):
            raise AttributionError(f'solver={solver!r}; choose "auto", "gram" or "cg".')
        check_iterations(iterations, tolerance)
        self.solver = solver
        self.damping = check_damping(damping)
        self.iterations = iterations
        self.tolerance = tolerance
        self.cutoff = check_cutoff(cutoff)
        self.projection = check_dimension(projection)
        self.seed = seed
        self.preconditioner = check_preconditioner(preconditioner, solver)
        if preconditioner is not None and projection is not None:
            raise AttributionError("A projection mixes parameters, so it excludes a preconditioner. Leave one out.")

    @override
    def fit(self, objective: Objective) -> FittedCurvature:
        projection = projection_to(self.projection, objective.size, self.seed)
        if projection is not None and len(objective.penalty.unique()) > 1:
            raise AttributionError(
                f"The parameters of {objective.run.path} have different weight decays, which a projection would mix. "
                "Leave projection out, or use EKFAC()."
            )
        if self.uses_gram(objective):
            return GramMatrix(objective, projection, self.cutoff)
        precondition = fit_preconditioner(self.preconditioner, objective)
        return ImplicitGaussNewton(
            objective,
            projection,
            self.iterations,
            self.tolerance,
            may_take_fisher=self.solver == "auto",
            precondition=precondition,
        )

    def uses_gram(self, objective: Objective) -> bool:
        """Whether the Gram matrix is used, which ``"auto"`` decides for each objective."""
        return self.solver == "gram" or (
            self.solver == "auto"
            and objective.lacks_curvature is None
            and objective.has_root
            and gram_bytes(objective) <= objective.memory
        )

    @override
    def passes(self, objective: Objective) -> float:
        # products with a stored root cost next to nothing
        return 4.0 if self.solver != "cg" else 4.0 * (self.iterations or 20)


def resolve_curvature(curvature: Curvature | None) -> Curvature:
    """Return a curvature; :class:`GaussNewton` if none is given.

    Raises:
        AttributionError: If the argument is not a curvature.
    """
    if curvature is not None and not isinstance(curvature, Curvature):
        raise AttributionError(f"curvature={curvature!r} is not a curvature. Give one, such as GaussNewton().")
    return GaussNewton() if curvature is None else curvature


def gram_bytes(objective: Objective) -> float:
    """Return the memory of the Gram matrix and its workspace in bytes."""
    rows = objective.examples * objective.outputs
    return (len(objective.penalty.unique()) + 2) * rows**2 * objective.theta.itemsize


_ROUNDING = 0.1
"""Maximum relative rounding error of the root's product with a solution by the Woodbury identity. The solution is a
difference of two vectors, whose lengths grow as the damping shrinks."""


class ImplicitGaussNewton(FittedCurvature):
    """A Gauss-Newton matrix by its products, computed with its root if that fits in memory."""

    def __init__(
        self,
        objective: Objective,
        projection: Projection | None,
        iterations: int | None,
        tolerance: float,
        may_take_fisher: bool = False,
        precondition: Products | None = None,
    ) -> None:
        self._objective = objective
        self._projection = projection
        self._iterations = iterations
        self._tolerance = tolerance
        self._precondition = precondition
        self._root: Root | None = None
        self._of_objective = objective.gauss_newton_products
        self._may_take_fisher = may_take_fisher
        if may_take_fisher and objective.lacks_curvature is not None:
            self._take_fisher(objective.lacks_curvature)
        elif objective.has_root:
            root = Root(objective, projection)
            self._root = root if root.is_kept or projection is not None else None
        elif projection is not None:
            objective.refuse_root("A projection of the Gauss-Newton matrix")

    def _take_fisher(self, why: str) -> None:
        _log.warning("Using the Fisher matrix of the training labels instead of the Gauss-Newton matrix: %s.", why)
        self._of_objective, self._root, self._may_take_fisher = self._objective.fisher_products, None, False

    @cached_property
    @override
    def mean_eigenvalue(self) -> float:
        if self._root is None:
            return mean_eigenvalue(self._products, self._objective.theta)
        return (self._root.trace() + float(self._objective.penalty.sum())) / self._objective.size

    def _products(self, vectors: Tensor) -> Tensor:
        if self._root is None:
            return self._of_objective(vectors)
        penalty = self._objective.penalty if self._projection is None else self._objective.penalty[:1]
        return (
            self._root.transposed(self._root.times(vectors)).div_(self._objective.examples).addcmul_(vectors, penalty)
        )

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        projected = vectors if self._projection is None else self._projection.forward(vectors)
        products = damped(self._products, damping)
        try:
            solution, residuals = conjugate_gradients(
                products, projected, self._iterations, self._tolerance, self._precondition
            )
        except AttributionError:
            if not self._may_take_fisher:
                raise
            self._take_fisher("the latter is not positive definite")
            return self.solve(vectors, damping)
        return Solution(solution if self._projection is None else self._projection.transpose(solution), residuals)


class GramMatrix(Spectrum):
    """A Gauss-Newton matrix represented by the Gram matrix of its root.

    There is one Gram matrix for each value of the weight decay, which allows any damping without recomputing them.
    """

    def __init__(self, objective: Objective, projection: Projection | None, cutoff: float | None) -> None:
        self._objective = objective
        self._projection = projection
        self._penalties, groups = objective.penalty.unique(return_inverse=True)
        needed = gram_bytes(objective)
        if needed > objective.memory:
            raise AttributionError(
                f"The Gram matrix of {objective.examples} examples with {objective.outputs} outputs takes "
                f"{human_bytes(needed)}; {human_bytes(objective.memory)} can be used. Raise memory_budget, or use "
                'GaussNewton(solver="cg").'
            )
        self._root = Root(objective, projection)
        # groups of parameters by weight decay; projected dimensions form one group
        self._groups = groups if projection is None else groups.new_zeros(projection.dimension)
        self._grams = torch.stack([self._root.gram(self._groups == group) for group in range(len(self._penalties))])
        self._grams /= objective.examples
        self.cutoff = default_cutoff(self._grams[0, 0]) if cutoff is None else cutoff

    @property
    @override
    def mean_eigenvalue(self) -> float:
        trace = float(self._grams.diagonal(dim1=1, dim2=2).sum()) + float(self._objective.penalty.sum())
        return trace / self._objective.size

    @property
    @override
    def largest_eigenvalue(self) -> float:
        values, _ = self._decomposition
        return self._penalty + (float(values.max()) if len(values) else 0.0)

    @property
    def _penalty(self) -> float:
        if len(self._penalties) > 1:
            raise AttributionError(
                f"The parameters of {self._objective.run.path} have different weight decays, so the eigenvectors of "
                "the Gauss-Newton matrix do not follow from the Gram matrix. Use a damping, or ExactHessian()."
            )
        return float(self._penalties)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """Nonzero eigenvalues of the Gram matrix, and their eigenvectors."""
        values, basis = torch.linalg.eigh(self._grams[0])
        kept = values > max(self.cutoff, default_cutoff(values)) * values[-1].clamp_min(0)
        return values[kept], basis[:, kept]

    @override
    def apply(self, function: Function, vectors: Tensor) -> Tensor:
        r"""Return f(G) v for vectors ``(Q, P)``.

        .. math:: f(G) = f(\gamma) + \frac{A^\top}{\sqrt N} U \frac{f(\lambda + \gamma) - f(\gamma)}{\lambda} U^\top
            \frac{A}{\sqrt N}, \qquad K = U \lambda U^\top
        """
        values, basis = self._decomposition
        vectors = vectors if self._projection is None else self._projection.forward(vectors)
        at_zero = function(values.new_full((1,), self._penalty))
        slopes = (function(values + self._penalty) - at_zero) / values / self._objective.examples
        weights = basis @ (slopes[:, None] * (basis.T @ self._root.times(vectors)))
        result = self._root.transposed(weights).addcmul_(vectors, at_zero)
        return result if self._projection is None else self._projection.transpose(result)

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        if damping == 0 and not bool(self._penalties.any()):
            return super().solve(vectors, damping)
        diagonal = self._penalties + damping
        if not bool((diagonal > 0).all()):
            raise AttributionError(
                f"The Gauss-Newton matrix of {self._objective.run.path} cannot be inverted with damping {damping:.3g}: "
                f"damping and weight decay are {float(diagonal.min()):.3g} for some parameters. Give a larger damping."
            )
        vectors = vectors if self._projection is None else self._projection.forward(vectors)
        scale = 1 / diagonal[self._groups]
        gram = torch.einsum("gij,g->ij", self._grams, 1 / diagonal)
        gram.diagonal().add_(1)
        # a third of the work of an eigendecomposition, and still less work with many dampings
        factor, failed = torch.linalg.cholesky_ex(gram)
        weights = torch.cholesky_solve(self._root.times(vectors * scale), factor)
        solution = (vectors - self._root.transposed(weights).div_(self._objective.examples)).mul_(scale)
        # the weights equal the root's product with the solution, but without its cancellation
        error = (self._root.times(solution) - weights).norm()
        if bool(failed) or not bool(error <= _ROUNDING * weights.norm()):
            raise AttributionError(
                f"Damping {damping:.3g} is too small for {self._objective.run.path}: it is so far below the largest "
                "eigenvalue that the responses would be rounding errors. Give a larger damping, or 0 (the "
                "pseudo-inverse) if there is no weight decay, or compute in double precision "
                '(precision="float64").'
            )
        return Solution(solution if self._projection is None else self._projection.transpose(solution))
