import json

import torch

from lightning_dtda import GroundTruth, report, suggest_removals
from lightning_dtda.reporting import find
from lightning_dtda.reporting.machine_readable import as_json
from tests.reporting.attributions import make_attribution


def refused(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_findings_in_json_are_those_of_the_page(attribution):
    found = find(attribution, k=4)
    content = json.loads(as_json(found), parse_constant=refused)
    assert content["verdict"]["sentence"] == found.verdict.sentence
    assert content["verdict"]["level"] == found.verdict.level
    assert [step["commands"] for step in content["next_steps"]] == [list(step.commands) for step in found.next_steps]
    assert [query["query"] for query in content["queries"]] == [4, 7, 9]
    for query, of_query in zip(found.queries, content["queries"], strict=True):
        for ranked, of_difference in zip(query.ranked, of_query["differences"], strict=True):
            assert of_difference["name"] == ranked.difference.name
            rows = of_difference["rows"]
            assert [(row["name"], row["influence"]) for row in rows] == [
                (row.name, row.influence) for row in ranked.rows
            ]
            assert [row["significant"] for row in rows] == [row.significant for row in ranked.rows]


def test_what_is_unknown_is_null():
    content = json.loads(as_json(find(make_attribution(1))), parse_constant=refused)
    assert content["agreement"] is None
    assert content["queries"][0]["differences"][0]["rows"][0]["p_value"] is None


def test_a_report_that_ends_in_json_has_retraining_and_suggestion(attribution, tmp_path):
    suggestion = suggest_removals(attribution, k=2, held_out=0)
    predicted = torch.stack([attribution.predict([n]) for n in (11, 23, 5)])
    seeds = tuple(range(len(attribution.runs)))
    about = {"measurement": "loss", "removal": "reweight"}
    truth = GroundTruth(predicted, attribution.baseline, ((11,), (23,), (5,)), attribution.queries, seeds, seeds, about)
    path = report(attribution, tmp_path / "findings.json", k=2, truth=truth, suggestion=suggestion)
    content = json.loads(path.read_text(), parse_constant=refused)
    assert content["suggestion"]["verdict"] == suggestion.verdict
    assert content["suggestion"]["removals"] == list(suggestion.removals)
    assert len(content["retrained"]["said"]) == 4  # what was retrained, and a score for each difference
    assert len(content["retrained"]["subsets"]) == 3
    assert len(content["queries"][0]["differences"][0]["rows"]) == 2
