"""Which examples are removed."""

import numpy as np
import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.errors import RetrainingError
from lightning_dtda.retraining import leave_one_out, random_subsets, top_removals


def test_random_subsets_have_the_size_and_spread_that_was_asked():
    subsets = random_subsets(50, 400, fraction_kept=0.9, seed=3)
    assert {len(set(subset)) for subset in subsets} == {5}
    counts = np.bincount(np.concatenate(subsets), minlength=50)
    # each example is in a subset with probability 1/10: 40 times of 400, standard deviation 6
    assert counts.min() > 40 - 4 * 6
    assert counts.max() < 40 + 4 * 6
    assert random_subsets(50, 7, fraction_kept=0.9, seed=3) == subsets[:7]
    assert random_subsets(50, 7, fraction_kept=0.9, seed=4) != subsets[:7]


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.999, -1.0, 1.5])
def test_a_fraction_that_takes_nothing_or_everything_is_refused(fraction):
    with pytest.raises(RetrainingError, match="of 50 examples removes"):
        random_subsets(50, 2, fraction_kept=fraction)


def test_each_example_on_its_own():
    assert leave_one_out(torch.tensor([3, 1])) == [(3,), (1,)]


@pytest.fixture
def attribution():
    responses = torch.tensor([[4.0, -3.0, 0.5, 1.0], [-1.0, 2.0, 5.0, -6.0]]).repeat(8, 1, 1)
    runs = tuple(f"seed-{s:04d}" for s in range(8))
    return Attribution(torch.zeros(8, 2), responses, runs, (4, 9))


def test_the_largest_removals_of_each_query(attribution):
    assert top_removals(attribution, "mean", k=2) == [(0, 1), (2, 3)]
    assert top_removals(attribution, "mean", k=1, query=1) == [(3,)]
    assert top_removals(attribution, "mean", k=1, sign="negative") == [(1,), (3,)]
    assert top_removals(attribution, "mean", k=2, sign="positive") == [(0, 3), (1, 2)]
    with pytest.raises(RetrainingError, match="Fewer than k=2 removals have negative influence on query 4"):
        top_removals(attribution, "mean", k=2, sign="negative")


def test_groups_are_removed_with_all_their_members(attribution):
    members = {"a": [0, 5], "b": [1], "c": [2, 3], "d": [4]}
    groups = [{"name": name, "examples": examples} for name, examples in members.items()]
    grouped = Attribution(
        attribution.baseline, attribution.responses, attribution.runs, attribution.queries, {"removals": groups}
    )
    assert top_removals(grouped, "mean", k=2) == [(0, 1, 5), (2, 3, 4)]


@pytest.mark.parametrize("arguments", [{"k": 0}, {"k": 5}, {"query": 2}, {"sign": "up"}])
def test_what_there_is_not_is_refused(attribution, arguments):
    with pytest.raises(RetrainingError):
        top_removals(attribution, **arguments)
