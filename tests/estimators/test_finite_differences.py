"""Responses against central finite differences of real weighted retraining, in float64."""

import pytest
import torch

from tests.finite_differences import assert_finite_differences_agree
from tests.regression import Augmented
from tests.trainings import NORMALISED_NETWORKS, OPTIMIZERS, RANDOM_NETWORKS, TRAINERS, Tied, of, sgd


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_responses_are_the_derivatives_of_retraining(fit, tmp_path, optimizer):
    assert_finite_differences_agree(fit, tmp_path, optimizer)


@pytest.mark.parametrize("arguments", TRAINERS.values(), ids=TRAINERS.keys())
def test_responses_follow_the_trainer(fit, tmp_path, arguments):
    assert_finite_differences_agree(fit, tmp_path, sgd(momentum=0.9), **arguments)


@pytest.mark.parametrize("arguments", [{}, *TRAINERS.values()], ids=["plain", *TRAINERS.keys()])
def test_responses_do_not_need_recorded_gradients(fit, tmp_path, arguments):
    assert_finite_differences_agree(fit, tmp_path, of(torch.optim.AdamW, 0.02), gradients="none", **arguments)


def test_maximize_is_followed(fit, tmp_path):
    # gradient ascent diverges on a squared error; a few small steps suffice
    def ascent(module):
        return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.5, weight_decay=0.1, maximize=True)

    assert_finite_differences_agree(fit, tmp_path, ascent, max_epochs=2)


@pytest.mark.parametrize("network", RANDOM_NETWORKS.values(), ids=RANDOM_NETWORKS.keys())
def test_dropout_is_replayed(fit, tmp_path, network):
    assert_finite_differences_agree(fit, tmp_path, of(torch.optim.AdamW, 0.01), network=network)


def test_dropout_is_replayed_over_accumulated_gradients_without_a_record_of_them(fit, tmp_path):
    assert_finite_differences_agree(
        fit,
        tmp_path,
        sgd(momentum=0.9),
        gradients="none",
        network=RANDOM_NETWORKS["dropout"],
        accumulate_grad_batches=2,
        max_epochs=3,
    )


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("network", NORMALISED_NETWORKS.values(), ids=NORMALISED_NETWORKS.keys())
def test_batch_norm_is_followed_through_its_statistics(fit, tmp_path, network, arguments):
    # not Adam: a bias in front of BatchNorm has a gradient of zero, whose rounding Adam turns into steps
    optimizer = of(torch.optim.SGD, 0.05, momentum=0.9)
    assert_finite_differences_agree(fit, tmp_path, optimizer, network=network, max_epochs=3, **arguments)


@pytest.mark.parametrize("gradients", ["float32", "none"])
def test_tied_weights_are_one_parameter(fit, tmp_path, gradients):
    assert_finite_differences_agree(fit, tmp_path, of(torch.optim.AdamW), gradients, network=Tied)


@pytest.mark.parametrize("gradients", ["float32", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_is_that_of_the_stored_batches(fit, tmp_path, workers, gradients):
    # workers start slowly, and every finite difference starts two trainings
    data = {"dataset": Augmented, "workers": workers}
    assert_finite_differences_agree(
        fit, tmp_path, sgd(momentum=0.9), gradients, batches="store", data=data, max_epochs=2, accumulate_grad_batches=2
    )
