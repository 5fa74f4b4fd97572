"""Scales of predictions, and predictions that the measurement cannot take."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, attribute
from lightning_dtda.attribution.scales import predicted
from lightning_dtda.errors import AttributionError
from tests.regression import WeightedRegressor, loader, weighted_data

RUNS, QUERIES, EXAMPLES = 12, 3, 9


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attribution_of(baseline, responses, **about):
    runs = tuple(f"seed-{s:04d}" for s in range(len(baseline)))
    return Attribution(baseline, responses, runs, tuple(range(baseline.shape[1])), {"measurement": "loss"} | about)


def squared_errors(**about):
    """Squared errors of outputs that are linear in the weights, and these residuals."""
    residual, change = normal(RUNS, QUERIES), normal(RUNS, QUERIES, EXAMPLES, seed=1)
    return attribution_of(residual**2, 2 * residual[..., None] * change, range=[0.0, None], **about), residual, change


@pytest.mark.parametrize(
    ("scale", "low", "high", "measured"),
    [
        ("sqrt", 0.0, math.inf, normal(400).square()),
        ("logit", 0.0, 1.0, torch.special.ndtr(normal(400))),
    ],
)
def test_a_scale_agrees_with_the_derivative_and_stays_in_its_range(scale, low, high, measured):
    response = normal(400, seed=1)
    step = 1e-6 * measured * (1 - measured).abs()
    slope = (predicted(scale, measured, step * response) - measured) / step
    # second order: the curvature times a step of at most 1e-6
    torch.testing.assert_close(slope, response, rtol=1e-4, atol=1e-4)
    far = predicted(scale, measured, 100 * response)
    assert ((far >= low) & (far <= high)).all()
    assert torch.equal(predicted(scale, measured, torch.zeros(())).round(decimals=12), measured.round(decimals=12))
    assert predicted("linear", measured, response).equal(measured + response)


def test_at_the_edge_of_a_scale_the_prediction_is_linear_within_the_range():
    edge, response = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([-0.5, 0.5, -0.5, 0.5])
    assert predicted("sqrt", edge[:2], response[:2]).tolist() == [0.0, 0.5]
    assert predicted("logit", edge, response).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_sqrt_is_the_squared_error_of_the_linearly_predicted_output():
    attribution, residual, change = squared_errors()
    expected = (residual + change[..., 2] + change[..., 5]) ** 2
    torch.testing.assert_close(attribution.on_scale("sqrt").predict([2, 5]), expected)


def test_logit_is_the_probability_of_linearly_predicted_log_odds():
    odds, change = normal(RUNS, QUERIES), normal(RUNS, QUERIES, EXAMPLES, seed=1)
    probability = torch.sigmoid(odds)
    attribution = attribution_of(probability, (probability * (1 - probability))[..., None] * change)
    expected = torch.sigmoid(odds + change[..., 2] + change[..., 5])
    torch.testing.assert_close(attribution.on_scale("logit").predict([2, 5]), expected)


@pytest.mark.parametrize("difference", ["mean", "variance", "wasserstein"])
def test_influences_tables_and_what_is_kept_are_those_of_the_predictions(difference):
    attribution, residual, change = squared_errors()
    attribution = attribution.on_scale("sqrt")
    exact = (residual[..., None] + change) ** 2
    linear = attribution_of(residual**2, exact - (residual**2)[..., None])
    torch.testing.assert_close(attribution.influence(difference), linear.influence(difference))
    torch.testing.assert_close(attribution.standard_error(difference), linear.standard_error(difference))
    columns = ["example", "influence", "standard_error", "mean_influence", "spread_influence"]
    found, expected = (each.top(3, difference)[columns].to_numpy() for each in (attribution, linear))
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))
    if difference != "wasserstein":
        torch.testing.assert_close(attribution.keep_top(2).influence(difference), linear.influence(difference))


def test_predictions_out_of_range_are_counted():
    attribution, residual, change = squared_errors()
    below = (residual[..., None] ** 2 + 2 * residual[..., None] * change) < 0
    assert below.any()
    torch.testing.assert_close(attribution.out_of_range(), below.double().mean(0))
    together = (residual**2 + 2 * residual * (change[..., 2] + change[..., 5])) < 0
    torch.testing.assert_close(attribution.out_of_range([2, 5]), together.double().mean(0))
    assert not attribution.on_scale("sqrt").out_of_range().any()
    kept = attribution.keep_top(1).out_of_range()
    assert kept.isnan().any()
    torch.testing.assert_close(kept[~kept.isnan()], attribution.out_of_range()[~kept.isnan()])


def test_a_range_that_is_unknown_or_contradicted_is_not_claimed():
    attribution, residual, _ = squared_errors()
    unknown = attribution_of(attribution.baseline, attribution.responses)
    assert unknown.known_range == (-math.inf, math.inf)
    contradicted = attribution_of(residual, attribution.responses, range=[0.0, None])
    assert contradicted.known_range == (-math.inf, math.inf)
    assert not unknown.out_of_range().any()
    assert not contradicted.out_of_range().any()
    # a saturated probability that rounds to more than one
    certain = attribution_of(torch.ones(3, 1), torch.full((3, 1, 1), 1e-9), range=[0.0, 1.0])
    assert not certain.out_of_range().any()


@pytest.mark.parametrize("about", [{"scale": "cubic"}, {"range": [0.0]}, {"range": ["0", None]}])
def test_a_description_with_an_impossible_scale_or_range_is_refused(about):
    with pytest.raises(AttributionError, match=next(iter(about))):
        attribution_of(normal(RUNS, QUERIES), normal(RUNS, QUERIES, EXAMPLES), **about)


def test_scales_that_do_not_suit_are_refused():
    attribution, residual, _ = squared_errors()
    with pytest.raises(AttributionError, match="scale='cubic'; choose from linear, sqrt, logit"):
        attribution.on_scale("cubic")
    with pytest.raises(AttributionError, match='scale="logit" is for measurements from 0 to 1, but the loss is'):
        attribution.on_scale("logit")
    signed = attribution_of(residual, attribution.responses)
    with pytest.raises(AttributionError, match=r'of at least 0, but the loss is -.* Use scale="linear"'):
        signed.on_scale("sqrt")
    signed.on_scale("linear")
    kept = attribution.keep_top(2)
    with pytest.raises(AttributionError, match=r"kept are on the scale 'linear'. Attribute again with scale='sqrt'"):
        kept.on_scale("sqrt")
    kept.on_scale("linear")


DATA = TensorDataset(*weighted_data(dtype=torch.float32))
TESTS = TensorDataset(*weighted_data(5, seed=1, dtype=torch.float32))


def module():
    return WeightedRegressor(lambda module: torch.optim.SGD(module.parameters(), lr=0.1), dtype=torch.float32)


def absolute_error(module, batch):
    return (module(batch[0]) - batch[1]).abs()


def prediction_in_range(module, batch):
    return module(batch[0])


prediction_in_range.range = (-5, math.inf)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        trainer = pl.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            callbacks=[TrajectoryRecorder(root)],
        )
        trainer.fit(module(), loader(*DATA.tensors))
    return Ensemble.open(root)


def ask(ensemble, **arguments):
    return attribute(ensemble, module(), DATA, queries=TESTS, progress=False, **arguments)


def test_attribute_finds_the_range(ensemble):
    assert ask(ensemble, measurement=absolute_error).known_range == (0.0, math.inf)
    assert ask(ensemble, measurement=prediction_in_range).known_range == (-5.0, math.inf)
    assert ask(ensemble, measurement="prediction").known_range == (-math.inf, math.inf)


def test_a_finished_attribution_takes_another_scale_without_work(ensemble, tmp_path, monkeypatch):
    linear = ask(ensemble, measurement=absolute_error, output=tmp_path / "answer")
    assert linear.scale == "linear"

    def estimate(self, *arguments):
        raise AssertionError("attributed again")

    monkeypatch.setattr("lightning_dtda.UnrolledDifferentiation.estimate", estimate)
    root = ask(ensemble, measurement=absolute_error, output=tmp_path / "answer", scale="sqrt")
    assert root.scale == Attribution.load(tmp_path / "answer").scale == "sqrt"
    assert torch.equal(root.responses[:], linear.responses[:])
    torch.testing.assert_close(root.predict([1]), linear.on_scale("sqrt").predict([1]))


def test_a_scale_that_does_not_suit_is_refused_before_the_work(ensemble, monkeypatch):
    monkeypatch.setattr("lightning_dtda.UnrolledDifferentiation.estimate", None)
    with pytest.raises(AttributionError, match='scale="sqrt" is for measurements of at least 0, but the prediction'):
        ask(ensemble, measurement="prediction", scale="sqrt")
