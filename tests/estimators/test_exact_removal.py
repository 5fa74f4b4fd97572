"""Exact removal, against trainings with weights of zero by the Trainer itself and against other estimators."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import Subset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute, retrain
from lightning_dtda.errors import AttributionError
from lightning_dtda.estimators import ExactRemoval
from lightning_dtda.evaluation import evaluate
from tests.regression import WeightedRegressor, loader, weighted_data
from tests.retraining.tasks import STEPS, TRAINER

SEEDS, GROUPS = (2, 5, 6), [[1], [3, 8, 0], [2]]
QUERIES = [4, 7]


def adam(module):
    return torch.optim.Adam(module.parameters(), 0.05)


def train(seed, weights, *callbacks, steps=None):
    inputs, targets, _ = weighted_data()
    pl.seed_everything(seed, verbose=False)
    module = WeightedRegressor(adam)

    trainer = pl.Trainer(max_steps=steps or STEPS, callbacks=list(callbacks), **TRAINER)
    trainer.fit(module, loader(inputs, targets, weights, batch_size=5))
    return module


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in SEEDS:
        train(seed, weighted_data()[2], TrajectoryRecorder(root))
    return Ensemble.open(root)


def ask(ensemble, estimator=None, removals=GROUPS, **arguments):
    data = loader(*weighted_data())
    return attribute(
        ensemble,
        WeightedRegressor(adam),
        data,
        queries=Subset(data.dataset, QUERIES),
        estimator=estimator or ExactRemoval(),
        removals=removals,
        progress=False,
        **({"measurement": "prediction"} | arguments),
    )


def by_the_trainer(removed, seed, steps=None):
    weights = weighted_data()[2]
    weights[removed] = 0
    return train(seed, weights, steps=steps)(weighted_data()[0][QUERIES]).detach()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("step", [None, 4])
def test_predictions_are_those_of_training_with_weights_of_zero(ensemble, monkeypatch, stacked, step):
    monkeypatch.setattr("lightning_dtda.stacking.reweighted._STACKED_SECONDS", 0 if stacked else torch.inf)
    attribution = ask(ensemble, step=step)
    for s, seed in enumerate(SEEDS):
        torch.testing.assert_close(attribution.baseline[s], by_the_trainer([], seed, step), rtol=1e-12, atol=1e-12)
        for k, removed in enumerate(GROUPS):
            expected = by_the_trainer(removed, seed, step)
            # double precision, seven steps: rounding, from sums in another order
            torch.testing.assert_close(attribution.predict([k])[s], expected, rtol=1e-10, atol=1e-12)


def test_a_few_trainings_at_a_time_give_what_all_at_once_give(ensemble, monkeypatch):
    expected = ask(ensemble)
    # two at a time, so that the removals of a run take two stacks
    monkeypatch.setattr("lightning_dtda.stacking.size.LARGEST", 2)
    found = ask(ensemble, workers=1)
    torch.testing.assert_close(found.responses, expected.responses, rtol=1e-10, atol=1e-12)
    assert found.about["drift"].keys() == {f"seed-{seed:04d}" for seed in SEEDS}


def test_single_examples_are_removed_one_at_a_time(ensemble):
    single = ask(ensemble, removals="leave-one-out")
    assert single.responses.shape == (len(SEEDS), len(QUERIES), 12)
    torch.testing.assert_close(single.responses[..., [1, 2]], ask(ensemble).responses[..., [0, 2]])


def test_the_derivative_is_the_first_order_of_it(ensemble):
    derivative, exact = ask(ensemble, UnrolledDifferentiation(horizon=None)), ask(ensemble)
    # not small removals of twelve examples: the same direction, not the same size
    for k in range(len(GROUPS)):
        pair = torch.stack([each.responses[..., k].flatten() for each in (derivative, exact)])
        assert torch.corrcoef(pair)[0, 1] > 0.8
    assert not torch.allclose(derivative.responses, exact.responses, rtol=0.01)


def test_it_predicts_reweighted_retraining_without_error(ensemble):
    data = loader(*weighted_data())
    truth = retrain(
        WeightedRegressor(adam),
        data,
        subsets=GROUPS,
        seeds=len(SEEDS),
        queries=Subset(data.dataset, QUERIES),
        measurement="prediction",
        removal="reweight",
        ensemble=ensemble,
        progress=False,
    )
    with pytest.warns(UserWarning, match="recorded and retrained"):
        evaluation = evaluate(ask(ensemble), truth, ["mean", "variance", "wasserstein"], replicates=0)
    assert [score.score for score in evaluation.scores.values()] == [pytest.approx(1.0)] * 3


def test_a_training_that_diverges_without_an_example_is_named(ensemble, monkeypatch):
    from lightning_dtda.replay import Replay

    original = Replay.retrain

    def diverging(self, weights, *arguments, **keywords):
        theta, buffers = original(self, weights, *arguments, **keywords)
        return (theta if bool((weights == 1).all()) else theta * torch.nan), buffers

    monkeypatch.setattr(Replay, "retrain", diverging)
    with pytest.raises(AttributionError, match=r"seed-0002 has measurements that are not finite.* diverged"):
        ask(ensemble)


def test_an_unknown_precision_is_refused():
    with pytest.raises(AttributionError, match='choose "recorded" or "float64"'):
        ExactRemoval("float16")
