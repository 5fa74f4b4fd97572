"""The joint distribution over queries: against POT, and what single measurements do not show."""

import numpy as np
import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Mean, SlicedWasserstein, Wasserstein
from lightning_dtda.statistics.resampling import jackknife

RUNS, QUERIES, EXAMPLES = 9, 4, 5


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(RUNS, QUERIES, generator=generator, dtype=torch.float64)
    responses = 0.3 * torch.randn(RUNS, QUERIES, EXAMPLES, generator=generator, dtype=torch.float64)
    return Attribution(baseline, responses, tuple(f"seed-{s:04d}" for s in range(RUNS)), (4, 8, 15, 16))


def test_joint_influence_is_pots_sliced_distance_in_the_same_directions(attribution):
    ot = pytest.importorskip("ot")
    directions = SlicedWasserstein().directions(QUERIES).T.numpy()
    found = attribution.joint_influence()
    for n in range(EXAMPLES):
        after = attribution.predict(removed=[n]).numpy()
        expected = ot.sliced_wasserstein_distance(attribution.baseline.numpy(), after, projections=directions)
        assert found[n].item() == pytest.approx(expected, rel=1e-10)


def test_of_one_query_it_is_the_wasserstein_influence(attribution):
    torch.testing.assert_close(
        attribution.joint_influence(queries=[2]), attribution.influence("wasserstein")[2], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        attribution.joint_standard_error(queries=[2]), attribution.standard_error("wasserstein")[2], rtol=1e-9, atol=0
    )


def test_it_converges_to_the_mean_over_all_directions():
    # a shift by v: W_2 along u is |<u, v>|, whose mean square over the circle is |v|^2 / 2
    x = torch.randn(20, 2, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = x + torch.tensor([3.0, 4.0], dtype=torch.float64)[:, None]
    found = SlicedWasserstein(4000)(x, shifted)
    # 1 / sqrt(2 * 4000) is 1.1 %: three times that
    assert found.item() == pytest.approx(5 / np.sqrt(2), rel=0.034)


def test_measurements_that_get_tied_together_are_seen_jointly_alone():
    generator = torch.Generator().manual_seed(0)
    baseline = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    tied = baseline[:, [0]].expand(-1, 2)
    tied = torch.stack([tied[:, 0], baseline[:, 1].sort().values[tied[:, 1].argsort().argsort()]], 1)
    runs = tuple(f"seed-{s:04d}" for s in range(400))
    attribution = Attribution(baseline, (tied - baseline)[..., None], runs, (0, 1))
    torch.testing.assert_close(attribution.influence("wasserstein"), torch.zeros(2, 1, dtype=torch.float64))
    assert attribution.joint_influence().item() > 0.25


def test_a_set_is_removed_together_and_a_part_of_the_queries_taken(attribution):
    found = attribution.joint_influence(queries=[0, 3], removed=[1, 2])
    after = attribution.predict(removed=[1, 2])[:, [0, 3]]
    expected = SlicedWasserstein()(attribution.baseline[:, [0, 3], None], after[..., None]).squeeze()
    torch.testing.assert_close(found, expected)
    error = attribution.joint_standard_error(queries=[0, 3], removed=[1, 2])
    samples = attribution.baseline[:, [0, 3], None], after[..., None]
    torch.testing.assert_close(error, jackknife(SlicedWasserstein(), *samples).squeeze())


def test_parts_of_the_removals_give_what_all_give_at_once(attribution, monkeypatch):
    whole = attribution.joint_influence(), attribution.influence(Wasserstein())
    # one removal at a time, whose sums are made in another order
    monkeypatch.setattr("lightning_dtda.attribution.responses.AT_ONCE", 1)
    torch.testing.assert_close(whole[0], attribution.joint_influence(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole[1], attribution.influence(Wasserstein()), rtol=1e-12, atol=0)


def test_a_single_run_has_no_joint_standard_error(attribution):
    alone = Attribution(attribution.baseline[:1], attribution.responses[:1], ("seed-0000",), attribution.queries)
    assert alone.joint_standard_error().isnan().all()
    assert alone.joint_standard_error().shape == (EXAMPLES,)


@pytest.mark.parametrize("queries", [[], [0, 0], [4], [-1]])
def test_queries_that_are_not_there_are_refused(attribution, queries):
    with pytest.raises(AttributionError, match="quer"):
        attribution.joint_influence(queries=queries)


def test_a_difference_of_one_measurement_is_refused_and_influence_takes_it(attribution):
    with pytest.raises(AttributionError, match=r"mean compares a single measurement\. Call Attribution\.influence"):
        attribution.joint_influence(Mean())
    assert attribution.influence(Mean()).shape == (QUERIES, EXAMPLES)
    with pytest.raises(AttributionError, match=r"Call Attribution\.joint_influence"):
        attribution.influence(SlicedWasserstein())
    assert attribution.joint_influence(SlicedWasserstein()).shape == (EXAMPLES,)
