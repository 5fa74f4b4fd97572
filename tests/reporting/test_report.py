"""The report as a file: what it says, and the numbers that its tables and figures are drawn from."""

import base64
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_dtda import suggest_removals
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.cli import main
from lightning_dtda.errors import AttributionError
from lightning_dtda.evaluation import evaluate
from lightning_dtda.reporting import page_data, report
from lightning_dtda.reporting.formatting import count, counts
from lightning_dtda.statistics import Mean, Quantile
from tests.reporting.attributions import (
    EXAMPLES,
    GROUPS,
    PNG,
    QUERIES,
    make_attribution,
    many,
    suggestible,
    truth_of,
)
from tests.reporting.page import data_of, rows_of, text_of

DIFFERENCES = ("mean", "spread", "wasserstein")
_SIX_DIGITS = 5.1e-6  # half a unit of the last of the digits in the file


def test_tables_hold_influence_interval_and_significance_of_every_example(attribution, tmp_path):
    data = data_of(report(attribution, tmp_path / "report.html"))
    for position, (number, difference) in [(p, d) for p in range(3) for d in enumerate(DIFFERENCES)]:
        rows = rows_of(data, position, number)
        assert sorted(row["position"] for row in rows) == list(range(EXAMPLES))
        examples = [row["position"] for row in rows]
        influence, ends = attribution.influence(difference)[position], attribution.interval(difference)[:, position]
        if difference == "spread":
            influence, ends = 100 * influence.expm1(), 100 * ends.expm1()
        columns = {"influence": influence, "low": ends[0], "high": ends[1]}
        columns["p"] = attribution.p_values(difference)[position]
        columns["significant"] = attribution.significant(difference)[position].double()
        for name, expected in columns.items():
            found = [math.nan if row[name] is None else row[name] for row in rows]
            np.testing.assert_allclose(found, expected[examples], rtol=_SIX_DIGITS, atol=1e-12)
        sizes = [abs(row["influence"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True)
        assert [row["rank"] for row in rows] == list(range(1, EXAMPLES + 1))


def test_the_runs_without_an_example_are_those_of_predict(attribution, tmp_path):
    query = data_of(report(attribution, tmp_path / "report.html"))["queries"][1]
    for example, changes in zip(query["listed"], query["changes"], strict=True):
        expected = attribution.predict([example])[:, 1] - attribution.baseline[:, 1]
        # four digits, where a pixel has fewer; float32 samples
        np.testing.assert_allclose(changes, expected, rtol=1e-3, atol=1e-6)


def test_the_overview_counts_queries_and_finds_the_largest_influence(attribution, tmp_path):
    across = data_of(report(attribution, tmp_path / "report.html"))["across"]
    for number, difference in enumerate(DIFFERENCES):
        influence = attribution.influence(difference)
        largest, where = influence.abs().max(0)
        assert across[number]["count"] == attribution.significant(difference).sum(0).tolist()
        signed = influence[where, torch.arange(EXAMPLES)]
        signed = 100 * signed.expm1() if difference == "spread" else signed
        np.testing.assert_allclose(across[number]["largest"], signed, rtol=5.1e-4, atol=1e-9)
        somewhere = largest > 0
        assert torch.tensor(across[number]["where"])[somewhere].tolist() == where[somewhere].tolist()


def test_if_not_all_fit_the_largest_and_the_significant_are_listed(attribution, tmp_path, monkeypatch):
    monkeypatch.setattr(page_data, "MOST_NUMBERS", 0)
    data = data_of(report(attribution, tmp_path / "report.html", k=4))
    for position, (number, difference) in [(p, d) for p in range(3) for d in enumerate(DIFFERENCES)]:
        expected = attribution.top(4, difference, query=position).example.tolist()
        assert [row["position"] for row in rows_of(data, position, number)] == expected
    # the one significant example is the last but one by size: it comes before larger ones that are not
    weak = make_attribution()
    weak.responses[..., 11] = 2e-4 + 1e-6 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    weak.responses[..., 23] = 0.0
    monkeypatch.setattr(page_data, "MOST_NUMBERS", 3 * 25 * 6)
    rows = rows_of(data_of(report(weak, tmp_path / "report.html", k=2, differences=["mean"])), 0, 0)
    order = weak.influence("mean")[0].abs().argsort(descending=True).tolist()
    assert len(rows) == 6
    assert 11 in [row["position"] for row in rows]
    assert order.index(11) > 5, "it would not have been listed by its size"
    assert [row["rank"] for row in rows] == [1 + order.index(row["position"]) for row in rows]


def test_of_too_many_queries_the_page_says_which_are_shown(attribution, tmp_path, monkeypatch):
    monkeypatch.setattr(page_data, "MOST_QUERIES", 2)
    path = report(attribution, tmp_path / "report.html")
    assert "2 of 3 queries are on this page" in text_of(path)
    # of the mean, one example is significant on each query; of the spread, on the last two
    assert [query["id"] for query in data_of(path)["queries"]] == list(QUERIES[1:])


def test_the_page_says_first_whether_it_can_be_used_and_what_to_do(attribution, tmp_path):
    text = text_of(report(attribution, tmp_path / "deep" / "report.html"))
    parts = [
        "How does the loss on 3 queries change",
        "<strong>",
        "One query",
        ">Next<",
        "How to read this",
        "Diagnostics",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    for words in (
        "if one of 40 training examples is removed?",
        "Verify: retrain without example",
        "giving it weight zero: batch order, batch size and the",
        "UnrolledDifferentiation (precision=float64)",
        "parameters 1.2e-06, gradients 2e-06",
        "change of the mean loss if removed",
    ):
        assert words in " ".join(text.split())
    assert "Caution" not in text


def test_sentences_say_how_many_are_significant(attribution, tmp_path):
    path = report(attribution, tmp_path / "report.html")
    text, data = text_of(path), data_of(path)
    assert attribution.significant("mean").sum(1).tolist() == [1, 1, 1]
    assert "On 3 of 3 queries, 1 of 40 examples has a significant mean influence (12 runs, " in text
    assert attribution.significant("spread").sum(1).tolist() == [0, 1, 1]
    assert "On 2 of 3 queries, 1 of 40 examples has a significant spread influence (12 runs, " in text
    low, _, high = (each[:, 11].tolist() for each in attribution.retrainings_needed(difference="mean"))
    for query, *ends in zip(data["queries"], low, high, strict=True):
        expected = f"Trainings needed to confirm example 11: {counts(*ends)} without it, and the same number with all"
        assert expected in query["ranked"][0]["verdict"]


def test_if_nothing_is_significant_the_page_says_how_many_runs_it_would_take(tmp_path):
    noise = make_attribution()
    noise.responses[..., [11, 23]] = noise.responses[..., [12, 24]]
    noise.responses[..., 30] += 0.0012
    noise.responses.mul_(1000)  # so that the runs cannot show that effects are small
    text = text_of(report(noise, tmp_path / "report.html"))
    assert not noise.significant("mean").any()
    assert "No example has a significant mean influence on any of 3 queries with 12 runs (false discovery" in text
    p, (low, _, high) = noise.p_values("mean"), noise.runs_for_significance("mean")
    query, example = divmod(int(p.argmin()), 40)
    assert low[query, example] <= 12
    more = count(float(high[query, example]) - 12)
    assert f"The clearest is example {example} (p = {p.min():.2g}): up to {more} more runs would make it" in text
    assert "Cannot tell for 39 of 40 examples: with 12 runs, an effect is found with a probability of 80 %" in text


def test_other_differences_are_shown_with_a_sentence_and_a_unit(attribution, tmp_path):
    differences = ["energy", Quantile(0.1), Quantile(0.9), "tail", "gaussian_kl", Mean("median"), "variance"]
    data = data_of(report(attribution, tmp_path / "report.html", k=2, differences=differences))
    said = " ".join(f"{each['meaning']}; {each['unit']}. {each['noInterval']}" for each in data["differences"])
    for words in (
        "in the square root of the loss's unit",
        "change of the loss that 10 % of the runs do not exceed, on this query",
        "change of the loss that 90 % of the runs do not exceed, on this query",
        "change of the mean loss over the highest 10 % of the runs on this query",
        "in nats; a shift by one standard deviation is 0.5",
        "change of the loss, median over runs, on this query",
        "no method holds its level with few runs. Use the spread influence",
    ):
        assert words.removeprefix("in ") in said
    assert len({each["key"] for each in data["differences"]}) == len(differences)
    assert {len(query["ranked"]) for query in data["queries"]} == {len(differences)}
    assert set(data["queries"][0]["ranked"][-1]["rows"]["low"]) == {None}


@pytest.mark.parametrize(
    ("runs", "caution"), [(1, "There is a single run"), (2, "There are only 2 runs"), (7, "7 runs")]
)
def test_few_runs_still_make_a_report_with_a_caution(runs, caution, tmp_path, recwarn):
    path = report(make_attribution(runs), tmp_path / "report.html")
    assert "Caution." in text_of(path)
    assert caution in text_of(path)
    assert (data_of(path)["queries"][0]["points"] is None) == (runs == 1), "there is no spread to draw"
    assert not [warning for warning in recwarn if "Influences of" in str(warning.message)]


def test_a_report_is_of_the_trusted_runs(tmp_path):
    chaotic = make_attribution(chaotic=["seed-0002", "seed-0005"])
    chaotic.responses[[2, 5]] *= 1000
    path = report(chaotic, tmp_path / "report.html")
    assert "2 runs are left out of 12 as chaotic (seed-0002, seed-0005)" in text_of(path)
    data = data_of(path)
    assert data["runs"] == list(chaotic.trusted().runs)
    assert [curve["run"] for curve in data["adjoints"] if curve["chaotic"]] == ["seed-0002", "seed-0005"]


def test_ill_conditioned_runs_are_cautioned_against(tmp_path):
    diagnosis = {"seed-0002": {"finite_differences": 1e-6, "precision": 0.3}}
    estimator = {"class": "UnrolledDifferentiation", "precision": "recorded"}
    text = text_of(report(make_attribution(diagnosis=diagnosis, estimator=estimator), tmp_path / "report.html"))
    assert "1 run is ill-conditioned (seed-0002)" in text
    assert "0.3 against double precision" in text


@pytest.mark.parametrize("norms", [{}, {"seed-0000": {}}], ids=["unknown", "of a forward sweep"])
def test_without_adjoints_there_is_no_empty_figure(tmp_path, norms):
    text = text_of(report(make_attribution(adjoint_norms=norms), tmp_path / "report.html"))
    assert "How long an early change still matters" not in text


def test_adjoints_are_ordered_by_step(attribution, tmp_path):
    curves = data_of(report(attribution, tmp_path / "report.html"))["adjoints"]
    assert len(curves) == 12
    assert (curves[3]["steps"], curves[3]["norms"]) == ([0, 4, 9], [2.0, 0.8, 1.0])


def test_groups_are_named_with_their_sizes(grouped, tmp_path):
    path = report(grouped, tmp_path / "report.html", k=4)
    data, text = data_of(path), text_of(path)
    assert data["names"] == list(GROUPS)
    assert data["sizes"] == [1 + n % 3 for n in range(EXAMPLES)]
    assert "if one of 40 groups of training examples is removed?" in text
    assert "measured after step 40 of 12 seeded runs" in text
    assert "change of the mean loss on this query if the group is removed" in data["differences"][0]["meaning"]
    assert "Which groups make the largest change of the mean loss?" in data["differences"][0]["question"]
    assert "<i>source" not in path.read_text()
    assert '"examples": [' not in text


def test_a_top_that_was_kept_is_reported_as_all_responses_are(attribution, tmp_path):
    of_all = data_of(report(attribution, tmp_path / "all.html", differences=["mean", "spread"]))
    kept = data_of(report(attribution.keep_top(4), tmp_path / "kept.html", k=4))
    for query in range(3):
        for number in range(2):
            rows = rows_of(kept, query, number)
            assert len(rows) >= 4
            for row, expected in zip(rows, rows_of(of_all, query, number), strict=False):
                exact = {name: value for name, value in row.items() if name not in ("p", "q")}
                assert exact == {name: expected[name] for name in exact}
                # p-values follow from rounded figures
                assert (row["p"], row["q"]) == pytest.approx((expected["p"], expected["q"]), rel=1e-3)


def test_examples_and_queries_are_shown_with_what_they_have(attribution, tmp_path):
    examples = {11: Shown("patient 11", "ill", PNG, "a text", (("age", "54"),)), 2: Shown(text="another")}
    queries = {4: Shown("the first", label="well", prediction="ill")}
    data = data_of(report(replace(attribution, gallery=Gallery(examples, queries)), tmp_path / "report.html"))
    shown = data["examples"]["11"]
    assert shown["image"] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    expected = {"name": "patient 11", "label": "ill", "text": "a text", "fields": [["age", "54"]]}
    assert {name: shown[name] for name in expected} == expected
    assert data["examples"]["2"] == {"text": "another"}
    assert data["queries"][0]["name"] == "the first"
    assert data["queries"][0]["shown"] == {"name": "the first", "label": "well", "prediction": "ill"}


def test_pictures_are_left_out_beyond_a_limit_those_of_the_first_ranks_last(attribution, tmp_path, monkeypatch):
    monkeypatch.setattr(page_data, "MOST_IMAGES", 2 * len(PNG))
    gallery = Gallery({number: Shown(image=PNG) for number in range(EXAMPLES)})
    one = replace(attribution, gallery=gallery).select([1])
    data = data_of(report(one, tmp_path / "report.html", differences=["mean"]))
    shown = {int(number) for number, parts in data["examples"].items() if "image" in parts}
    assert shown == set(attribution.top(2, "mean", query=1).example)


def test_predictions_stand_beside_retraining(attribution, tmp_path):
    truth = truth_of(attribution, ((11,), (23,), (1, 2), (5, 6, 7, 8)), error=0.01)
    path = report(attribution, tmp_path / "report.html", truth=truth)
    text, found = text_of(path), data_of(path)["retrained"]
    assert "Against retraining" in text
    assert "4 removals were retrained with 12 seeds each, and with 12 on all data (drop: without the examples" in text
    score = evaluate(attribution, truth, ["mean"]).scores["mean"]
    assert f"rank correlation of predicted and retrained {score.score:.2f} [" in text
    assert f"noise ceiling {score.ceiling:.2f}" in text
    assert found["subsets"] == ["example 11", "example 23", "examples 1, 2", "examples 5, 6, 7 and 1 more"]
    for number, difference in enumerate(DIFFERENCES):
        for name, expected in (
            ("retrained", truth.influence(difference)),
            ("predicted", torch.stack([attribution.influence(difference, removed=s) for s in truth.removed], 1)),
        ):
            expected = 100 * expected.expm1() if difference == "spread" else expected
            np.testing.assert_allclose(found["differences"][number][name], expected, rtol=1e-6)
    mean = found["differences"][0]
    # Student's interval of the mean of differences between trainings of the same seed, by hand
    apart = (truth.measurements[0, :, 2] - truth.baseline[:, 2]).double()
    half = 2.2009851601 * float(apart.std()) / 12**0.5
    assert (mean["low"][2][0], mean["high"][2][0]) == pytest.approx(
        (float(apart.mean()) - half, float(apart.mean()) + half)
    )
    assert set(found["differences"][2]["low"][0]) == {None}, "there is no interval for distances"


def test_a_single_removal_is_compared_without_a_rank_correlation(attribution, tmp_path):
    path = report(attribution, tmp_path / "report.html", truth=truth_of(attribution, ((11,),)))
    assert "1 removal was retrained" in text_of(path)
    assert "rank correlation" not in text_of(path)


def test_a_truth_of_other_queries_is_refused(attribution, tmp_path):
    truth = replace(truth_of(attribution, ((11,),)), queries=(1, 2, 3))
    with pytest.raises(AttributionError, match="differ in their queries"):
        report(attribution, tmp_path / "report.html", truth=truth)
    assert not (tmp_path / "report.html").exists()


def test_a_suggestion_is_shown_with_what_retraining_says(tmp_path):
    attribution = suggestible()
    suggestion = suggest_removals(attribution, k=3, goal="reduce_variance", queries=[2])
    assert suggestion.best
    path = report(attribution, tmp_path / "report.html", suggestion=suggestion)
    assert suggestion.verdict.replace("\xa0", " ") in text_of(path)
    assert "Retrained" not in text_of(path)
    cards = data_of(path)["suggestion"]
    assert [card["name"] for card in cards] == [f"example {name}" for name in suggestion.removals[: suggestion.best]]
    truth = truth_of(attribution, (tuple(sorted(suggestion.removed)),))
    verified = text_of(report(attribution, tmp_path / "report.html", suggestion=suggestion, truth=truth))
    assert "Retrained 12 times without the suggested examples and 12 times on all data" in verified


def test_the_command_takes_a_truth(attribution, tmp_path, capsys):
    attribution.save(tmp_path / "attribution")
    truth_of(attribution, ((11,),)).save(tmp_path / "truth")
    arguments = ["--attribution", str(tmp_path / "attribution"), "--truth", str(tmp_path / "truth")]
    main(["report", *arguments, "--output", str(tmp_path / "report.html")])
    assert f"The report is {tmp_path / 'report.html'}; open it in a browser." in capsys.readouterr().out
    assert data_of(tmp_path / "report.html")["retrained"]["subsets"] == ["example 11"]


def test_data_and_queries_are_shown_afterwards(attribution, tmp_path):
    examples = TensorDataset(torch.arange(float(EXAMPLES))[:, None], torch.zeros(EXAMPLES))
    queries = TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10))
    shown = report(
        attribution, tmp_path / "report.html", data=examples, queries=queries, show=lambda item: f"x = {item[0][0]:g}"
    )
    data = data_of(shown)
    assert data["examples"]["11"]["text"] == "x = 11"
    assert data["queries"][1]["shown"]["text"] == "x = 7"
    with pytest.raises(AttributionError, match="show needs data or queries"):
        report(attribution, tmp_path / "report.html", show=str)


def test_the_licences_of_what_draws_the_page_are_in_it(attribution, tmp_path):
    page = report(attribution, tmp_path / "report.html").read_text()
    assert len(re.findall(r"Permission is hereby granted, free of charge", page)) >= 2


@pytest.mark.slow
def test_200_queries_and_10000_examples_fit_in_10_megabytes(tmp_path):
    large = many(200, 10_000)
    path = report(large, tmp_path / "report.html", progress=False)
    assert path.stat().st_size < 10e6
    data = data_of(path)
    assert len(data["queries"]) == 200
    assert len(data["across"][0]["count"]) == 10_000
    significant = large.select([123]).significant("mean")[0].nonzero()[:, 0].tolist()
    listed = {row["position"] for row in rows_of(data, 123, 0)}
    assert 0 < len(significant) <= len(listed)
    assert set(significant) <= listed
