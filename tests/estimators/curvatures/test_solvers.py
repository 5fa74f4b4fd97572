"""Iterative solutions against those of the matrices written out; what does not converge is an error."""

import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import GaussNewton, Hessian
from lightning_dtda.estimators.curvatures.solvers import conjugate_gradients, largest_eigenvalue, mean_eigenvalue
from tests.estimators.curvatures.conftest import Classifier, Regressor
from tests.estimators.curvatures.test_spectra import close


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
    with pytest.raises(AttributionError, match=r"Neumann series diverges|came to a relative residual"):
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
