"""The check finds what is wrong, and finds nothing wrong where nothing is."""

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation.checking import check, metasmoothness
from lightning_dtda.optimizers import Adam
from tests.regression import WeightedRegressor, loader, weighted_data

DATA = TensorDataset(*weighted_data(dtype=torch.float32))
QUERIES = TensorDataset(*weighted_data(4, seed=1, dtype=torch.float32))


def network():
    nn = torch.nn
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))


def make(**arguments):
    return WeightedRegressor(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01), dtype=torch.float32, **arguments)


@pytest.fixture
def recorded(fit, tmp_path):
    def _recorded(make_module, seeds=4):
        for seed in range(seeds):
            pl.seed_everything(seed, verbose=False)
            fit(make_module(), loader(*DATA.tensors), TrajectoryRecorder(tmp_path), max_epochs=4)
        return Ensemble.open(tmp_path)

    return _recorded


def by_name(found):
    return {result.name: result for result in found.results}


@pytest.mark.parametrize("make_module", [make, lambda: make(network=network)], ids=["plain", "BatchNorm and dropout"])
def test_a_sound_ensemble_passes(recorded, make_module):
    found = check(recorded(make_module), make_module(), DATA, queries=QUERIES)
    assert found.passed
    names = ["replay", "finite differences", "precision", "chaotic runs", "agreement between runs"]
    assert [result.name for result in found.results] == names
    assert by_name(found)["chaotic runs"].figure == "0 of 4"
    assert -1 <= found.metasmoothness <= 1


def test_a_wrong_adjoint_is_found(recorded, monkeypatch):
    ensemble = recorded(make)
    right = Adam.adjoint

    def wrong(self, *arguments, **keywords):
        theta, state, gradient = right(self, *arguments, **keywords)
        return theta, {key: 0.5 * part for key, part in state.items()}, gradient

    monkeypatch.setattr(Adam, "adjoint", wrong)
    found = check(ensemble, make(), DATA, queries=QUERIES)
    assert not found.passed
    assert "please report it" in by_name(found)["finite differences"].advice


def test_other_data_are_found(recorded):
    ensemble = recorded(make)
    inputs, targets, weights = DATA.tensors
    found = check(ensemble, make(), TensorDataset(inputs + 1, targets, weights), queries=QUERIES)
    assert not found.passed
    assert "of the training data is not the one that" in by_name(found)["replay"].advice


def test_a_training_that_rounding_moves_is_found(recorded):
    # the gradient of a bias in front of BatchNorm is zero but for rounding, which Adam turns into steps
    def with_bias():
        return make(network=lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), *network()[1:]))

    found = check(recorded(with_bias), with_bias(), DATA, queries=QUERIES)
    assert not found.passed
    assert "bias=False" in by_name(found)["precision"].advice


def test_three_runs_say_nothing_about_their_agreement(recorded):
    found = check(recorded(make, seeds=3), make(), DATA, queries=QUERIES)
    assert "agreement between runs" not in by_name(found)


def test_at_least_one_example_is_compared(recorded):
    with pytest.raises(AttributionError, match="at least 1"):
        check(recorded(make, seeds=1), make(), DATA, queries=QUERIES, examples=0)


class Reversed(UnrolledDifferentiation):
    """The exact derivative with the wrong sign."""

    def estimate(self, *arguments):
        found = super().estimate(*arguments)
        return replace(found, responses=-found.responses)


@pytest.mark.slow
def test_the_estimator_that_predicts_replays_best_is_chosen(recorded):
    estimators = [Reversed(horizon=None), UnrolledDifferentiation(horizon=None), UnrolledDifferentiation()]
    ranking = check(recorded(make), make(), DATA, queries=QUERIES, estimators=estimators, sets=8).ranking
    *equal, last = ranking.evaluations
    assert set(equal) == {"UnrolledDifferentiation(horizon=None)", "UnrolledDifferentiation"}
    assert last == "Reversed(horizon=None)"
    best, worst = (ranking.evaluations[name].scores["mean"] for name in (equal[0], last))
    assert best.low > 0.8
    assert worst.score == pytest.approx(-best.score)
    assert ranking.behind[last].low > 1.5

    for cheapest in equal:
        timed = replace(ranking, seconds=dict.fromkeys(equal, 2.0) | {cheapest: 1.0, last: 0.1})
        assert timed.advice.endswith(f"apart. Use {cheapest}, the cheapest of them.")
    alone = replace(ranking, evaluations={name: ranking.evaluations[name] for name in (equal[0], last)})
    assert alone.advice == f"Use {equal[0]}: it predicts the replays better than the others."
    wrong = replace(ranking, evaluations={last: ranking.evaluations[last]})
    assert wrong.advice.startswith("None of these estimators predicts the replays")


def test_two_estimators_and_two_sets_are_the_least_to_compare(recorded):
    ensemble, one = recorded(make, seeds=2), UnrolledDifferentiation()
    for estimators, sets in (([one], 20), ([one, one], 1)):
        with pytest.raises(AttributionError, match="at least two"):
            check(ensemble, make(), DATA, queries=QUERIES, estimators=estimators, sets=sets)
    assert check(ensemble, make(), DATA, queries=QUERIES, estimators=[one, one], sets=2).ranking is not None


def test_metasmoothness_is_the_weighted_agreement_of_signs():
    start = torch.zeros(3)
    middle = torch.tensor([1.0, -1.0, 2.0])
    assert metasmoothness(start, middle, 2 * middle) == 1
    assert metasmoothness(start, middle, start) == -1
    assert metasmoothness(start, middle, middle + torch.tensor([1.0, -1.0, -5.0])) == pytest.approx((1 + 1 - 2) / 4)
