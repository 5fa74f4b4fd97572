"""How few removals flip a prediction, where retraining is a sum that can be done by hand."""

import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import brittleness

# by these amounts the margins of three queries change when examples are removed; two seeds around them
CHANGES = torch.tensor([[-0.6, -0.5, -0.1, 0.0], [-0.1, -0.1, -0.1, -0.1], [0.0, 0.0, 0.0, 0.0]])
MARGINS = torch.tensor([1.0, 1.0, -0.5])


def retrain(removed):
    margins = MARGINS + CHANGES[:, list(removed)].sum(1)
    return torch.stack([margins - 0.3, margins + 0.3])


def test_the_right_order_needs_the_fewest_removals():
    found = brittleness(CHANGES, retrain, sizes=[1, 2, 3, 4])
    assert found.removals.tolist() == [2, torch.inf, 0]
    # of the two that were not flipped at first, one flips at two
    assert found.flipped.tolist() == [0, 0.5, 0.5, 0.5]
    wrong_order = brittleness(-CHANGES, retrain, sizes=[1, 2, 3, 4])
    assert wrong_order.removals[0] == 4


def test_measurements_are_kept_until_the_flip():
    found = brittleness(CHANGES, retrain, sizes=[1, 2, 4])
    torch.testing.assert_close(
        found.measurements[:, 0], torch.tensor([1.0, 0.4, -0.1, torch.nan]).double(), equal_nan=True
    )
    assert found.measurements[1:, 2].isnan().all()


def test_nothing_is_retrained_after_the_flip():
    asked = []
    brittleness(CHANGES[:1], lambda removed: asked.append(removed) or retrain(removed)[:, :1], sizes=[1, 2, 3])
    assert asked == [(), (0,), (0, 1)]


def test_a_threshold_is_what_is_fallen_below():
    assert brittleness(CHANGES, retrain, sizes=[1, 2], threshold=0.5).removals.tolist() == [1, torch.inf, 0]


@pytest.mark.parametrize("sizes", [[], [0], [2, 1], [1, 1], [5]])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(AttributionError, match="in ascending order, from 1 to 4"):
        brittleness(CHANGES, retrain, sizes)


def test_measurements_that_do_not_fit_are_refused():
    with pytest.raises(AttributionError, match="the influence has 3 queries"):
        brittleness(CHANGES, lambda removed: retrain(removed)[0], [1])
    with pytest.raises(AttributionError, match=r"without 0 examples are not finite"):
        brittleness(CHANGES, lambda removed: torch.full((2, 3), torch.nan), [1])


def test_the_mean_influence_on_a_margin_is_ranked_as_it_is():
    # each run's margin changes alike when an example is removed
    responses = CHANGES[None].expand(8, -1, -1)
    attribution = Attribution(MARGINS.expand(8, -1), responses, tuple("abcdefgh"), (0, 1, 2))
    found = brittleness(attribution.influence("mean"), retrain, sizes=[1, 2, 3, 4])
    assert found.removals.tolist() == [2, torch.inf, 0]
