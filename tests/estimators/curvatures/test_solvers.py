"""Iterative solutions against those of the matrices written out; what does not converge is an error."""

import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import EKFAC, Diagonal, ExactHessian, GaussNewton, Hessian
from lightning_dtda.estimators.curvatures.solvers import (
    conjugate_gradients,
    largest_eigenvalue,
    mean_eigenvalue,
    root_times,
)
from tests.estimators.small_runs import Classifier, Regressor, close


def dense_solution(matrix, damping, vectors):
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=torch.float64), vectors.T).T


@pytest.mark.parametrize("memory", [1e9, 1e5])
def test_conjugate_gradients_reach_the_dense_solution(trained, vectors, memory):
    run = trained(Classifier(weight_decay=0.02, decayed_bias=False))
    v = vectors(len(run.theta))
    solution = GaussNewton("cg", tolerance=1e-9).fit(run.objective(memory)).solve(v, 0.1)
    close(solution.vectors, dense_solution(run.gauss_newton(), 0.1, v), 1e-6)
    assert solution.residuals.max() < 1e-8
    solution = Hessian("cg", tolerance=1e-9).fit(run.objective(memory)).solve(v, 2.0)
    close(solution.vectors, dense_solution(run.hessian(), 2.0, v), 1e-6)


def test_a_neumann_series_over_all_examples_reaches_the_dense_solution(trained, vectors):
    run = trained(Regressor())
    v = vectors(len(run.theta))
    solution = Hessian("lissa", tolerance=1e-8).fit(run.objective()).solve(v, 2.0)
    close(solution.vectors, dense_solution(run.hessian(), 2.0, v), 1e-6)


@pytest.mark.slow
def test_a_neumann_series_over_samples_comes_near_it(trained, vectors):
    run = trained(Regressor())
    v = vectors(len(run.theta))
    expected = dense_solution(run.hessian(), 2.0, v)
    solution = Hessian("lissa", batch_size=7, repeats=20, iterations=100).fit(run.objective()).solve(v, 2.0)
    assert (solution.vectors - expected).norm() < 0.1 * expected.norm()
    assert 0 < solution.residuals.max() < 0.2


def test_truncated_iterations_are_krylov_solutions(trained, vectors):
    run = trained(Classifier())
    v, dense = vectors(len(run.theta), 1), run.gauss_newton()
    solution = GaussNewton("cg", iterations=3).fit(run.objective()).solve(v, 0.0)
    # conjugate gradients minimise the quadratic over the span of v, G v, G^2 v
    basis = torch.linalg.qr(torch.stack([v[0], dense @ v[0], dense @ dense @ v[0]], 1)).Q
    expected = basis @ torch.linalg.solve(basis.T @ dense @ basis, basis.T @ v[0])
    close(solution.vectors[0], expected, 1e-6)
    assert solution.residuals[0] > 1e-3


def test_an_indefinite_matrix_is_refused(trained, vectors):
    run = trained(Regressor())
    fitted = Hessian("cg").fit(run.objective())
    with pytest.raises(AttributionError, match="not positive definite"):
        fitted.solve(vectors(len(run.theta)), 0.0)
    with pytest.raises(AttributionError, match=r"Neumann series diverges|reached a relative residual"):
        Hessian("lissa").fit(run.objective()).solve(vectors(len(run.theta)), 0.0)


def test_truncated_iterations_that_cannot_begin_are_refused():
    matrix = torch.diag(torch.tensor([-1.0, 2.0, 3.0]))
    v = torch.tensor([[1.0, 0.1, 0.1], [0.0, 1.0, 1.0]])  # the first one points where the matrix is negative
    with pytest.raises(AttributionError, match="not positive definite"):
        conjugate_gradients(lambda x: x @ matrix, v, 2, 1e-4)
    solution, _ = conjugate_gradients(lambda x: x @ matrix, v[1:], 2, 1e-4)
    torch.testing.assert_close(solution, torch.tensor([[0, 1 / 2, 1 / 3]]))


def test_a_solution_that_does_not_converge_is_refused(trained, vectors):
    run = trained(Regressor(), examples=6)  # rank 12 of 37: what is outside the range has no solution
    with pytest.raises(AttributionError, match=r"relative residual of|not positive definite"):
        GaussNewton("cg").fit(run.objective()).solve(vectors(len(run.theta)), 0.0)


def test_roots_by_lanczos_are_those_of_each_matrix():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(3, 12, 5, generator=generator, dtype=torch.float64)  # of rank 5
    matrices, vectors = half @ half.mT, torch.randn(3, 12, generator=generator, dtype=torch.float64)
    values, basis = torch.linalg.eigh(matrices)
    expected = torch.einsum("bij,bj,bkj,bk->bi", basis, values.clamp_min(0).sqrt(), basis, vectors)

    def products(some):
        return torch.einsum("bij,bj->bi", matrices, some)

    # in exact arithmetic, rank + 1 products span the whole space; further ones add nothing
    for steps in (6, 12):
        found, of_space = root_times(products, vectors, steps)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # a root of rounding is its square root
        torch.testing.assert_close(of_space.amax(1), values.amax(1), rtol=1e-10, atol=0)
    assert not root_times(products, torch.zeros_like(vectors), 4)[0].any()


def test_the_root_of_a_cross_entropy_over_many_classes_is_near_in_few_products():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(4, 300, generator=generator, dtype=torch.float64)).softmax(1)
    signs = torch.randint(2, (4, 300), generator=generator).double() * 2 - 1
    values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    expected = torch.einsum("bij,bj,bkj,bk->bi", basis, values.clamp_min(0).sqrt(), basis, signs)
    found, _ = root_times(lambda u: p * u - p * (p * u).sum(1, keepdim=True), signs, 24)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_vectors_of_zeros_have_zeros_as_solution():
    solution, residuals = conjugate_gradients(lambda v: 2 * v, torch.zeros(2, 5), None, 1e-4)
    assert not solution.any()
    assert not residuals.any()


def test_eigenvalues_are_estimated(trained):
    run = trained(Classifier())
    dense = run.gauss_newton()
    values = torch.linalg.eigvalsh(dense)
    assert mean_eigenvalue(lambda v: v @ dense, run.theta) == pytest.approx(float(values.mean()), rel=0.5)
    found = largest_eigenvalue(lambda v: v @ dense, run.theta)
    assert float(values.max()) < found < 1.2 * float(values.max())


@pytest.mark.parametrize("arguments", [{"solver": "lu"}, {"iterations": 0}, {"tolerance": 0.0}, {"tolerance": 2.0}])
@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
def test_arguments_out_of_range_are_refused(curvature, arguments):
    with pytest.raises(AttributionError, match=r"choose|give"):
        curvature(**arguments)


@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
@pytest.mark.parametrize("preconditioner", [EKFAC(), Diagonal(damping=0.3)])
def test_a_preconditioner_leaves_the_solution_as_it_is(trained, vectors, curvature, preconditioner):
    run = trained(Classifier(weight_decay=0.05))
    v, dense = vectors(len(run.theta)), run.gauss_newton() if curvature is GaussNewton else run.hessian()
    solver = curvature(solver="cg", damping=1.0, tolerance=1e-10, preconditioner=preconditioner)
    expected = dense_solution(dense, 1.0, v)
    found = solver.fit(run.objective()).solve(v, 1.0)
    torch.testing.assert_close(found.vectors, expected, rtol=1e-7, atol=1e-9)
    assert bool((found.residuals <= 1e-10).all())
    assert solver.settings()["preconditioner"] == preconditioner.settings()


def test_iterations_stop_in_the_span_of_preconditioned_products(trained, vectors):
    run = trained(Classifier(weight_decay=0.05))
    matrix = run.gauss_newton() + 0.01 * torch.eye(len(run.theta), dtype=torch.float64)
    v = vectors(len(run.theta), 1)
    spectrum = EKFAC(damping=0.02).fit(run.objective())
    inverse = spectrum.apply(lambda values: 1 / (values + 0.02), torch.eye(len(matrix), dtype=torch.float64))
    first = inverse @ v[0]
    span = torch.stack([first, inverse @ matrix @ first, inverse @ matrix @ inverse @ matrix @ first], 1)
    # the best solution of three steps, by the norm of the matrix
    expected = span @ torch.linalg.solve(span.T @ matrix @ span, span.T @ v[0])
    solver = GaussNewton(solver="cg", damping=0.01, iterations=3, preconditioner=EKFAC(damping=0.02))
    found = solver.fit(run.objective()).solve(v, 0.01).vectors[0]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussNewton(preconditioner=EKFAC()), 'give solver="cg"'),
        (lambda: Hessian(solver="lissa", preconditioner=EKFAC()), 'give solver="cg"'),
        (lambda: GaussNewton(solver="cg", preconditioner="ekfac"), "a curvature that has a spectrum, such as EKFAC"),
        (lambda: GaussNewton(solver="cg", preconditioner=EKFAC(damping=0)), "needs a positive damping"),
        (lambda: GaussNewton(solver="cg", projection=5, preconditioner=EKFAC()), "Leave one out"),
    ],
)
def test_preconditioners_that_cannot_work_are_refused(make, message):
    with pytest.raises(AttributionError, match=message):
        make()


def test_a_preconditioner_is_one_that_has_positive_eigenvalues(trained):
    objective = trained(Classifier()).objective()
    with pytest.raises(AttributionError, match="it has no spectrum"):
        GaussNewton(solver="cg", preconditioner=GaussNewton(solver="cg")).fit(objective)
    fitted = GaussNewton(solver="cg", preconditioner=ExactHessian(damping=1e-9)).fit(objective)
    with pytest.raises(AttributionError, match="Give it a larger damping"):
        fitted.solve(torch.ones(1, objective.size, dtype=torch.float64), 1.0)
    wide = GaussNewton(solver="cg", preconditioner=ExactHessian(damping=5.0)).fit(objective)
    assert bool(wide.solve(torch.ones(1, objective.size, dtype=torch.float64), 1.0).vectors.isfinite().all())
