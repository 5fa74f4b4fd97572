"""How few removals flip a prediction, where retraining is a sum that can be done by hand."""

import pytest
import torch

from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import brittleness

# margins of three queries fall by these amounts when examples are removed; two seeds around them
FALLS = torch.tensor([[0.6, 0.5, 0.1, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
MARGINS = torch.tensor([1.0, 1.0, -0.5])


def retrain(removed):
    margins = MARGINS - FALLS[:, list(removed)].sum(1)
    return torch.stack([margins - 0.3, margins + 0.3])


def test_the_right_order_needs_the_fewest_removals():
    found = brittleness(FALLS, retrain, sizes=[1, 2, 3, 4])
    assert found.removals.tolist() == [2, torch.inf, 0]
    # of the two that were not flipped at first, one flips at two
    assert found.flipped.tolist() == [0, 0.5, 0.5, 0.5]
    wrong_order = brittleness(-FALLS, retrain, sizes=[1, 2, 3, 4])
    assert wrong_order.removals[0] == 4


def test_measurements_are_kept_until_the_flip():
    found = brittleness(FALLS, retrain, sizes=[1, 2, 4])
    torch.testing.assert_close(found.measured[:, 0], torch.tensor([1.0, 0.4, -0.1, torch.nan]).double(), equal_nan=True)
    assert found.measured[1:, 2].isnan().all()


def test_nothing_is_retrained_after_the_flip():
    asked = []
    brittleness(FALLS[:1], lambda removed: asked.append(removed) or retrain(removed)[:, :1], sizes=[1, 2, 3])
    assert asked == [(), (0,), (0, 1)]


def test_a_threshold_is_what_is_fallen_below():
    assert brittleness(FALLS, retrain, sizes=[1, 2], threshold=0.5).removals.tolist() == [1, torch.inf, 0]


@pytest.mark.parametrize("sizes", [[], [0], [2, 1], [1, 1], [5]])
def test_sizes_that_cannot_be_are_refused(sizes):
    with pytest.raises(AttributionError, match="ascending numbers of removals from 1 to 4"):
        brittleness(FALLS, retrain, sizes)


def test_measurements_that_do_not_fit_are_refused():
    with pytest.raises(AttributionError, match="the influence has 3 queries"):
        brittleness(FALLS, lambda removed: retrain(removed)[0], [1])
    with pytest.raises(AttributionError, match=r"without 0 examples .* not finite"):
        brittleness(FALLS, lambda removed: torch.full((2, 3), torch.nan), [1])
