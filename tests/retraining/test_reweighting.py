"""Recorded runs over again with weights of zero, against trainings with these weights by the Trainer itself."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_dtda import Ensemble, GroundTruth, TrajectoryRecorder, retrain
from lightning_dtda.errors import ReplayError, RetrainingError
from tests.regression import WeightedRegressor, loader, weighted_data
from tests.retraining.tasks import make_trainer

SEEDS, SUBSETS = (2, 5), [[1], [3, 8, 0]]


def adam(module):
    return torch.optim.Adam(module.parameters(), 0.05)


def train(seed, weights, *callbacks):
    inputs, targets, _ = weighted_data()
    pl.seed_everything(seed, verbose=False)
    module = WeightedRegressor(adam)
    # 12 examples in batches of 5: the last batch of an epoch is smaller
    make_trainer(callbacks=list(callbacks)).fit(module, loader(inputs, targets, weights, batch_size=5))
    return module


@pytest.fixture
def ensemble(tmp_path):
    for seed in SEEDS:
        train(seed, weighted_data()[2], TrajectoryRecorder(tmp_path / "runs"))
    return Ensemble.open(tmp_path / "runs")


def reweighted(ensemble, **arguments):
    defaults = {"subsets": SUBSETS, "seeds": 2, "removal": "reweight", "measurement": "prediction"}
    data = loader(*weighted_data())
    queries = Subset(data.dataset, [4, 7])
    module = arguments.pop("module", WeightedRegressor(adam))
    data = arguments.pop("data", data)
    return retrain(module, data, queries=queries, ensemble=ensemble, progress=False, **(defaults | arguments))


@pytest.mark.parametrize("stacked", [False, True])
def test_reweighting_is_training_with_weights_of_zero_in_the_same_order(ensemble, monkeypatch, stacked):
    monkeypatch.setattr("lightning_dtda.stacking.reweighted._STACKED_SECONDS", 0 if stacked else torch.inf)
    truth = reweighted(ensemble)
    assert (truth.seeds, truth.baseline_seeds, truth.queries) == (SEEDS, SEEDS, (4, 7))
    assert truth.about["removal"] == "reweight"
    inputs = weighted_data()[0][[4, 7]]
    for s, seed in enumerate(SEEDS):
        for k, removed in enumerate(SUBSETS):
            weights = weighted_data()[2]
            weights[removed] = 0
            module = train(seed, weights)
            # double precision, seven steps: rounding, from sums in another order
            torch.testing.assert_close(truth.measurements[k, s], module(inputs).detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            truth.baseline[s], train(seed, weighted_data()[2])(inputs).detach(), rtol=1e-12, atol=1e-12
        )


def test_more_runs_extend_what_is_stored_and_other_data_are_refused(ensemble, tmp_path):
    first = reweighted(ensemble[:1], output=tmp_path / "truth", seeds=1)
    both = reweighted(ensemble, output=tmp_path / "truth")
    assert torch.equal(both.measurements[:, :1], first.measurements)
    assert GroundTruth.load(tmp_path / "truth").seeds == SEEDS
    inputs, targets, weights = weighted_data()
    with pytest.raises(ReplayError, match=r"11 others.* of the training data is not the one that .* was trained on"):
        reweighted(ensemble, data=loader(inputs, targets + 1, weights))


@pytest.mark.parametrize(
    "arguments", [{"workers": 2}, {"stacked": True}, {"stacked": False}, {"compile": True}, {"baseline_seeds": [2]}]
)
def test_without_the_arguments_that_it_refuses_reweighting_works(ensemble, arguments):
    with pytest.raises(RetrainingError, match=f"Leave out .*{next(iter(arguments))}"):
        reweighted(ensemble, **arguments)
    assert reweighted(ensemble).finished().measurements.isfinite().all()


def test_what_reweighting_cannot_do_is_refused(ensemble):
    with pytest.raises(RetrainingError, match=r"has no run with seed 7; it has the seeds \[2, 5\]"):
        reweighted(ensemble, seeds=[7])
    with pytest.raises(RetrainingError, match=r"has 2 runs\. Use 1 to 2"):
        reweighted(ensemble, seeds=3)


def test_runs_without_order_are_refused(tmp_path):
    inputs, targets, weights = weighted_data()
    for run in ("a", "b"):
        pl.seed_everything(1, verbose=False)
        recorder = TrajectoryRecorder(tmp_path, run=run)
        make_trainer(callbacks=[recorder]).fit(WeightedRegressor(adam), loader(inputs, targets, weights))
    with pytest.raises(RetrainingError, match=r"has the seed of .*, 1;"):
        reweighted(Ensemble.open(tmp_path), data=DataLoader(loader(inputs, targets, weights).dataset, 4))
