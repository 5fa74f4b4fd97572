"""Products of gradients, against the same written out."""

import pytest
import torch
from torch.func import jacrev
from torch.utils.data import TensorDataset

from lightning_dtda import InfluenceFunctions, attribute
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators import GradientCosine, GradientDot, Identity
from tests.estimators.baselines import QUERIES, Classifier, Weighted, ask, classification, written_out


def expected(ensemble, step=None):
    """By run: margins of queries, their gradients, and those of examples' losses after a step, written out."""
    for run in ensemble:
        theta = run.theta_vector(run.steps if step is None else step)
        margins, losses = written_out(run)
        yield margins(theta), jacrev(margins)(theta), jacrev(losses)(theta)


@pytest.mark.parametrize("step", [None, 5])
def test_the_dot_product_is_that_of_the_gradients_over_the_number_of_examples(classifiers, step):
    found = ask(classifiers, GradientDot(), step=step)
    for number, (baseline, of_queries, of_examples) in enumerate(expected(classifiers, step)):
        torch.testing.assert_close(found.baseline[number], baseline, rtol=1e-10, atol=1e-12)
        products = of_queries @ of_examples.T / len(of_examples)
        torch.testing.assert_close(found.responses[number], products, rtol=1e-10, atol=1e-12)


def test_it_is_the_influence_function_with_the_identity_for_a_curvature(classifiers):
    found = ask(classifiers, GradientDot())
    influence = ask(classifiers, InfluenceFunctions(Identity(damping=0)))
    torch.testing.assert_close(found.responses, influence.responses, rtol=1e-10, atol=1e-12)


def test_the_cosine_is_that_of_the_gradients(classifiers):
    found = ask(classifiers, GradientCosine())
    for number, (_, of_queries, of_examples) in enumerate(expected(classifiers)):
        cosines = torch.nn.functional.cosine_similarity(of_queries[:, None], of_examples[None], dim=2)
        torch.testing.assert_close(found.responses[number], cosines, rtol=1e-10, atol=1e-12)


def test_a_coefficient_in_the_loss_of_the_batch_leaves_the_cosine_as_it_is(weighted_classifiers):
    found = ask(weighted_classifiers, GradientCosine(), Weighted())
    for number, (_, of_queries, of_examples) in enumerate(expected(weighted_classifiers)):
        cosines = torch.nn.functional.cosine_similarity(of_queries[:, None], of_examples[None], dim=2)
        torch.testing.assert_close(found.responses[number], cosines, rtol=1e-10, atol=1e-12)


def test_the_cosine_with_a_gradient_of_zero_is_zero(classifiers):
    def constant(module, batch):
        return 0 * module(batch[0])[:, 0]

    found = ask(classifiers, GradientCosine(), measurement=constant)
    assert bool((found.responses == 0).all())


def test_a_query_that_is_a_training_example_has_a_cosine_of_one_with_itself(classifiers):
    found = ask(classifiers, GradientCosine(), queries=classification(), measurement="loss")
    for responses in found.responses:
        torch.testing.assert_close(responses.diagonal(), torch.ones(len(responses)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [GradientDot, GradientCosine])
def test_groups_and_chunks_add_up(classifiers, monkeypatch, estimator):

    alone = ask(classifiers, estimator())
    size = classifiers[0].layout.size
    monkeypatch.setattr(estimator, "vectors", 2**29 / 8 / size)  # of 1 GiB: one query at a time
    groups = ask(classifiers, estimator(), removals=[[0, 3], [7]])
    expected = torch.stack([alone.responses[..., [0, 3]].sum(-1), alone.responses[..., 7]], -1)
    torch.testing.assert_close(groups.responses, expected, rtol=1e-12, atol=1e-14)


def test_other_data_are_found_out(classifiers):
    for run in classifiers:
        run.manifest.configuration["dataset"]["fingerprint"] = None  # as for data that have none
    inputs, labels = classification().tensors
    with pytest.raises(ReplayError, match="gradient of step"):
        attribute(
            classifiers,
            Classifier(),
            TensorDataset(inputs + 1, labels),
            queries=classification(QUERIES, seed=1),
            estimator=GradientDot(),
            progress=False,
        )


@pytest.mark.parametrize("estimator", [GradientDot, GradientCosine])
def test_arguments_out_of_range_are_refused(estimator):
    with pytest.raises(AttributionError, match="choose"):
        estimator(precision="half")
    with pytest.raises(AttributionError, match="must be positive"):
        estimator(memory_budget=0)
