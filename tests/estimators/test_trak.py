"""TRAK, against its equation written out and against influence functions."""

import lightning.pytorch as pl
import pytest
import torch
from torch.func import jacrev
from torch.utils.data import DataLoader

from lightning_dtda import Ensemble, InfluenceFunctions, TrajectoryRecorder, attribute
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import TRAK, GaussNewton
from lightning_dtda.estimators.projection import Projection
from tests.estimators.baselines import EXAMPLES, Weighted, ask, classification, written_out
from tests.estimators.ridge import Ridge, regression


def written(run, dimension, damping, step=None):
    """The responses of margins, with the derivative of cross entropy by the margin in closed form."""
    theta = run.theta_vector(run.steps if step is None else step)
    margins, losses = written_out(run)
    projection = torch.eye(len(theta), dtype=torch.float64)
    if dimension is not None:
        projection = Projection(len(theta), dimension, seed=3).forward(projection)
    of_queries = jacrev(margins)(theta) @ projection
    features = jacrev(lambda theta: margins(theta, *classification().tensors))(theta) @ projection
    gram = features.T @ features / EXAMPLES
    if damping == "auto":
        damping = gram.trace() / len(gram)
    damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.inv(damped) if damping else torch.linalg.pinv(gram)
    probabilities = torch.exp(-losses(theta))
    return of_queries @ inverse @ (features * (probabilities - 1)[:, None]).T / EXAMPLES


@pytest.mark.parametrize("projection", [None, 20, 2048])
@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_responses_are_those_of_the_equation(classifiers, projection, damping):
    found = ask(classifiers, TRAK(projection, damping, seed=3))
    for number, run in enumerate(classifiers):
        dimension = 20 if projection == 20 else None  # of no more parameters than dimensions, all are taken
        expected = written(run, dimension, damping)
        torch.testing.assert_close(found.responses[number], expected, rtol=1e-10, atol=1e-12)
        baseline = written_out(run)[0](run.theta_vector(run.steps))
        torch.testing.assert_close(found.baseline[number], baseline, rtol=1e-10, atol=1e-12)


def test_without_damping_they_are_those_of_the_pseudo_inverse(classifiers):
    found = ask(classifiers, TRAK(10, damping=0, seed=3))
    for number, run in enumerate(classifiers):
        # the condition of the matrix takes digits
        torch.testing.assert_close(found.responses[number], written(run, 10, 0), rtol=1e-8, atol=1e-10)


def test_responses_are_of_the_step_that_is_asked_for(classifiers):
    found = ask(classifiers, TRAK(None, 0.1), step=5)
    for number, run in enumerate(classifiers):
        torch.testing.assert_close(found.responses[number], written(run, None, 0.1, 5), rtol=1e-10, atol=1e-12)


def test_coefficients_in_the_loss_of_the_batch_are_those_of_the_example(weighted_classifiers):
    found = ask(weighted_classifiers, TRAK(None, 0.1), Weighted())
    for number, run in enumerate(weighted_classifiers):
        # 4 times the class's weight over the sum of the batch's, which is between 4 and 16
        coefficients = found.responses[number] / written(run, None, 0.1)
        torch.testing.assert_close(coefficients, coefficients[:1].expand_as(coefficients), rtol=1e-8, atol=0)
        classes = classification().tensors[1]
        of_class = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[classes]
        assert bool((coefficients[0] >= of_class / 4 - 1e-8).all())
        assert bool((coefficients[0] <= of_class + 1e-8).all())


def test_for_squared_errors_it_is_twice_the_influence_function(fit, tmp_path):
    class Plain(Ridge):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = regression()
    pl.seed_everything(0, verbose=False)
    fit(Plain(), DataLoader(data, 5, shuffle=True), TrajectoryRecorder(tmp_path), max_steps=9, max_epochs=-1)

    def answer(estimator):
        arguments = {"queries": regression(3, 1), "measurement": "prediction", "progress": False}
        return attribute(Ensemble.open(tmp_path), Plain(), data, estimator=estimator, **arguments).responses

    # the second derivative of a squared error, which TRAK leaves out, is two
    influence = answer(InfluenceFunctions(GaussNewton(damping=0.2)))
    torch.testing.assert_close(answer(TRAK(damping=0.1)), 2 * influence, rtol=1e-10, atol=1e-12)


def test_groups_and_chunks_add_up(classifiers, monkeypatch):

    alone = ask(classifiers, TRAK(20))
    size = classifiers[0].layout.size
    monkeypatch.setattr(TRAK, "vectors", 2**29 / 8 / size)  # of 1 GiB: one query at a time
    groups = ask(classifiers, TRAK(20), removals=[[0, 3], [7]])
    expected = torch.stack([alone.responses[..., [0, 3]].sum(-1), alone.responses[..., 7]], -1)
    torch.testing.assert_close(groups.responses, expected, rtol=1e-12, atol=1e-14)


def test_another_seed_is_another_projection(classifiers):
    first, again, other = (ask(classifiers, TRAK(20, seed=seed)).responses for seed in (0, 0, 1))
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.allclose(other, first)


def test_the_loss_is_refused(classifiers):
    with pytest.raises(AttributionError, match='Use measurement="margin"'):
        ask(classifiers, TRAK(), measurement="loss")


def test_a_measurement_that_depends_on_no_parameter_is_refused(classifiers):
    with pytest.raises(AttributionError, match="mean eigenvalue, which is zero"):
        ask(classifiers, TRAK(), measurement=lambda module, batch: 0 * module(batch[0])[:, 0])
    constant = ask(classifiers, TRAK(damping=0.1), measurement=lambda module, batch: 0 * module(batch[0])[:, 0])
    assert bool((constant.responses == 0).all())


def test_features_that_do_not_fit_the_memory_are_refused(classifiers):
    with pytest.raises(AttributionError, match="features of 15 examples in 20 dimensions"):
        ask(classifiers, TRAK(20, memory_budget=1e-6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projection": 0}, "positive number of dimensions"),
        ({"projection": True}, "positive number of dimensions"),
        ({"damping": -1.0}, "non-negative"),
        ({"precision": "half"}, "choose"),
        ({"memory_budget": 0}, "must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(AttributionError, match=message):
        TRAK(**arguments)
