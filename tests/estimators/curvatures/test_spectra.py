"""Exact inverses against those of the matrices written out, in double precision."""

import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import Diagonal, ExactHessian, GaussNewton, Identity
from lightning_dtda.estimators.curvatures import root
from lightning_dtda.estimators.curvatures.gauss_newton import ImplicitGaussNewton
from lightning_dtda.estimators.projection import Projection
from tests.estimators.small_runs import Classifier, Regressor, close

CASES = {
    "classifier": lambda: Classifier(),
    "regressor": lambda: Regressor(),
    "weight decay": lambda: Classifier(weight_decay=0.05),
    "weight decay of some parameters": lambda: Classifier(weight_decay=0.05, decayed_bias=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("damping", [1.0, 0.01])
@pytest.mark.parametrize("is_kept", [True, False])
def test_gram_equals_dense_gauss_newton(trained, vectors, monkeypatch, case, damping, is_kept):
    run = trained(CASES[case]())
    if not is_kept:
        monkeypatch.setattr(root, "_SHARE", 2e-6)  # of 1 GB: five columns at a time
    objective = run.objective()
    v = vectors(objective.size)
    fitted = GaussNewton().fit(objective)
    assert fitted._root.is_kept == is_kept
    dense = run.gauss_newton()
    identity = torch.eye(objective.size, dtype=torch.float64)
    close(fitted.solve(v, damping).vectors, torch.linalg.solve(dense + damping * identity, v.T).T)
    assert fitted.mean_eigenvalue == pytest.approx(float(dense.trace()) / objective.size, rel=1e-10)


def test_gram_without_damping_is_the_pseudo_inverse(trained, vectors):
    run = trained(Regressor(), examples=6)  # 12 outputs, 37 parameters
    fitted, v = GaussNewton().fit(run.objective()), vectors(37)
    dense = run.gauss_newton()
    assert torch.linalg.matrix_rank(dense, hermitian=True) == 12
    close(fitted.solve(v, 0.0).vectors, v @ torch.linalg.pinv(dense, hermitian=True, rtol=1e-12))
    projection = v @ dense @ torch.linalg.pinv(dense, hermitian=True, rtol=1e-12)
    close(fitted.project(v), projection)


def test_gram_and_dense_agree_on_any_function(trained, vectors):
    run = trained(Classifier(weight_decay=0.05))
    fitted, dense = GaussNewton().fit(run.objective()), run.gauss_newton()
    v = vectors(len(dense))
    close(fitted.apply(lambda values: torch.exp(-3 * values), v), v @ torch.linalg.matrix_exp(-3 * dense))


def test_weight_decay_stands_in_for_damping(trained, vectors):
    run = trained(Classifier(weight_decay=0.05))
    v = vectors(len(run.theta))
    close(GaussNewton().fit(run.objective()).solve(v, 0.0).vectors, torch.linalg.solve(run.gauss_newton(), v.T).T)


def test_parameters_without_any_damping_are_refused(trained, vectors):
    run = trained(Classifier(weight_decay=0.05, decayed_bias=False))
    fitted = GaussNewton().fit(run.objective())
    with pytest.raises(AttributionError, match="cannot be inverted with damping 0"):
        fitted.solve(vectors(len(run.theta)), 0.0)
    with pytest.raises(AttributionError, match="different weight decays"):
        fitted.project(vectors(len(run.theta)))


def test_a_damping_of_which_rounding_leaves_nothing_is_refused(trained, vectors):
    run = trained(Classifier())
    fitted, dense, v = GaussNewton().fit(run.objective()), run.gauss_newton(), vectors(len(run.theta))
    values, basis = torch.linalg.eigh(dense)
    for damping in (1e-16 * float(values[-1]), 1e-30):
        with pytest.raises(AttributionError, match=r"responses would be rounding errors. Give a larger damping"):
            fitted.solve(v, damping)
    # at a damping far enough above, what gradients of losses see of the solution is right
    damping = 1e-9 * float(values[-1])
    close(fitted.solve(v, damping).vectors @ dense, v @ basis * (values / (values + damping)) @ basis.T, 1e-5)


class Unmoved(Classifier):
    """Has a loss that does not depend on the parameters."""

    def training_step(self, batch, batch_idx):
        return 0 * self(batch[0]).sum()


@pytest.mark.parametrize("curvature", [GaussNewton("gram"), ExactHessian(), Diagonal()])
def test_the_pseudo_inverse_of_zero_is_zero(trained, vectors, curvature):
    run = trained(Unmoved())
    assert not curvature.fit(run.objective()).solve(vectors(len(run.theta)), 0.0).vectors.any()


def test_a_gram_matrix_that_does_not_fit_the_memory_is_refused(trained):
    with pytest.raises(AttributionError, match="The Gram matrix of 14 examples with 3 outputs takes"):
        GaussNewton("gram").fit(trained(Classifier()).objective(memory=4e4))


def test_without_room_for_a_gram_matrix_there_are_products_by_default(trained, vectors):
    run = trained(Classifier())
    fitted = GaussNewton(tolerance=1e-10).fit(run.objective(memory=4e4))
    v, dense = vectors(len(run.theta)), run.gauss_newton()
    assert isinstance(fitted, ImplicitGaussNewton)
    close(fitted.solve(v, 0.1).vectors, torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)).double(), v.T).T)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("damping", [10.0, 0.3])
def test_exact_hessian_equals_the_hessian_written_out(trained, vectors, case, damping):
    run = trained(CASES[case]())
    v, dense = vectors(len(run.theta)), run.hessian()
    identity = torch.eye(len(dense), dtype=torch.float64)
    fitted = ExactHessian().fit(run.objective())
    close(fitted.solve(v, damping).vectors, torch.linalg.solve(dense + damping * identity, v.T).T)
    assert fitted.mean_eigenvalue == pytest.approx(float(dense.trace()) / len(dense), rel=1e-10)


def test_exact_hessian_without_damping_is_the_pseudo_inverse(trained, vectors):
    run = trained(Regressor(), examples=4)
    v, dense = vectors(len(run.theta)), run.hessian()
    expected = v @ torch.linalg.pinv(dense, hermitian=True, rtol=1e-6)
    close(ExactHessian(cutoff=1e-6).fit(run.objective()).solve(v, 0.0).vectors, expected, 1e-6)


def test_a_damping_that_cancels_an_eigenvalue_is_refused(trained, vectors):
    run = trained(Regressor())
    fitted = ExactHessian().fit(run.objective())
    smallest = float(fitted.values.min())
    assert smallest < 0
    v = vectors(len(run.theta))
    for damping in (-smallest, -smallest * (1 + 1e-15)):  # equal, and equal but for rounding
        with pytest.raises(AttributionError, match="is singular: one eigenvalue is"):
            fitted.solve(v, damping)
    dense = run.hessian() - 2 * smallest * torch.eye(len(run.theta), dtype=torch.float64)
    close(fitted.solve(v, -2 * smallest).vectors, torch.linalg.solve(dense, v.T).T)


def test_a_hessian_that_does_not_fit_the_memory_is_refused(trained):
    with pytest.raises(AttributionError, match=r"The Hessian of 37 parameters takes 42\.8 KiB"):
        ExactHessian().fit(trained(Regressor()).objective(memory=1e4))


def test_diagonal_and_identity(trained, vectors):
    run = trained(Classifier(weight_decay=0.05))
    v = vectors(len(run.theta))
    diagonal = Diagonal().fit(run.objective())
    close(diagonal.solve(v, 0.2).vectors, v / (run.gauss_newton().diagonal() + 0.2))
    close(Identity().fit(run.objective()).solve(v, 0.0).vectors, v)


@pytest.mark.parametrize("damping", [0.1, 0.0])
def test_projected_solutions_are_those_of_the_projected_matrix(trained, vectors, damping):
    run = trained(Classifier())
    v, dense = vectors(len(run.theta)), run.gauss_newton()
    matrix = Projection(len(dense), 20, seed=5).forward(torch.eye(len(dense), dtype=torch.float64))
    small = matrix.T @ dense @ matrix + damping * torch.eye(20, dtype=torch.float64)
    expected = v @ matrix @ torch.linalg.inv(small) @ matrix.T
    found = GaussNewton(projection=20, seed=5).fit(run.objective()).solve(v, damping).vectors
    close(found, expected, 1e-6)  # without damping, the condition of the matrix takes digits
    if damping:
        by_products = GaussNewton("cg", projection=20, seed=5, tolerance=1e-9).fit(run.objective()).solve(v, damping)
        close(by_products.vectors, expected, 1e-6)


@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_a_projected_root_that_does_not_fit_the_memory_is_computed_again(trained, vectors, monkeypatch, solver):
    run = trained(Classifier())
    objective, v = run.objective(), vectors(len(run.theta))
    curvature = GaussNewton(solver, projection=20, seed=5, tolerance=1e-9)
    held = curvature.fit(objective).solve(v, 0.1).vectors
    monkeypatch.setattr(root, "_SHARE", 2e-6)
    close(curvature.fit(objective).solve(v, 0.1).vectors, held, 1e-6)


def test_a_model_of_no_more_parameters_than_dimensions_is_not_projected(trained, vectors):
    run = trained(Classifier(weight_decay=0.05, decayed_bias=False))
    v = vectors(len(run.theta))
    exact = GaussNewton().fit(run.objective()).solve(v, 0.1).vectors
    close(GaussNewton(projection=len(run.theta)).fit(run.objective()).solve(v, 0.1).vectors, exact)


@pytest.mark.parametrize("projection", [0, -1, 1.5, True])
def test_a_number_of_dimensions_that_is_none_is_refused(projection):
    with pytest.raises(AttributionError, match="positive number of dimensions"):
        GaussNewton(projection=projection)


def test_a_projection_mixes_weight_decays(trained):
    with pytest.raises(AttributionError, match="different weight decays, which a projection would mix"):
        GaussNewton(projection=5).fit(trained(Classifier(weight_decay=0.1, decayed_bias=False)).objective())


@pytest.mark.parametrize("curvature", [GaussNewton, ExactHessian, Diagonal, Identity])
@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf"), "large", True])
def test_a_damping_that_is_none_is_refused(curvature, damping):
    with pytest.raises(AttributionError, match="non-negative"):
        curvature(damping=damping)
