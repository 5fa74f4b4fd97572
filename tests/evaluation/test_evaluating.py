"""Attributions against ground truth: alignment, refusals, warnings, the table and the command."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from scipy.stats import spearmanr

from lightning_dtda import Attribution, GroundTruth
from lightning_dtda.cli import main
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import compare, evaluate
from lightning_dtda.evaluation.evaluating import predicted_samples
from lightning_dtda.reporting.evaluations import print_evaluations
from tests.simulated import normal

RUNS, QUERIES, EXAMPLES, SUBSETS, SEEDS, BASELINE = 10, 3, 24, 15, 6, 8
DATA = {"length": EXAMPLES, "fingerprint": "a"}


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(0)
    baseline = 40 + normal(generator, RUNS, QUERIES)
    responses = normal(generator, 1, QUERIES, EXAMPLES) + 0.5 * normal(generator, RUNS, QUERIES, EXAMPLES)
    about = {
        "measurement": "loss",
        "estimator": {"class": "E"},
        "removal": "reweight",
        "queries_fingerprint": "q",
        "configuration": {"dataset": DATA},
    }
    runs = tuple(f"seed-{s:04d}" for s in range(RUNS))
    return Attribution(baseline.float(), responses.float(), runs, tuple(range(QUERIES)), about)


@pytest.fixture
def truth(attribution):
    generator = torch.Generator().manual_seed(1)
    # of pairs, for groups: examples 2k and 2k + 1
    pairs = [torch.randperm(EXAMPLES // 2, generator=generator)[:3] for _ in range(SUBSETS)]
    removed = tuple(tuple(sorted(int(i) for p in chosen for i in (2 * p, 2 * p + 1))) for chosen in pairs)
    effects = torch.stack([attribution.responses[..., list(subset)].sum(2).double().mean(0) for subset in removed])
    measurements = 40 + effects[:, None] + normal(generator, SUBSETS, SEEDS, QUERIES)
    baseline = 40 + normal(generator, BASELINE, QUERIES)
    about = {"measurement": "loss", "removal": "drop", "queries_fingerprint": "q", "data": DATA}
    seeds = tuple(range(10_000, 10_000 + BASELINE))
    return GroundTruth(measurements, baseline, removed, attribution.queries, seeds[:SEEDS], seeds, about)


def test_scores_are_those_of_the_influences_that_both_tell(attribution, truth):
    found = evaluate(attribution, truth, replicates=20)
    assert list(found.scores) == ["mean", "variance", "wasserstein"]
    for name, score in found.scores.items():
        real = truth.influence(name)
        predicted = torch.stack([attribution.influence(name, list(subset)) for subset in truth.removed], 1)
        expected = [spearmanr(*pair).statistic for pair in zip(predicted, real, strict=True)]
        assert score.per_query == pytest.approx(expected, rel=1e-9)
        assert score.low < score.high
        assert score.constant_queries == 0
    assert found.scores["mean"].ceiling > 0.9
    numbers = (found.runs, found.subsets, found.seeds, found.baseline_seeds, found.queries)
    assert numbers == (RUNS, SUBSETS, SEEDS, BASELINE, QUERIES)
    assert (found.measurement, found.removal, found.shared_seeds) == ("loss", "drop", ())


def test_small_changes_of_large_measurements_survive(attribution, truth):
    small = replace(attribution, responses=attribution.responses * 1e-6)
    changes = predicted_samples(small, truth) - small.baseline.double()
    expected = torch.stack([small.responses[..., list(subset)].double().sum(2) for subset in truth.removed])
    # responses of 1e-6 on measurements of 40 would be rounded away in single precision
    torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-11)


def test_groups_are_put_together_to_the_subsets(attribution, truth):
    members = [[2 * p, 2 * p + 1] for p in range(EXAMPLES // 2)]
    groups = [{"name": f"pair {p}", "examples": pair} for p, pair in enumerate(members)]
    responses = torch.stack([attribution.responses[..., pair].sum(2) for pair in members], 2)
    grouped = replace(attribution, responses=responses, about=attribution.about | {"removals": groups})
    one, other = (evaluate(each, truth, ["mean"], replicates=0) for each in (attribution, grouped))
    assert other.scores["mean"].score == pytest.approx(one.scores["mean"].score, rel=1e-12)
    alone = replace(truth, removed=((0,), *truth.removed[1:]))
    with pytest.raises(AttributionError, match=r"Subset 0 .* removes training example 0, but contains no whole group"):
        evaluate(grouped, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measurement": "margin"}, "differ in their measurement: loss and margin"),
        ({"queries_fingerprint": "p"}, "data set of the queries"),
        ({"data": DATA | {"length": 25}}, "number of training examples: 24 and 25"),
        ({"data": DATA | {"fingerprint": "b"}}, "training data"),
    ],
)
def test_a_truth_about_something_else_is_refused(attribution, truth, change, message):
    with pytest.raises(AttributionError, match=message):
        evaluate(attribution, replace(truth, about=truth.about | change))


def test_other_queries_and_measurements_in_mid_training_are_refused(attribution, truth):
    with pytest.raises(AttributionError, match=r"differ in their queries: \(0, 1, 2\) and \(0, 1, 5\)"):
        evaluate(attribution, replace(truth, queries=(0, 1, 5)))
    with pytest.raises(AttributionError, match="after step 3"):
        evaluate(replace(attribution, about=attribution.about | {"step": 3}), truth)


def test_other_draws_of_a_random_measurement_are_refused(attribution, truth):
    drawn = replace(attribution, about=attribution.about | {"draws": {"number": 4, "seed": 0}})
    fewer = replace(truth, about=truth.about | {"draws": {"number": 2, "seed": 0}})
    with pytest.raises(AttributionError, match=r"differ in their draws of the measurement: \{'number': 4.*'number': 2"):
        evaluate(drawn, fewer)
    # a measurement that draws nothing has none to compare
    evaluate(replace(attribution, about=attribution.about | {"draws": None}), fewer, ["mean"], replicates=0)


def test_what_neither_says_is_not_compared(attribution, truth):
    bare = replace(truth, about={"removal": "reweight"})
    assert evaluate(attribution, bare, ["mean"], replicates=0).removal == "reweight"


def test_shared_seeds_are_reported(attribution, truth):
    with pytest.warns(UserWarning, match="2 seeds were both recorded and retrained"):
        found = evaluate(attribution, replace(truth, baseline_seeds=(8, 9, *truth.baseline_seeds[2:])), replicates=0)
    assert found.shared_seeds == (8, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(attribution, truth, replicates=0)


def test_chaotic_runs_are_left_out_unless_all_are_wanted(attribution, truth):
    responses = attribution.responses.clone()
    responses[4] *= 100
    wild = replace(attribution, responses=responses, about=attribution.about | {"chaotic": ["seed-0004"]})
    trusted, all_runs = (evaluate(wild, truth, ["mean"], runs=runs, replicates=0) for runs in ("trusted", "all"))
    assert (trusted.runs, trusted.left_out) == (RUNS - 1, ("seed-0004",))
    assert (all_runs.runs, all_runs.left_out) == (RUNS, ())
    assert trusted.scores["mean"].score > all_runs.scores["mean"].score


def test_missing_trainings_are_reported_and_left_out(attribution, truth):
    measurements = truth.measurements.clone()
    measurements[2, 1:] = torch.nan
    with pytest.warns(UserWarning, match="5 trainings .* are missing. The 14 subsets with 6 seeds"):
        found = evaluate(attribution, replace(truth, measurements=measurements), ["mean"], replicates=0)
    assert found.subsets == SUBSETS - 1


def test_differences_need_enough_runs_and_seeds(attribution, truth):
    one_seed = replace(truth, measurements=truth.measurements[:, :1], seeds=truth.seeds[:1])
    found = evaluate(attribution, one_seed, replicates=0)
    assert list(found.scores) == ["mean", "wasserstein"]
    assert found.scores["mean"].ceiling is None
    with pytest.raises(AttributionError, match="variance influence needs at least 2 seeds"):
        evaluate(attribution, one_seed, ["variance"])


def printed(evaluations, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    print_evaluations(evaluations, console)
    return console.export_text()


def test_the_table_says_scores_intervals_ceilings_and_of_what(attribution, truth):
    found = evaluate(attribution, truth, replicates=50)
    text = printed({"attribution/ud": found})
    score = found.scores["mean"]
    assert f"{score.score:.3f} [{score.low:.2f}, {score.high:.2f}]" in text
    assert f"{score.ceiling:.3f}" in text
    assert "15 subsets" in text
    assert "6 trainings without each subset, 8 with all data" in text
    assert "drop" in text
    assert "too few seeds" not in text


def test_a_narrow_terminal_has_intervals_beneath_the_scores(attribution, truth):
    found = evaluate(attribution, truth, replicates=50)
    text = printed({"attribution/ud": found}, width=70)
    for score in found.scores.values():
        for shown in (f"{score.score:.3f}", f"[{score.low:.2f}, {score.high:.2f}]"):
            assert shown.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}") in text
    assert max(map(len, text.splitlines())) <= 70


def test_a_second_table_says_how_far_the_others_are_from_the_first(attribution, truth):
    worse = replace(attribution, responses=attribution.responses + attribution.responses.roll(1, -1))
    first, second = (evaluate(each, truth, replicates=50) for each in (attribution, worse))
    text = printed({"[one]": first, "two": second})
    assert "score minus that of [one]" in text
    for each in compare(second, first).values():
        low, high = (f"{end:+.2f}" for end in (each.low, each.high))
        shown = f"{each.gain:+.3f} [{low}, {high}]".replace("-", "\N{MINUS SIGN}")
        assert shown.replace("\N{MINUS SIGN}0.00", "0.00").replace("+0.00]", "0.00]") in text
    assert "Differences: both scores are bootstrapped together" in text
    assert "minus that of" not in printed({"one": first}).lower()


def test_the_table_says_what_is_missing(attribution, truth):
    measurements = truth.measurements[:, :3].clone()
    measurements[:, :, 0] = 40
    responses = attribution.responses.clone()
    responses[:, 1] = 0
    few = replace(truth, measurements=measurements, seeds=truth.seeds[:3])
    text = printed({"a": evaluate(replace(attribution, responses=responses), few, replicates=20)})
    assert "Too few seeds for a noise ceiling" in text
    assert "1 query left out" in text
    assert "1 query scores 0" in text


def test_the_command_prints_a_line_for_each_attribution_and_writes_the_figures(attribution, truth, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("one", "two")]
    attribution.save(paths[0])
    replace(attribution, responses=-attribution.responses).save(paths[1])
    truth.save(tmp_path / "truth")
    output = tmp_path / "evaluation.json"
    main(["evaluate", "--attribution", *paths, "--truth", str(tmp_path / "truth"), "--output", str(output)])
    out = capsys.readouterr().out
    assert "noise ceiling" in out
    lines = [line.split()[0] for line in out.splitlines() if line.split()[:1] in (["one"], ["two"])]
    assert lines == ["one", "two", "two"], "the scores of both, and the second less the first"
    assert "score minus that of one" in " ".join(out.split())
    content = json.loads(output.read_text())
    expected = evaluate(Attribution.load(paths[0]), GroundTruth.load(tmp_path / "truth"))
    assert content[paths[0]]["scores"]["mean"]["score"] == expected.scores["mean"].score
    assert content[paths[1]]["scores"]["mean"]["score"] == pytest.approx(-expected.scores["mean"].score)
    apart = content[paths[1]]["less_first"]["mean"]
    assert apart["gain"] == pytest.approx(-2 * expected.scores["mean"].score)
    assert apart["low"] < apart["gain"] < apart["high"] < 0
    assert content[paths[0]]["less_first"]["mean"] == {"gain": 0, "low": 0, "high": 0}


def test_the_command_says_what_is_wrong(attribution, truth, tmp_path, capsys):
    attribution.save(tmp_path / "attribution")
    replace(truth, about=truth.about | {"measurement": "margin"}).save(tmp_path / "truth")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--attribution", str(tmp_path / "attribution"), "--truth", str(tmp_path / "truth")])
    assert stop.value.code == 1
    assert "differ in their measurement" in capsys.readouterr().err
