from html import escape

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from lightning_dtda.attribution.attribution import Attribution
from lightning_dtda.reporting.figures import (
    adjoint_figure,
    baseline_figure,
    influence_figure,
    removal_figure,
    top_figure,
)
from tests.reporting.attributions import EXAMPLES, GROUPS, make_attribution


def test_every_example_is_a_point_at_its_mean_and_spread_influence(attribution):
    traces = [trace for trace in influence_figure(attribution, 1).data if trace.mode == "markers"]
    points = {int(row[0]): (x, y, *row[1:]) for t in traces for x, y, row in zip(t.x, t.y, t.customdata, strict=True)}
    assert sorted(points) == list(range(EXAMPLES))
    shift, change = attribution.influence("mean")[1], 100 * attribution.influence("spread")[1].expm1()
    # half a unit of the last of six digits
    drawn = np.array([points[n][:2] for n in range(EXAMPLES)])
    np.testing.assert_allclose(drawn, torch.stack([shift, change], 1), rtol=5e-6, atol=1e-12)
    for place, ends in enumerate((attribution.interval("mean"), 100 * attribution.interval("spread").expm1())):
        assert [points[n][2 + place] for n in range(EXAMPLES)] == [
            f" [{low:.3g}, {high:.3g}]" for low, high in ends[:, 1].T.tolist()
        ]


def test_labelled_examples_have_their_intervals_as_error_bars(attribution):
    [labels] = [trace for trace in influence_figure(attribution, 1).data if trace.mode == "markers+text"]
    at = [int(text) for text in labels.text]
    expected = attribution.interval("mean")[:, 1, at], 100 * attribution.interval("spread")[:, 1, at].expm1()
    for values, bars, ends in zip((labels.x, labels.y), (labels.error_x, labels.error_y), expected, strict=True):
        drawn = np.array(values) - bars.arrayminus, np.array(values) + bars.array
        np.testing.assert_allclose(drawn, ends, rtol=1e-6)
    assert influence_figure(attribution, 1).layout.xaxis.title.text.endswith("; lines: 95 % intervals")


def test_groups_tell_what_is_clear_of_seed_noise(attribution):
    groups = {
        trace.name: {row[0] for row in trace.customdata}
        for trace in influence_figure(attribution, 1).data
        if trace.name
    }
    assert 11 in groups["mean"] | groups["both"]
    assert 23 in groups["spread"] | groups["both"]
    assert 5 in groups["neither"], "an example without any influence is not clear of anything"
    mean, spread = (set(attribution.significant(name)[1].nonzero()[:, 0].tolist()) for name in ("mean", "spread"))
    assert groups == {
        "mean": mean - spread,
        "spread": spread - mean,
        "both": mean & spread,
        "neither": set(range(EXAMPLES)) - mean - spread,
    }


def test_axes_say_sign_and_unit_in_words(attribution):
    layout = influence_figure(attribution, 0).layout
    assert (
        layout.xaxis.title.text
        == "change of the mean loss<br>if removed (E Y \N{MINUS SIGN} E X); lines: 95 % intervals"
    )
    expected = "change of the loss's standard deviation<br>if removed (SD Y / SD X \N{MINUS SIGN} 1, in %)"
    assert layout.yaxis.title.text == expected


@pytest.mark.filterwarnings("ignore:Influences of")
def test_a_single_run_has_a_mean_influence_and_no_spread():
    figure = influence_figure(make_attribution(runs=1), 0)
    assert "a single run has no spread" in figure.layout.yaxis.title.text
    [points] = [trace for trace in figure.data if trace.name == "neither"]
    np.testing.assert_array_equal(points.y, np.arange(EXAMPLES))


def test_many_examples_are_thinned_but_the_notable_ones_stay():
    examples = 12_000
    responses = 1e-3 * torch.randn(9, 1, examples, generator=torch.Generator().manual_seed(0))
    responses[..., 7777] += 1.0
    many = Attribution(torch.zeros(9, 1), responses, tuple("abcdefghi"), (0,))
    figure = influence_figure(many, 0, most_points=6_000)
    drawn = [row[0] for trace in figure.data if trace.mode == "markers" for row in trace.customdata]
    assert len(drawn) == len(set(drawn)) == 6_000
    assert 7777 in drawn
    assert "6000 of 12000 examples" in figure.layout.title.text
    assert isinstance(figure.data[0], go.Scattergl), "a browser cannot move so many SVG markers"


def test_each_run_is_joined_to_its_own_prediction(attribution):
    figure = removal_figure(attribution, 2, [11, 23])
    pairs = {}
    for trace in figure.data[:2]:
        for start in range(0, len(trace.y), 3):
            pairs[trace.text[start]] = tuple(trace.y[start : start + 2])
    trained, predicted = attribution.baseline[:, 2], attribution.predict([11, 23])[:, 2]
    for number, run in enumerate(attribution.runs):
        assert pairs[run] == pytest.approx((float(trained[number]), float(predicted[number])))
    summary = figure.data[2]
    np.testing.assert_allclose(summary.y, [trained.double().mean(), predicted.double().mean()])
    np.testing.assert_allclose(summary.customdata, [trained.double().std(), predicted.double().std()])


@pytest.mark.parametrize("difference", ["mean", "spread", "wasserstein"])
def test_bars_are_the_top_examples_with_their_intervals(attribution, difference):
    bars, intervals = top_figure(attribution, 1, difference, k=6).data
    top = attribution.top(6, difference, query=1)
    assert list(bars.y) == [str(example) for example in top.example]
    expected, influence = attribution.interval(difference)[:, 1, top.example.tolist()], top.influence
    if difference == "spread":
        expected, influence = 100 * expected.expm1(), 100 * np.expm1(influence)
    np.testing.assert_allclose(bars.x, influence)
    np.testing.assert_allclose([intervals.x[0::3], intervals.x[1::3]], expected)
    assert list(intervals.y[0::3]) == list(bars.y)
    significant = attribution.significant(difference)[1, top.example.tolist()]
    assert [color == bars.marker.color[0] for color in bars.marker.color] == significant.tolist()


def test_without_an_interval_only_bars_are_drawn(attribution):
    bars, intervals = top_figure(attribution, 1, "variance", k=6).data
    assert np.isnan([end for end in intervals.x if end is not None]).all()
    assert "interval" not in top_figure(attribution, 1, "variance").layout.xaxis.title.text
    assert [row[0] for row in bars.customdata] == 6 * [""]


def test_baselines_start_with_the_query_that_depends_most_on_the_seed(attribution):
    boxes = baseline_figure(attribution).data
    spread = attribution.baseline.std(0)
    assert [box.meta for box in boxes] == spread.argsort(descending=True).tolist()
    for box in boxes:
        np.testing.assert_allclose(box.y, attribution.baseline[:, box.meta])


def test_a_measurement_name_is_text_and_not_markup():
    figure = influence_figure(make_attribution(measurement="<a href='x'>m</a>"), 0)
    assert "&lt;a href" in figure.layout.xaxis.title.text


def test_adjoints_are_drawn_over_the_steps_and_chaotic_runs_stand_out():
    plot = adjoint_figure(make_attribution(chaotic=["seed-0003"]))

    curves = {trace.name: trace for trace in plot.data}
    assert len(plot.data) == 12
    assert sorted(curves) == ["chaotic, left out", "trusted"]
    chaotic = curves["chaotic, left out"]
    assert "seed-0003" in chaotic.hovertemplate
    assert list(zip(chaotic.x, chaotic.y, strict=True)) == [(0, 2.0), (4, pytest.approx(0.8)), (9, 1.0)]
    assert chaotic.line.color != curves["trusted"].line.color
    # one of each kind is in the legend
    assert sum(trace.showlegend for trace in plot.data) == 2


def test_runs_without_an_adjoint_are_not_drawn():
    plot = adjoint_figure(make_attribution(adjoint_norms={}))

    assert not any(trace.x for trace in plot.data)


def test_groups_are_drawn_by_name(grouped):
    names = [escape(name) for name in GROUPS]
    points = [
        row[0] for trace in influence_figure(grouped, 0).data if trace.mode == "markers" for row in trace.customdata
    ]
    assert sorted(points) == sorted(names)
    assert influence_figure(grouped, 0).layout.title.text == "Every group of training examples, query 4"
    bars, _ = top_figure(grouped, 0, "mean", 3).data
    assert list(bars.y) == [escape(name) for name in grouped.top(3, "mean", query=0)["removal"]]
    assert bars.hovertemplate.startswith("<b>group %{y}</b>")
    assert removal_figure(grouped, 0, [2]).layout.title.text == f"Query 4, without group {names[2]}"
