"""Groups of examples: how they are given, what their responses are, what is refused; and any step of a training.

The retrained runs know nothing of lightning_dtda: a Trainer minimises the weighted loss with the same seed and the
weights of a group moved together by plus and minus ``STEP``.
"""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_dtda import Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators import Removals, resolve_removals
from lightning_dtda.replay import Examples
from tests.regression import WeightedRegressor, loader, weighted_data

STEP = 1e-4
"""Balances the truncation error, of order STEP squared, against rounding, of order 1e-16 / STEP."""

TOLERANCE = 1e-5
"""Relative to the largest response: the truncation error of a group is that of all its weights together."""

INPUTS, TARGETS, WEIGHTS = weighted_data()
DATA = TensorDataset(INPUTS, TARGETS, WEIGHTS)
QUERIES = TensorDataset(*weighted_data(4, seed=1))
GROUPS = {"overlapping": [0, 3, 7], "one": [5], "others": [7, 1, 2, 11]}
EXAMPLES = Examples(TensorDataset(torch.zeros(4, 2), torch.tensor([7, 5, 7, 5])))


class Items(Dataset):
    """Items as they are given."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def normalised():
    nn = torch.nn
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(), nn.Linear(5, 1))


def train(fit, weights, *callbacks, optimizer=adamw, network=None, **arguments):
    pl.seed_everything(3, verbose=False)
    module = WeightedRegressor(optimizer, network=network)
    fit(module, loader(INPUTS, TARGETS, weights), *callbacks, **({"max_steps": 11} | arguments))
    return module


def recorded(fit, root, *, gradients="float32", checkpoint_every=4, **arguments):
    recorder = TrajectoryRecorder(root, gradients=gradients, checkpoint_every=checkpoint_every)
    train(fit, WEIGHTS, recorder, **arguments)
    return Ensemble.open(root)


def ask(ensemble, *, optimizer=adamw, network=None, **arguments):
    module = WeightedRegressor(optimizer, network=network)
    arguments = {"estimator": UnrolledDifferentiation(horizon=None)} | arguments
    return attribute(ensemble, module, DATA, queries=QUERIES, progress=False, **arguments)


def finite_differences(fit, group, **arguments):
    """Minus the change of the queries' losses per change of the group's weights ``(queries,)``."""
    moved = []
    for sign in (1, -1):
        weights = WEIGHTS.clone()
        weights[group] += sign * STEP
        module = train(fit, weights, **arguments).eval()
        with torch.no_grad():
            moved.append((module(QUERIES.tensors[0]) - QUERIES.tensors[1]) ** 2)
    return -(moved[0] - moved[1]) / (2 * STEP)


def assert_close_to_differences(responses, fit, groups, **arguments):
    expected = torch.stack([finite_differences(fit, group, **arguments) for group in groups], 1)
    error = (responses - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


def test_the_response_of_a_group_is_the_sum_of_its_members(fit, tmp_path):
    ensemble = recorded(fit, tmp_path)
    single = ask(ensemble).responses
    grouped = ask(ensemble, removals=GROUPS)
    assert grouped.removals == tuple(GROUPS)
    expected = torch.stack([single[..., group].sum(-1) for group in GROUPS.values()], -1)
    torch.testing.assert_close(grouped.responses, expected, rtol=1e-12, atol=1e-14)


def test_chunks_of_queries_change_nothing_but_rounding(fit, tmp_path, take_100_mib):
    ensemble = recorded(fit, tmp_path)
    whole = ask(ensemble, removals=GROUPS).responses
    take_100_mib("reverse_costs")
    chunked = ask(
        ensemble, removals=GROUPS, estimator=UnrolledDifferentiation(horizon=None, memory_budget=0.25)
    ).responses
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optimizer", [adamw, sgd], ids=["AdamW", "SGD with momentum"])
def test_the_response_of_a_group_is_the_derivative_of_retraining_with_its_weights_together(fit, tmp_path, optimizer):
    ensemble = recorded(fit, tmp_path, optimizer=optimizer)
    responses = ask(ensemble, optimizer=optimizer, removals=GROUPS).responses[0]
    assert_close_to_differences(responses, fit, GROUPS.values(), optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["float32", "none"])
@pytest.mark.parametrize("step", [1, 4, 6, 8, 10, 11])  # checkpoints at 0, 4, 8 and 11
def test_a_step_is_attributed_like_a_run_that_was_trained_only_so_far(fit, tmp_path, step, gradients):
    long = ask(recorded(fit, tmp_path / "long", gradients=gradients), step=step)
    short = ask(recorded(fit, tmp_path / "short", gradients=gradients, max_steps=step))
    torch.testing.assert_close(long.baseline, short.baseline, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(long.responses, short.responses, rtol=1e-8, atol=1e-10)


def test_a_step_between_checkpoints_is_the_derivative_of_retraining_so_far(fit, tmp_path):
    responses = ask(recorded(fit, tmp_path), removals=GROUPS, step=6).responses[0]
    assert_close_to_differences(responses, fit, GROUPS.values(), max_steps=6)


def test_running_statistics_are_those_of_the_step(fit, tmp_path):
    # not AdamW: a bias in front of BatchNorm has a gradient of zero, whose rounding Adam turns into steps
    arguments = {"optimizer": sgd, "network": normalised}
    attribution = ask(recorded(fit, tmp_path, **arguments), removals=GROUPS, step=6, **arguments)
    trained = train(fit, WEIGHTS, max_steps=6, **arguments).eval()
    with torch.no_grad():
        expected = (trained(QUERIES.tensors[0]) - QUERIES.tensors[1]) ** 2
    torch.testing.assert_close(attribution.baseline[0], expected, rtol=1e-10, atol=1e-12)
    assert_close_to_differences(attribution.responses[0], fit, GROUPS.values(), max_steps=6, **arguments)


def test_a_horizon_goes_back_from_the_step(fit, tmp_path):
    ensemble = recorded(fit, tmp_path)
    few, all_of_them = (ask(ensemble, step=6, estimator=UnrolledDifferentiation(horizon=horizon)) for horizon in (2, 6))
    torch.testing.assert_close(all_of_them.responses, ask(ensemble, step=6).responses, rtol=1e-12, atol=1e-14)
    assert list(few.about["adjoint_norms"]["seed-0003"]) == ["6", "4"]
    seen = ensemble[0].batch_indices(4).tolist() + ensemble[0].batch_indices(5).tolist()
    unseen = [n for n in range(12) if n not in seen]
    assert unseen
    assert not few.responses[..., unseen].any()
    assert all_of_them.responses[..., unseen].any()


def test_a_replay_that_ends_between_checkpoints_is_still_compared_with_the_record(fit, tmp_path, monkeypatch):
    ensemble = recorded(fit, tmp_path, gradients="none")
    monkeypatch.setattr("lightning_dtda.replay.examples.refuse_changed_data", lambda *arguments: None)
    changed = TensorDataset(INPUTS + 0.1, TARGETS, WEIGHTS)
    with pytest.raises(ReplayError, match="between step 0 and step 4"):
        attribute(ensemble, WeightedRegressor(adamw), changed, queries=QUERIES, step=2, progress=False)


@pytest.mark.parametrize(
    ("given", "groups", "names"),
    [
        ([[0, 1, 2], [3]], ((0, 1, 2), (3,)), ("0", "1")),
        ([(0,), {2}, range(2), np.array([1, 3]), torch.tensor([3])], ((0,), (2,), (0, 1), (1, 3), (3,)), None),
        ({"cats": [0, 3], "dogs": [2]}, ((0, 3), (2,)), ("cats", "dogs")),
        ([7, 5, 7, 10], ((1,), (0, 2), (3,)), ("5", "7", "10")),
        (torch.tensor([1, 1, 0, 0]), ((2, 3), (0, 1)), ("0", "1")),
        ([torch.tensor(1), np.int64(1), 0, 0], ((2, 3), (0, 1)), ("0", "1")),
        (np.array(["web", "book", "web", "web"]), ((1,), (0, 2, 3)), ("book", "web")),
        ("column:1", ((1, 3), (0, 2)), ("5", "7")),
    ],
    ids=["lists", "all kinds of sets", "mapping", "list of labels", "tensor", "scalars", "array of strings", "column"],
)
def test_groups_are_given_in_many_ways(given, groups, names):
    removals = resolve_removals(given, EXAMPLES)
    assert removals.groups == groups
    assert removals.names == (names or ("0", "1", "2", "3", "4"))
    assert len(removals) == len(groups)
    assert resolve_removals(removals, EXAMPLES) is removals


def test_as_many_groups_as_examples_are_not_taken_for_labels():
    assert resolve_removals([[0], [0, 1], [2], [3]], EXAMPLES).groups == ((0,), (0, 1), (2,), (3,))
    assert resolve_removals([0, 1, 2, 3], EXAMPLES).groups == ((0,), (1,), (2,), (3,))


def test_a_column_is_a_key_of_a_dictionary():
    items = [{"x": torch.zeros(2), "source": source} for source in ("web", "book", "web")]
    removals = resolve_removals("column:source", Examples(Items(items)))
    assert (removals.groups, removals.names) == (((1,), (0, 2)), ("book", "web"))


def test_totals_are_products_with_the_membership():
    removals = Removals(5, ((0, 4), (4, 1, 2), (3,)), ("a", "b", "c"))
    responses = torch.randn(2, 3, 5, dtype=torch.float64)
    membership = removals.membership(torch.float64)
    assert membership.tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]
    torch.testing.assert_close(removals.total(responses), responses @ membership.T)


def test_leave_one_out_copies_nothing():
    removals = resolve_removals("leave-one-out", EXAMPLES)
    responses = torch.randn(2, 4)
    assert removals.is_leave_one_out
    assert len(removals) == 4
    assert removals.total(responses) is responses
    assert torch.equal(removals.membership(), torch.eye(4))


REFUSED = {
    "index out of range": ([[0, 4]], "Group '0' of removals has the index 4; valid indices are 0 to 3"),
    "negative index": ({"a": [-1]}, "Group 'a' of removals has the index -1"),
    "twice in a group": ([[0], [2, 1, 2]], "Group '1' of removals contains example 2 twice"),
    "empty group": ({"a": [0], "b": []}, "Group 'b' of removals is empty"),
    "no group": ([], "0 labels for 4"),
    "no group in a mapping": ({}, "has no group"),
    "one name for two": ({1: [0], "1": [1]}, "2 groups of removals are called '1'"),
    "a name that is no text": ({"ok": [0], "a\ud800": [1]}, "half of a surrogate pair, which is no text. Rename it"),
    "a label that is no text": (["a", "a", "\ud800", "a"], "half of a surrogate pair"),
    "too few labels": ([3, 1], r"2 labels for 4 training examples.*\[\[3, 17\]\]"),
    "float labels": ([0.0, 1.0, 0.0, 1.0], "label of example 0 is 0.0, a float"),
    "a mask": (torch.tensor([True, False, True, True]), "label of example 0 is True, a bool"),
    "labels of two kinds": ([0, "a", 1, 2], "some labels are integers and others are strings"),
    "groups and labels": ([[0, 1], 2], r"mixes groups with 2.*a group of one is \[2\]"),
    "float indices": ([[0.5]], "is not a list of indices"),
    "a mask for a group": ({"a": np.array([True, False, True, True])}, "group 'a': this is a mask"),
    "a matrix of labels": (torch.zeros(4, 1, dtype=torch.int64), r"has shape \(4, 1\)"),
    "an unknown word": ("loo", 'Give "leave-one-out"'),
    "a number": (3, "removals=3"),
    "a position that there is not": ("column:2", "no position '2'. Choose from 0 to 1"),
    "a column of floats": ("column:0", "removals='column:0': the label of example 0 is tensor"),
    "removals of other data": (Removals(5), "removals are for 5 examples, but there are 4 training"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_removals_that_cannot_be_are_refused_in_words(given, message):
    with pytest.raises(AttributionError, match=message):
        resolve_removals(given, EXAMPLES)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"x": 0.0, "label": 1}], "the items have no key 'source'. Choose from x, label"),
        ([torch.zeros(2)], "the items are Tensor, neither tuples nor dictionaries"),
    ],
)
def test_a_column_that_there_is_not_is_refused(items, message):
    with pytest.raises(AttributionError, match=f"'column:source': {message}"):
        resolve_removals("column:source", Examples(Items(items)))


def test_names_and_groups_go_together():
    with pytest.raises(AttributionError, match="2 groups and 1 names"):
        Removals(4, ((0,), (1,)), ("a",))
