"""The Hessian by products with vectors, for models of any size."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, Damping, FittedCurvature, Solution, check_damping
from lightning_dtda.estimators.curvatures.solvers import (
    Products,
    check_iterations,
    check_preconditioner,
    conjugate_gradients,
    damped,
    fit_preconditioner,
    largest_eigenvalue,
    lissa,
    mean_eigenvalue,
)
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.units import is_quantity

_PRODUCT = 4.0
"""Time of a Hessian product relative to a directional derivative of the losses, which has no backward pass."""


class Hessian(Curvature):
    r"""The Hessian of the training objective by products with vectors, for models of any size.

    ``solver="cg"`` solves :math:`(H + \delta) x = v` by conjugate gradients, for all queries at once (Martens, *Deep
    learning via Hessian-free optimization*, 2010; Koh and Liang, arXiv 1703.04730, section 3). ``solver="lissa"`` sums
    a Neumann series of products with small samples of the examples (Agarwal, Bullins and Hazan, arXiv 1602.03943).

    Both need a positive definite :math:`H + \delta`, so for a network the damping must exceed the absolute value of the
    most negative eigenvalue. A solution that does not converge raises an error, unless ``iterations`` is given.

    Args:
        solver: ``"cg"`` or ``"lissa"``.
        damping: :math:`\delta`; ``"auto"`` for the mean eigenvalue.
        iterations: Maximum number of iterations, after which the solution is used even if it has not converged;
            ``None`` to iterate until the tolerance is reached. Few iterations leave out small eigenvalues, which
            regularises like a damping.
        tolerance: Relative residual at which to stop; ``None`` for 1e-4 with ``"cg"``, and 0.1 with ``"lissa"``, whose
            samples are noisy.
        batch_size: Number of examples in a term of ``"lissa"``; ``None`` for all of them.
        repeats: Number of ``"lissa"`` series to average.
        preconditioner: Preconditioner for ``"cg"``; see :class:`~lightning_dtda.estimators.GaussNewton`.

    Raises:
        AttributionError: If an argument is out of range.
    """

    arguments = ("solver", "damping", "iterations", "tolerance", "batch_size", "repeats", "preconditioner")

    def __init__(
        self,
        solver: Literal["cg", "lissa"] = "cg",
        damping: Damping = "auto",
        iterations: int | None = None,
        tolerance: float | None = None,
        batch_size: int | None = None,
        repeats: int = 1,
        preconditioner: Curvature | None = None,
    ) -> None:
        if solver not in ("cg", "lissa"):
            raise AttributionError(f'solver={solver!r}; choose "cg" or "lissa".')
        sizes = (repeats, 1 if batch_size is None else batch_size)
        if not all(is_quantity(size, whole=True) and size >= 1 for size in sizes):
            raise AttributionError("batch_size and repeats must be at least 1.")
        self.solver = solver
        self.damping = check_damping(damping)
        self.iterations = iterations
        # the noise of the samples limits how close a series can get to the solution
        self.tolerance = (1e-4 if solver == "cg" else 0.1) if tolerance is None else tolerance
        check_iterations(iterations, self.tolerance)
        self.batch_size = batch_size
        self.repeats = repeats
        self.preconditioner = check_preconditioner(preconditioner, solver)

    @override
    def fit(self, objective: Objective) -> ImplicitHessian:
        return ImplicitHessian(objective, self)

    @override
    def passes(self, objective: Objective) -> float:
        return _PRODUCT * (20 if self.iterations is None else self.iterations)


class ImplicitHessian(FittedCurvature):
    """A Hessian that is never stored."""

    def __init__(self, objective: Objective, curvature: Hessian) -> None:
        self._objective = objective
        self._curvature = curvature
        self._precondition = fit_preconditioner(curvature.preconditioner, objective)

    @cached_property
    @override
    def mean_eigenvalue(self) -> float:
        return mean_eigenvalue(self._objective.hessian_products, self._objective.theta)

    @override
    def solve(self, vectors: Tensor, damping: float) -> Solution:
        curvature, objective = self._curvature, self._objective
        products = damped(objective.hessian_products, damping)
        if curvature.solver == "cg":
            found = conjugate_gradients(
                products, vectors, curvature.iterations, curvature.tolerance, self._precondition
            )
            return Solution(*found)
        return Solution(
            *lissa(
                products,
                damped(self._of_samples(), damping),
                vectors,
                largest_eigenvalue(products, objective.theta),
                depth=curvature.iterations,
                repeats=curvature.repeats,
                tolerance=curvature.tolerance,
            )
        )

    def _of_samples(self) -> Products:
        """Return products with the Hessian of a random sample of the examples, a new sample for each product."""
        objective, size = self._objective, self._curvature.batch_size
        if size is None or size >= objective.examples:
            return objective.hessian_products
        generator = torch.Generator().manual_seed(0)

        def product(vectors: Tensor) -> Tensor:
            drawn = torch.randperm(objective.examples, generator=generator)[:size]
            return objective.hessian_products(vectors, drawn)

        return product
