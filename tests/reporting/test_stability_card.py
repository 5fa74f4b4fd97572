"""The card for a model card: which queries depend on the seed, which examples matter, and valid Markdown."""

import re

import pytest
import torch

from lightning_dtda import Attribution, GroundTruth, report
from lightning_dtda.attribution.gallery import Gallery, Shown
from lightning_dtda.errors import AttributionError

RUNS, EXAMPLES = 24, 12


def made(names=None, effect=0.5):
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 2.0, 0.5], dtype=torch.float64)
    baseline = 3 + spread * torch.randn(RUNS, 3, generator=generator, dtype=torch.float64)
    responses = 0.01 * torch.randn(RUNS, 3, EXAMPLES, generator=generator, dtype=torch.float64)
    responses[:, 2, 7] += effect
    shown = {0: Shown(name="a|b *c*", label="cat")} if names is None else names
    runs = tuple(f"seed-{n:04d}" for n in range(RUNS))
    gallery = Gallery({7: Shown(text="secret", label="dog")}, shown)
    return Attribution(baseline, responses, runs, (0, 1, 2), {"measurement": "loss"}, gallery)


def card(tmp_path, attribution, **arguments):
    path = report(attribution, tmp_path / "card.md", progress=False, **arguments)
    return path.read_text()


def table(text, title):
    rows = re.search(rf"### {title}\n\n((?:\|.*\n)+)", text)[1].splitlines()
    return [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]


def test_the_queries_with_the_largest_spread_come_first(tmp_path):
    rows = table(card(tmp_path, made()), "Queries that depend most on the seed")
    assert [row[0].strip() for row in rows[2:]] == ["query 1", "query 2", "a\\|b \\*c\\*"]
    deviation, low, high = map(float, re.findall(r"[\d.]+", rows[2][-1]))
    assert low < deviation < high
    assert deviation == pytest.approx(float(made().baseline[:, 1].std()), rel=0.05)
    assert len({len(row) for row in rows}) == 1


def test_the_example_that_matters_is_named_with_its_interval(tmp_path):
    rows = table(card(tmp_path, made()), "Training examples with significant influence")
    assert [cell.strip() for cell in rows[2][:3]] == ["example 7", "dog", "query 2"]
    assert "the mean loss rises (0.5" in rows[2][3]


def test_no_content_of_an_example_is_on_it(tmp_path):
    assert "secret" not in card(tmp_path, made())


def test_silence_is_not_taken_for_absence(tmp_path):
    text = card(tmp_path, made(effect=0.0))
    assert "No single example has a significant influence on mean or spread. This does not show" in text


def test_it_says_what_removal_means_and_what_retraining_says(tmp_path):
    attribution = made()
    truth = GroundTruth(
        attribution.predict([7])[None] + torch.zeros(1, RUNS, 3), attribution.baseline, ((7,),), (0, 1, 2),
        tuple(range(100, 100 + RUNS)), tuple(range(200, 200 + RUNS)), {"removal": "drop", "measurement": "loss"},
    )  # fmt: skip
    assert "### Against retraining" in card(tmp_path, attribution, truth=truth)
    assert "This is predicted, not retrained. How" in card(tmp_path, attribution)


def test_the_format_is_chosen_by_name_or_ending(tmp_path):
    attribution = made()
    by_name = report(attribution, tmp_path / "card.txt", format="card", progress=False).read_text()
    assert by_name == card(tmp_path, attribution)
    assert report(attribution, tmp_path / "found.md", format="json", progress=False).read_text().startswith("{")
    with pytest.raises(AttributionError, match="choose from html, json, card"):
        report(attribution, tmp_path / "card.pdf", format="pdf", progress=False)
