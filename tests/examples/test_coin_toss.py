"""Decisions that depend on the seed: the small version of the example."""

import argparse
import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from examples.coin_toss.cases import Cases
from examples.coin_toss.choices import kept
from examples.coin_toss.comparing import holm, interval, resampled
from examples.coin_toss.conflicts import Conflicts, Logistic
from examples.coin_toss.flips import FlipRate, flip_rate, steadying, steadying_by_the_mean
from lightning_dtda import Attribution, retrain


def attribution(margins, responses):
    seeds = tuple(f"seed-{s:04d}" for s in range(len(margins)))
    return Attribution(margins, responses, seeds, tuple(range(margins.shape[1])))


def test_the_flip_rate_is_the_minority_of_gaussian_seeds():
    margins = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    assert float(flip_rate(margins)) == pytest.approx(float((margins > 0).double().mean()), abs=0.01)
    assert float(flip_rate(-margins)) == pytest.approx(float(flip_rate(margins)))


def test_rows_that_spread_and_rows_that_shift_both_make_a_coin_toss():
    margins = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None] + 0.1
    spreads, shifts, nothing = -0.8 * margins + 0.08, torch.full_like(margins, 0.5), torch.zeros_like(margins)
    found = attribution(margins, torch.stack([nothing, shifts, spreads], -1))
    changes = found.influence(FlipRate())[0]
    assert changes[0] == 0
    assert (changes[1:] < -0.1).all()
    # the spread alone is not seen by the mean
    assert steadying_by_the_mean(found, 1) == [1]
    assert set(steadying(found, 2)) == {1, 2}


def test_rows_are_chosen_given_those_before():
    margins = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None] + 0.1
    half, also, shift = -0.9 * (margins - 0.1), -0.88 * (margins - 0.1), torch.full_like(margins, 0.02)
    # the first two cancel the same spread: together they overshoot, and a small shift is better than the second
    assert steadying(attribution(margins, torch.stack([half, also, shift], -1)), 2) == [0, 2]


def fold(before, after):
    sets = {"after": {("some", 2): after}, "predicted": {("some", 2): torch.zeros(5)}}
    return {"queries": [0, 1, 2, 3, 4], "sizes": [2], "before": before} | sets


def test_intervals_find_a_change_and_none_where_there_is_none():
    generator = torch.Generator().manual_seed(0)
    before, same = torch.randn(2, 200, 5, generator=generator, dtype=torch.float64)
    changed = resampled([fold(before, (same + 1)[None])], 0, "some", "queries", draws=200)
    estimate, low, high, p = interval(changed["flip rate"], 5)
    expected = 0.1587 - 0.5  # Phi(-1) instead of a half
    assert low < expected < high
    assert p < 0.001
    assert estimate == pytest.approx(expected, abs=0.05)
    assert float(changed["by the mean"][0]) < -0.25 < -0.05 < float(changed["by the spread"][0])
    null = resampled([fold(before, same[None])], 0, "some", "queries", draws=200)
    estimate, low, high, p = interval(null["accuracy"], 5)
    assert low < 0 < high
    assert p > 0.05


def test_rows_are_chosen_again_if_more_of_them_or_other_random_sets_are_asked_for(tmp_path):
    calls = []

    def rows(k, draws):
        def choose():
            calls.append((k, draws))
            return {"AUM": [list(range(k))], "random": [list(range(k))] * draws}

        return kept(tmp_path / "rows.json", k, draws, choose)

    assert len(rows(4, 3)["AUM"][0]) == 4
    assert len(rows(21, 3)["AUM"][0]) == 21
    assert len(rows(9, 3)["AUM"][0]) == 21  # of which the first nine are taken
    assert len(rows(9, 2)["random"]) == 2
    assert calls == [(4, 3), (21, 3), (9, 2)]


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert math.isclose(holm([0.9])[0], 0.9)


def test_held_out_cases_are_never_trained_on_and_noise_is_the_same_for_every_seed():
    first, second, clean = Cases(fold=1, noise=0.1), Cases(fold=1, noise=0.1), Cases(fold=1)
    for data in (first, second, clean):
        data.setup("fit")
    assert not set(first.rows.tolist()) & set(first.held_out_rows.tolist())
    assert len(first.rows) + len(first.held_out_rows) == 569
    assert first.train.tensors[1].equal(second.train.tensors[1])
    changed = (first.train.tensors[1] != clean.train.tensors[1]).nonzero()[:, 0]
    assert sorted(first.wrong.tolist()) == changed.tolist()
    assert len(changed) == round(0.1 * 426)


def test_contradictory_rows_spread_the_decisions_of_their_hospital_and_do_not_move_them():
    data = Conflicts()
    data.setup("fit")
    inputs, given = data.train.tensors
    of_b, of_c = (data.pairs[part].flatten().tolist() for part in (slice(4), slice(4, None)))
    for column, rows in ((4, of_b), (5, of_c)):
        assert (inputs[:, column] != 0).nonzero()[:, 0].tolist() == rows
        assert inputs[rows].equal(inputs[rows[:1]].expand(8, -1))
        assert given[rows].tolist() == [0, 1] * 4
    assert not data.held_out.tensors[0][:, 5].any()  # no case of hospital C is asked about
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    truth = retrain(
        Logistic(), data, trainer=lambda: pl.Trainer(max_epochs=5, accelerator="cpu", **quiet),
        subsets=[of_b, of_c], seeds=128, queries=data.held_out, measurement="margin", stacked=True, progress=False,
    )  # fmt: skip
    asked = data.held_out.tensors[0][:, 4] != 0
    before, without_b, without_c = (each[:, asked].double() for each in (truth.baseline, *truth.measurements))
    assert float((without_b.std(0) / before.std(0)).mean()) < 0.6
    assert float((without_c.std(0) / before.std(0)).mean()) > 0.75
    # half of the answers are on either side: an offset that moved would raise one half and lower the other
    side = 2 * data.held_out.tensors[1][asked] - 1
    moved = ((without_b - before).mean(0) * side).mean()
    assert abs(float(moved)) < 0.4 * float(before.std(0).mean())


def test_the_response_of_a_record_is_the_sum_of_its_rows():
    pytest.importorskip("cleanlab")
    from examples.coin_toss.pairs import of_records, whole

    responses = torch.arange(24, dtype=torch.float64).view(2, 2, 6)
    found, units = of_records(attribution(torch.zeros(2, 2, dtype=torch.float64), responses), [[1, 4], [2, 5]])
    assert units == [[0], [3], [1, 4], [2, 5]]
    assert torch.as_tensor(found.responses)[0, 0].tolist() == [0, 3, 5, 7]
    # the last record has no place any more
    assert whole([2, 0, 3, 1], [[number] for number in range(2)] + [list(range(2, 9)), [9, 10]]) == [*range(2, 9), 0]


@pytest.mark.slow
def test_all_methods_remove_equally_many_rows_and_are_measured_on_fresh_seeds(tmp_path):
    pytest.importorskip("cleanlab")
    from examples.coin_toss import coin_toss

    config = Path(coin_toss.__file__).parent / "patients.yaml"
    sizes = {"runs": 8, "seeds": 6, "draws": 2, "shares": [0.01], "cases": 3, "undecided": [0.1, 0.5]}
    options = argparse.Namespace(config=config, noise=0.1, output=tmp_path, **sizes)
    found = coin_toss.measure(options, 0)
    methods = json.loads((tmp_path / "patients-noise-0.1-fold-0" / "rows.json").read_text())
    assert set(methods) == {coin_toss.OURS, *coin_toss.BASELINES}
    assert all(len(set(rows)) == 4 for several in methods.values() for rows in several)
    assert [len(case["rows"]) for case in found["alone"]] == [4, 4, 4]
    assert found["before"].shape == (6, 143)
    assert len(found["queries"]) == 3
    assert all(after[..., found["queries"]].isfinite().all() for after in found["after"].values())
    # other seeds than the recorded ones, and other rows: nothing is what was recorded
    assert not (found["after"][coin_toss.OURS, 4][0] == found["before"]).any()
    results = coin_toss.summarise([found], [0.01])
    for method in (coin_toss.OURS, *coin_toss.EACH, *coin_toss.BASELINES):
        estimate, low, high, _ = results[f"0.01 {method}"]["flip rate"]
        assert low <= estimate <= high <= 1


@pytest.mark.slow
def test_rows_chosen_in_batches_are_as_many_and_others_than_those_chosen_at_once(tmp_path):
    pytest.importorskip("cleanlab")
    from examples.coin_toss import coin_toss, reestimation

    config = Path(coin_toss.__file__).parent / "patients.yaml"
    common = {"config": config, "noise": 0.1, "output": tmp_path, "seeds": 6}
    assert reestimation.measure(argparse.Namespace(**common), 0) is None  # nothing is there yet
    sizes = {"runs": 8, "draws": 1, "shares": [0.01], "cases": 3, "undecided": [0.1, 0.5]}
    coin_toss.measure(argparse.Namespace(**common, **sizes), 0)
    found = reestimation.measure(argparse.Namespace(**common, share=0.01, batches=2), 0)
    assert found["sizes"] == [4]
    assert set(found["rows"]) == {f"{name}, {way}" for name in reestimation.WAYS for way in ("at once", "in batches")}
    for name in reestimation.WAYS:
        at_once, anew = (found["rows"][f"{name}, {way}"] for way in ("at once", "in batches"))
        assert len(set(anew)) == 4  # rows that have gone are not chosen again
        assert anew[:2] == at_once[:2]  # the first batch comes from the same runs


@pytest.mark.slow
def test_all_ways_remove_eight_rows_of_the_constructed_table(tmp_path):
    pytest.importorskip("cleanlab")
    from examples.coin_toss import pairs

    found = pairs.measure(argparse.Namespace(output=tmp_path, runs=64, seeds=4), 0)
    assert all(len(set(rows)) == pairs.ROWS for several in found["rows"].values() for rows in several)
    assert found["of hospital B"][pairs.WHOLE] == 8
    # hospital B has 2 % of the rows; 64 runs show the spread that they cause, 16 do not
    assert found["of hospital B"][pairs.OURS] >= 6
