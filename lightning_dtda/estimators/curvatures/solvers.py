"""Solvers of (H + damping) x = v for a matrix that is only available through products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators.curvatures.curvature import Curvature, resolve_damping
from lightning_dtda.estimators.curvatures.spectrum import fit_spectrum
from lightning_dtda.estimators.objective import Objective
from lightning_dtda.units import is_quantity

Products = Callable[[Tensor], Tensor]
"""Function from vectors ``(Q, P)`` to the matrix times each of them."""


_EXAMPLE = 'preconditioner=EKFAC(damping="auto")'

_WHOLE = 64
"""Units in the last place of a product below which a new Lanczos direction is rounding."""

_SLACK = 2.0
"""Maximum ratio of the true residual to the tolerance; iterations end by the residual of the recurrence."""

_SIGNS = 16
"""Number of random vectors to estimate the trace of a matrix."""

_POWERS = 30
"""Number of products to estimate the largest eigenvalue, to a few per cent."""

_ABOVE = 1.1
"""Factor that lifts the estimated largest eigenvalue above the true one."""

_LONGEST = 10_000
"""Maximum number of terms of a Neumann series."""

_TERMS = 100
"""Number of terms of a Neumann series between checks of its residual."""


def damped(products: Products, damping: float) -> Products:
    """Return products with a matrix plus a damping."""
    return lambda vectors: products(vectors).add_(vectors, alpha=damping)


def conjugate_gradients(
    products: Products,
    vectors: Tensor,
    iterations: int | None,
    tolerance: float,
    precondition: Products | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`A x = v` for several v at once, by conjugate gradients from zero (Hestenes and Stiefel, 1952).

    After j iterations, x minimises the A-norm of the error in the span of :math:`z, M^{-1} A z, \dots,
    (M^{-1} A)^{j-1} z` with :math:`z = M^{-1} v`.

    Args:
        products: Products with A, which must be positive definite.
        vectors: Vectors v ``(Q, P)``.
        iterations: Maximum number of iterations, after which the solution is used even if it has not converged; fewer
            iterations leave out small eigenvalues, which regularises. ``None`` to iterate until the tolerance is
            reached.
        tolerance: Relative residual at which to stop.
        precondition: Products with :math:`M^{-1}`, where M is positive definite; the identity if not given.

    Returns:
        x ``(Q, P)`` and relative residuals ``(Q,)``.

    Raises:
        AttributionError: If A is found not to be positive definite (with ``iterations``, only in the first iteration),
            or the tolerance is not reached in 2 P iterations.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    solution, residual = torch.zeros_like(vectors), vectors.clone()
    direction = vectors.clone() if precondition is None else precondition(vectors)
    squared = residual.square().sum(1)
    steep = squared if precondition is None else (residual * direction).sum(1)
    size = squared.clamp_min(tiny)
    going = squared > tolerance**2 * size
    most = 2 * vectors.shape[1] if iterations is None else iterations
    for number in range(most):
        if not bool(going.any()):
            break
        along = products(direction)
        curvature = (direction * along).sum(1)
        if bool((curvature[going] <= 0).any()):
            if iterations is None or number == 0:  # not even a truncated solution exists
                raise AttributionError(
                    "The damped curvature is not positive definite: conjugate gradients found a direction in which it "
                    "is zero or negative. Raise the damping, or instead of the Hessian use GaussNewton(...), which has "
                    "no negative eigenvalues."
                )
            # a truncated solution ends at the first direction of non-positive curvature
            going = going & (curvature > 0)
        step = torch.where(going, steep / torch.where(going, curvature, 1), 0)
        solution.addcmul_(step[:, None], direction)
        residual.addcmul_(step[:, None], along, value=-1)
        before, squared = steep, residual.square().sum(1)
        towards = residual if precondition is None else precondition(residual)
        steep = squared if precondition is None else (residual * towards).sum(1)
        direction = torch.addcmul(towards, (steep / before.clamp_min(tiny))[:, None], direction)
        going = going & (squared > tolerance**2 * size)
    if iterations is None:
        # the residual of the recurrence keeps falling when rounding stops the true one
        squared = (products(solution) - vectors).square().sum(1)
        if not bool((squared <= (_SLACK * tolerance) ** 2 * size).all()):
            raise AttributionError(
                f"Conjugate gradients reached a relative residual of {float((squared / size).sqrt().max()):.2g} in at "
                f"most {most} iterations; the tolerance is {tolerance:g}. Raise the damping or the tolerance, compute "
                'in double precision (precision="float64"), or give iterations=... to use a truncated solution, which '
                "is regularised."
            )
    return solution, (squared / size).sqrt()


def root_times(products: Products, vectors: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""Return :math:`A^{1/2} v` by Lanczos, for several positive semi-definite matrices A with one v each.

    In the Krylov space of j products, A is a tridiagonal matrix of size j, whose root is computed (Higham, *Functions
    of Matrices*, 2008, section 13.2). This leaves out only small eigenvalues.

    Args:
        products: Function from vectors ``(B, C)`` to the product of each matrix with its vector.
        vectors: Vectors v ``(B, C)``.
        steps: Number of products j.

    Returns:
        The products ``(B, C)``, and the eigenvalues of the tridiagonal matrices ``(B, j)``.
    """
    tiny = torch.finfo(vectors.dtype).tiny
    size = vectors.norm(dim=1, keepdim=True)
    basis = vectors.new_zeros(len(vectors), steps, vectors.shape[1])
    basis[:, 0] = vectors / size.clamp_min(tiny)
    inner = vectors.new_zeros(len(vectors), steps, steps)
    for step in range(steps):
        along = products(basis[:, step])
        inner[:, step, step] = (along * basis[:, step]).sum(1)
        if step == steps - 1:
            break
        # subtract the last two directions first: they are the large part, and rounding leaves a rest of them
        recent = basis[:, max(step - 1, 0) : step + 1]
        for known in (recent, basis[:, : step + 1]):
            along = torch.baddbmm(along[:, None], (known @ along[..., None]).mT, known, alpha=-1)[:, 0]
        length = along.norm(dim=1)
        # only rounding is left if the space is already complete
        length = torch.where(length > _WHOLE * torch.finfo(length.dtype).eps * inner[:, 0, 0], length, 0)
        inner[:, step, step + 1] = inner[:, step + 1, step] = length
        basis[:, step + 1] = torch.where(length[:, None] > 0, along / length[:, None].clamp_min(tiny), 0)
    values, turns = torch.linalg.eigh(inner)
    weights = torch.einsum("bij,bj,bj->bi", turns, values.clamp_min(0).sqrt(), turns[:, 0])
    return size * torch.einsum("bi,bic->bc", weights, basis), values


def lissa(
    products: Products,
    samples: Products,
    vectors: Tensor,
    scale: float,
    *,
    depth: int | None,
    repeats: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    r"""Estimate :math:`A^{-1} v` from products with samples of A (Agarwal et al., arXiv 1602.03943).

    The Neumann series, with a new sample of A for each term:

    .. math:: x_{j+1} = x_j + \frac{v - A_j x_j}{\sigma}, \qquad x_0 = \frac v\sigma

    Args:
        products: Products with A.
        samples: Products with :math:`A_j`, whose mean is A.
        vectors: Vectors v ``(Q, P)``.
        scale: :math:`\sigma`, above the largest eigenvalue.
        depth: Number of terms, even if the series has not converged; ``None`` to add terms until the tolerance is
            reached.
        repeats: Number of series to average.
        tolerance: Relative residual at which to stop.

    Returns:
        x ``(Q, P)`` and its relative residuals ``(Q,)`` with respect to A.

    Raises:
        AttributionError: If the series diverges, or does not reach the tolerance.
    """
    size = vectors.norm(dim=1).clamp_min(torch.finfo(vectors.dtype).tiny)
    series = [vectors / scale for _ in range(repeats)]
    terms = 0
    while True:
        for _ in range(_TERMS if depth is None else min(_TERMS, depth - terms)):
            series = [x.add_(vectors - samples(x), alpha=1 / scale) for x in series]
            terms += 1
        solution = torch.stack(series).mean(0)
        residuals = (products(solution) - vectors).norm(dim=1) / size
        worst = float(residuals.max())
        if not worst < 1 + tolerance:
            raise AttributionError(
                f"The Neumann series diverges (relative residual {worst:.2g} after {terms} terms): the damped Hessian "
                "has negative eigenvalues, or small samples have too large ones. Raise the damping or batch_size, or "
                'use GaussNewton(solver="cg").'
            )
        if (depth is not None and terms >= depth) or (depth is None and worst <= tolerance):
            return solution, residuals
        if terms >= _LONGEST:
            raise AttributionError(
                f"The Neumann series reached a relative residual of {worst:.2g} in {terms} terms; the tolerance is "
                f"{tolerance:g}. Raise the damping, batch_size, repeats or the tolerance, or give iterations=... to "
                "use a truncated series."
            )


def mean_eigenvalue(products: Products, theta: Tensor) -> float:
    r"""Estimate the mean eigenvalue of a matrix as the mean of :math:`u^\top H u / P` over random signs u.

    Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (_SIGNS, len(theta)), generator=generator).to(theta) * 2 - 1
    return float((signs * products(signs)).sum(1).mean()) / len(theta)


def largest_eigenvalue(products: Products, theta: Tensor) -> float:
    """Estimate an upper bound of the largest absolute eigenvalue of a matrix by the power method."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, len(theta), generator=generator, dtype=torch.float64).to(theta)
    size = 0.0
    for _ in range(_POWERS):
        vector = products(vector / vector.norm())
        size = float(vector.norm())
    return _ABOVE * size


def check_preconditioner(preconditioner: Curvature | None, solver: str) -> Curvature | None:
    """Return a preconditioner if it is valid.

    Raises:
        AttributionError: If it is invalid.
    """
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, Curvature) or solver != "cg":
        raise AttributionError(
            f'preconditioner={preconditioner!r} with solver={solver!r}; give solver="cg", and a curvature that has a '
            "spectrum, such as EKFAC()."
        )
    if preconditioner.damping == 0:
        raise AttributionError(
            f"A preconditioner needs a positive damping, or its inverse may not exist. Give {_EXAMPLE}, for example."
        )
    return preconditioner


def fit_preconditioner(preconditioner: Curvature | None, objective: Objective) -> Products | None:
    r"""Fit a curvature M, and return products with its damped inverse :math:`(M + \delta)^{-1}`.

    Raises:
        AttributionError: If M has no spectrum, or the damped matrix is not positive definite.
    """
    if preconditioner is None:
        return None
    spectrum = fit_spectrum(preconditioner, objective, "which a preconditioner needs")
    damping = resolve_damping(preconditioner.damping, preconditioner, spectrum)

    def inverse(values: Tensor) -> Tensor:
        if not bool((values + damping > 0).all()):
            raise AttributionError(
                f"{type(preconditioner).__name__} with damping {damping:.3g} is not positive definite, as a "
                "preconditioner must be. Give it a larger damping."
            )
        return 1 / (values + damping)

    return lambda vectors: spectrum.apply(inverse, vectors)


def check_iterations(iterations: int | None, tolerance: float) -> None:
    """Check the arguments of iterative solvers.

    Raises:
        AttributionError: If one is out of range.
    """
    if iterations is not None and not (is_quantity(iterations, whole=True) and iterations >= 1):
        raise AttributionError(f"iterations={iterations!r}; give at least 1, or None to go on until convergence.")
    if not (is_quantity(tolerance) and 0 < tolerance < 1):
        raise AttributionError(f"tolerance={tolerance!r}; give a relative residual between 0 and 1.")
