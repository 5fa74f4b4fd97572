"""Influence functions, end to end: against closed forms, against each other, and what they refuse."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import (
    Attribution,
    Ensemble,
    InfluenceFunctions,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
)
from lightning_dtda.errors import AttributionError, ReplayError
from lightning_dtda.estimators import Curvature, ExactHessian, GaussNewton, Hessian, Identity
from lightning_dtda.estimators.curvatures.identity import DiagonalSpectrum
from lightning_dtda.estimators.layer_gradients import LayerGradients
from tests.estimators.ridge import Ridge, regression, solution


@pytest.fixture
def converged(fit, tmp_path):
    """Two runs of ridge regression that came to their end, the data, and queries."""
    data, queries = regression(), regression(3, seed=1)
    for seed in range(2):
        pl.seed_everything(seed, verbose=False)
        loader = DataLoader(data, batch_size=15, shuffle=True)
        fit(Ridge(), loader, TrajectoryRecorder(tmp_path / "runs"), max_steps=300, max_epochs=-1)
    return Ensemble.open(tmp_path / "runs"), data, queries


def ask(converged, estimator, **arguments):
    ensemble, data, queries = converged
    return attribute(
        ensemble,
        Ridge(),
        data,
        queries=queries,
        estimator=estimator,
        **({"measurement": "prediction", "progress": False} | arguments),
    )


def test_influences_on_ridge_regression_are_those_of_the_closed_form(converged):
    _, data, queries = converged
    ones = torch.ones(15, dtype=torch.float64)
    of_weights = torch.func.jacrev(lambda weights: solution(data, weights))(ones)
    expected = -queries.tensors[0] @ of_weights
    for curvature in (ExactHessian(damping=0), GaussNewton(damping=0), Hessian(damping=0, tolerance=1e-12)):
        found = ask(converged, InfluenceFunctions(curvature))
        for responses in found.responses:
            torch.testing.assert_close(responses, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.baseline[0], queries.tensors[0] @ solution(data, ones), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_they_are_where_unrolled_differentiation_comes_to(converged):
    unrolled = ask(converged, UnrolledDifferentiation(horizon=None))
    influence = ask(converged, InfluenceFunctions(ExactHessian(damping=0)))
    torch.testing.assert_close(influence.responses, unrolled.responses, rtol=1e-7, atol=1e-9)


def test_responses_are_of_the_step_that_is_asked_for(converged, fit, tmp_path):
    _, data, queries = converged
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(data, batch_size=15, shuffle=True)
    fit(Ridge(), loader, TrajectoryRecorder(tmp_path / "stopped"), max_steps=3, max_epochs=-1)
    stopped = ask((Ensemble.open(tmp_path / "stopped"), data, queries), InfluenceFunctions())
    found = ask(converged, InfluenceFunctions(), step=3)
    torch.testing.assert_close(found.baseline[0], stopped.baseline[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.responses[0], stopped.responses[0], rtol=1e-10, atol=1e-12)


def test_a_group_is_the_sum_of_its_examples(converged):
    alone = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)))
    groups = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)), removals=[[0, 3], [7]])
    expected = torch.stack([alone.responses[..., [0, 3]].sum(-1), alone.responses[..., 7]], -1)
    torch.testing.assert_close(groups.responses, expected, rtol=1e-12, atol=1e-14)


def test_queries_in_chunks_give_the_same(converged, monkeypatch):
    whole = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)))

    monkeypatch.setattr(
        InfluenceFunctions, "vectors", 2**29 / 32
    )  # of a budget of 1 GiB: one query of 4 doubles at a time
    chunked = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)))
    torch.testing.assert_close(chunked.responses, whole.responses, rtol=1e-12, atol=1e-14)


def test_answers_are_stored_and_not_confused_with_others(converged, tmp_path):
    output = tmp_path / "attribution"
    found = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)), output=output)
    again = ask(converged, InfluenceFunctions(GaussNewton(damping=0.1)), output=output)
    torch.testing.assert_close(again.responses, found.responses, rtol=0, atol=0)
    assert found.about["estimator"]["curvature"]["damping"] == 0.1
    with pytest.raises(AttributionError, match="another question"):
        ask(converged, InfluenceFunctions(GaussNewton(damping=0.2)), output=output)


def test_what_a_plan_learns_of_the_first_run_serves_its_answer(converged, monkeypatch):
    learned = []
    learn = LayerGradients.learn
    monkeypatch.setattr(LayerGradients, "learn", lambda self, *args: learned.append(self) or learn(self, *args))
    estimator = InfluenceFunctions(curvature=Identity())
    first, again = ask(converged, estimator), ask(converged, estimator)
    assert len(learned) == 2 * len(converged[0])  # once for each run, in either call
    torch.testing.assert_close(again.responses, first.responses, rtol=0, atol=0)
    for number in range(len(converged[0])):
        alone = ask((converged[0][number : number + 1], *converged[1:]), InfluenceFunctions(curvature=Identity()))
        torch.testing.assert_close(alone.responses[0], first.responses[number])


def test_one_fit_serves_many_dampings(converged, tmp_path, monkeypatch):
    ensemble, data, queries = converged
    fits = []
    fit_once = GaussNewton.fit
    monkeypatch.setattr(GaussNewton, "fit", lambda self, objective: fits.append(1) or fit_once(self, objective))
    found = attribute(
        ensemble, Ridge(), data, queries=queries, dampings=[0.1, "auto", 0.0], measurement="prediction", progress=False
    )
    assert len(fits) == len(ensemble)
    for damping, attribution in found.items():
        alone = ask(converged, InfluenceFunctions(GaussNewton(damping=damping)))
        torch.testing.assert_close(attribution.responses, alone.responses, rtol=1e-12, atol=1e-14)
        assert attribution.about["estimator"] == alone.about["estimator"]
    with pytest.raises(AttributionError, match="each only once"):
        attribute(ensemble, Ridge(), data, queries=queries, dampings=[0.1, 0.1])


@pytest.mark.parametrize(
    ("arguments", "message", "remedies"),
    [
        (
            {"estimator": UnrolledDifferentiation()},
            "Use InfluenceFunctions, or leave out dampings",
            [{"estimator": InfluenceFunctions()}, {"dampings": None}],
        ),
        ({"workers": 2}, "Leave out workers", [{"workers": 1}]),
        (
            {"keep_top": 1},
            "Leave out keep_top, or leave out dampings",
            [{"keep_top": None}, {"dampings": None, "estimator": InfluenceFunctions(GaussNewton(damping=0.1))}],
        ),
    ],
)
def test_without_what_dampings_refuse_they_are_answered(converged, arguments, message, remedies):
    ensemble, data, queries = converged
    asked = {"queries": queries, "dampings": [0.1], "progress": False} | arguments
    with pytest.raises(AttributionError, match=message):
        attribute(ensemble, Ridge(), data, **asked)
    for remedy in remedies:
        assert attribute(ensemble, Ridge(), data, **(asked | remedy))


def test_several_dampings_are_stored_run_by_run_and_continued(converged, tmp_path, monkeypatch):
    ensemble, data, queries = converged

    def answer(dampings, ensemble=ensemble):
        return attribute(ensemble, Ridge(), data, queries=queries, dampings=dampings, output=tmp_path, progress=False)

    part = answer([0.1, "auto"], ensemble[:1])
    whole = answer([0.1, "auto"])
    assert whole["auto"].runs == tuple(run.name for run in ensemble)
    stored = Attribution.load(tmp_path / "damping-0.1")
    assert torch.equal(stored.responses[:1][:], part[0.1].responses[:])
    monkeypatch.setattr(GaussNewton, "fit", lambda *_: pytest.fail("everything is on disk"))
    again = answer([0.1, "auto"])
    assert torch.equal(again["auto"].responses[:], whole["auto"].responses[:])


def test_other_data_are_found_out(converged):
    ensemble, data, queries = converged
    ensemble[0].manifest.configuration["dataset"]["fingerprint"] = None  # as for data that have none
    other = TensorDataset(data.tensors[0], data.tensors[1] + 1)
    with pytest.raises(ReplayError, match="gradient of step"):
        ask((ensemble, other, queries), InfluenceFunctions())


def test_a_singular_curvature_without_damping_is_the_pseudo_inverse_or_an_error(fit, tmp_path):
    class Wide(Ridge):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = regression(3)  # three examples for four parameters
    pl.seed_everything(0, verbose=False)
    fit(Wide(), DataLoader(data, 3), TrajectoryRecorder(tmp_path), max_steps=20, max_epochs=-1)
    arguments = {"queries": regression(2, 1), "measurement": "prediction", "progress": False}

    def answer(curvature):
        return attribute(
            Ensemble.open(tmp_path), Wide(), data, estimator=InfluenceFunctions(curvature), **arguments
        ).responses

    torch.testing.assert_close(answer(GaussNewton(damping=0)), answer(ExactHessian(damping=0)), rtol=1e-9, atol=1e-12)
    with pytest.raises(AttributionError, match=r"relative residual|not positive definite"):
        answer(GaussNewton("cg", damping=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "half"}, "choose"),
        ({"memory_budget": 0}, "must be positive"),
        ({"curvature": "gram"}, "is not a curvature"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(AttributionError, match=message):
        InfluenceFunctions(**arguments)


def test_a_query_that_does_not_fit_the_memory_is_refused(converged):
    with pytest.raises(AttributionError, match="memory_budget is 1e-09 GiB"):
        ask(converged, InfluenceFunctions(memory_budget=1e-9))


def test_queries_of_another_shape_are_refused(converged):
    ensemble, data, _ = converged
    wrong = TensorDataset(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AttributionError, match="The measurement fails"):
        ask((ensemble, data, wrong), InfluenceFunctions())


class Overflowing(Curvature):
    """Has an inverse that is not finite."""

    damping = 0.1

    def fit(self, objective):
        return DiagonalSpectrum(torch.full_like(objective.theta, torch.nan))


def test_responses_that_are_not_finite_are_refused(converged):
    with pytest.raises(
        AttributionError, match=r"seed-0000 are not finite: they overflowed\. If the estimator has a damping"
    ):
        ask(converged, InfluenceFunctions(Overflowing()))
