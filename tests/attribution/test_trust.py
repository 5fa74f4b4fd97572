"""Runs whose responses explode: found by a rule, left out of influences, named in the result."""

import pytest
import torch

from lightning_dtda import Attribution
from lightning_dtda.attribution.trust import chaotic, response_norm
from lightning_dtda.errors import AttributionError
from lightning_dtda.statistics.differences import Mean

GENERATOR = torch.Generator().manual_seed(0)


def norms(*values):
    return {f"seed-{seed:04d}": value for seed, value in enumerate(values)}


def test_runs_far_above_the_others_are_chaotic():
    assert chaotic(norms(1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 30.0, 1.0, 8.0)) == ["seed-0007", "seed-0009"]


def test_runs_below_the_others_and_runs_that_only_spread_are_trusted():
    assert chaotic(norms(1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 0.001)) == []
    assert chaotic(norms(*(2.0**k for k in range(12)))) == []  # no run stands out: they all differ by as much
    assert chaotic(norms(*[1.0] * 10, 2.1)) == []  # the only one that differs, but not enough to spoil an average


@pytest.mark.parametrize("runs", [8, 20])
@pytest.mark.parametrize(
    ("healthy", "least"),
    [
        (lambda normal: normal.exp(), 0.97),
        (lambda normal: (1.5 * normal).exp(), 0.95),
        (lambda normal: normal.abs(), 0.99),
        (lambda normal: -torch.special.ndtr(normal).log(), 0.99),
    ],
    ids=["log-normal", "wider log-normal", "gaussian", "exponential"],
)
def test_heavy_tails_of_healthy_runs_stay_in_the_average(healthy, least, runs):
    kept = total = 0.0
    for sizes in healthy(torch.randn(1000, runs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
        named = norms(*sizes.tolist())
        trusted = named.keys() - chaotic(named)
        kept += sum(named[run] for run in trusted) / len(trusted)
        total += float(sizes.mean())
    # the same runs in both sums, so that the error of the simulation is below half a percent
    assert kept / total > least


def test_most_runs_with_thirtyfold_responses_are_found():
    generator, found, number = torch.Generator().manual_seed(2), 0, 0
    for _ in range(500):
        wild = torch.rand(20, generator=generator) < 0.1
        sizes = (0.3 * torch.randn(20, generator=generator)).exp() * torch.where(wild, 30, 1)
        named = norms(*sizes.tolist())
        found += len(set(chaotic(named)) & {run for run, is_wild in zip(named, wild, strict=True) if is_wild})
        number += int(wild.sum())
    assert found / number > 0.93


def test_few_runs_give_no_verdict():
    assert chaotic(norms(*[1.0] * 6, 1000.0)) == []


@pytest.fixture
def attribution():
    """Ten runs, of which one has responses a hundred times as large."""
    baseline = torch.randn(10, 3, generator=GENERATOR)
    responses = torch.randn(1, 3, 40, generator=GENERATOR) + 0.5 * torch.randn(10, 3, 40, generator=GENERATOR)
    responses[4] *= 100
    names = tuple(f"seed-{seed:04d}" for seed in range(10))
    sizes = {name: response_norm(responses[number]) for number, name in enumerate(names)}
    return Attribution(baseline, responses, names, (0, 1, 2), {"chaotic": chaotic(sizes)})


def test_influences_are_of_the_trusted_runs_unless_all_are_asked_for(attribution):
    rest = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert attribution.chaotic == ("seed-0004",)
    assert attribution.trusted().runs == tuple(f"seed-{seed:04d}" for seed in rest)
    torch.testing.assert_close(attribution.influence("mean"), attribution.responses[rest].double().mean(0))
    torch.testing.assert_close(attribution.influence("mean", runs="all"), attribution.responses.double().mean(0))
    assert (attribution.standard_error("mean") < attribution.standard_error("mean", runs="all")).all()
    predicted = attribution.predict([3])[rest].double()
    expected = predicted.var(0) - attribution.baseline[rest].double().var(0)
    torch.testing.assert_close(attribution.influence("variance", removed=[3]), expected)
    assert attribution.predict([3]).shape == (10, 3)  # samples of every run
    top = attribution.top(1, query=0)
    assert top["influence"][0] == pytest.approx(float(attribution.influence("mean")[0, top["example"][0]]))


def test_what_names_no_runs_is_refused(attribution):
    with pytest.raises(AttributionError, match="choose from trusted, all"):
        attribution.influence("mean", runs="best")


def test_a_verdict_is_kept_on_disk_and_its_runs_with_it(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    loaded = Attribution.load(tmp_path / "saved")
    assert loaded.chaotic == ("seed-0004",)
    assert len(loaded.runs) == 10
    assert loaded.about["response_norm"]["seed-0004"] == pytest.approx(response_norm(attribution.responses[4]))


@pytest.mark.parametrize("location", ["median", "trimmed"])
def test_robust_locations_bear_with_a_run_that_is_far_off(attribution, location):
    honest = attribution.influence("mean")
    robust = attribution.influence(Mean(location), runs="all")
    naive = attribution.influence("mean", runs="all")
    assert (robust - honest).abs().max() < 0.1 * (naive - honest).abs().max()


def test_locations_are_what_they_are_called():
    changes = torch.tensor([[1.0], [2.0], [3.0], [4.0], [90.0]])
    assert Mean("median")(torch.zeros(5, 1), changes).item() == 3
    assert Mean("trimmed")(torch.zeros(5, 1), changes).item() == 3  # of 2, 3 and 4
    assert Mean()(torch.zeros(5, 1), changes).item() == 20
    with pytest.raises(AttributionError, match="choose from mean, median, trimmed"):
        Mean("mode")
