"""Attributions that keep the responses to few removals, and figures of all: what they say is what all responses say."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lightning_dtda import Attribution, suggest_removals
from lightning_dtda.attribution.kept import KeptResponses
from lightning_dtda.attribution.trust import sizes
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.evaluation import evaluate
from lightning_dtda.retraining.ground_truth import GroundTruth

RUNS, QUERIES, EXAMPLES, K = 10, 4, 60, 3


def made(runs=RUNS, dtype=torch.float32, wild=False, **about):
    """Ten runs whose responses differ in size from example to example; the last run's explode if it is wild."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(EXAMPLES, generator=generator, dtype=dtype)
    responses = scale * torch.randn(runs, QUERIES, EXAMPLES, generator=generator, dtype=dtype)
    responses += 0.3 * torch.randn(QUERIES, EXAMPLES, generator=generator, dtype=dtype)
    if wild:
        responses[-1] *= 1e3
    baseline = torch.randn(runs, QUERIES, generator=generator, dtype=dtype)
    names = tuple(f"seed-{s:04d}" for s in range(runs))
    norms = {name: sizes(of_run) for name, of_run in zip(names, responses, strict=True)}
    known = {key: {name: norms[name][key] for name in names} for key in ("response_norm", "largest_response")}
    chaotic = {"chaotic": [names[-1]]} if wild else {}
    return Attribution(baseline, responses, names, (4, 8, 15, 16), {"measurement": "loss"} | known | chaotic | about)


@pytest.fixture(params=["memory", "disk"])
def both(request, tmp_path, monkeypatch):
    """All responses, and what is kept of them, in memory or read back from disk, from two files."""
    full = made()
    kept = full.keep_top(K)
    if request.param == "disk":
        with monkeypatch.context() as patched:
            patched.setattr("lightning_dtda.attribution.attribution.AT_ONCE", 3 * EXAMPLES)
            kept.save(tmp_path / "kept")
        assert len(list((tmp_path / "kept").glob("queries-*.safetensors"))) == 2
        kept = Attribution.load(tmp_path / "kept")
    return full, kept


@pytest.mark.parametrize("difference", ["mean", "variance", "spread"])
@pytest.mark.parametrize("query", [None, 2])
def test_the_top_is_that_of_all_responses(both, difference, query):
    full, kept = both
    # exact but for the order in which a sum over runs is taken
    pd.testing.assert_frame_equal(
        kept.top(K, difference, query), full.top(K, difference, query), check_exact=False, rtol=1e-13
    )


@pytest.mark.parametrize("difference", ["mean", "variance", "spread"])
def test_figures_of_every_removal_are_those_of_all_responses(both, difference):
    full, kept = both
    for ask in (
        lambda attribution: attribution.influence(difference),
        lambda attribution: attribution.standard_error(difference),
    ):
        assert torch.equal(ask(kept), ask(full).float().double())  # rounded as the responses are
    # of the mean they follow from rounded figures: 60 times the rounding is what a tail of 1e-9 makes of it
    torch.testing.assert_close(kept.p_values(difference), full.p_values(difference), rtol=1e-5, atol=0)
    assert torch.equal(kept.significant(difference), full.significant(difference))
    assert torch.equal(kept.reliability(difference), full.reliability(difference))
    if difference != "variance":
        torch.testing.assert_close(kept.interval(difference), full.interval(difference), rtol=1e-4, atol=1e-6)


def test_figures_in_double_precision_are_not_rounded():
    full = made(dtype=torch.float64)
    kept = full.keep_top(K)
    for difference in ("mean", "variance", "spread"):
        for name in ("influence", "standard_error", "p_values"):
            found, expected = (getattr(attribution, name)(difference) for attribution in (kept, full))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)  # sums are made in another order


def test_the_ends_of_both_moments_are_kept_and_the_responses_to_them(both):
    full, kept = both
    assert isinstance(kept.responses, KeptResponses)
    assert kept.responses.kept.shape == (QUERIES, 4 * K)
    for query, positions in enumerate(kept.responses.kept.tolist()):
        assert positions == sorted(set(positions))
        for difference in ("mean", "variance"):
            order = full.influence(difference)[query].argsort().tolist()
            assert {*order[:K], *order[-K:]} <= set(positions)
        assert torch.equal(kept.responses[:, query, positions], full.responses[:, query, positions])


def test_an_index_reads_what_is_kept_and_nothing_else(both):
    full, kept = both
    [one, *_, other], [first, *_] = kept.responses.kept[1].tolist(), kept.responses.kept[0].tolist()
    for index in (
        np.s_[2, 1, one],
        np.s_[:, 1, [other, one]],
        np.s_[1:3, 1:2, [one]],
        np.s_[..., 1, other],
        np.s_[[2], 1, one],
    ):
        assert torch.equal(kept.responses[index], full.responses[index]), index
    missing = next(n for n in range(EXAMPLES) if n not in kept.responses.kept[1])
    with pytest.raises(AttributionError, match=rf"removal {missing} of the query at position 1 were not kept"):
        kept.responses[:, 1, [one, missing]]
    part = kept.responses[[3, 0], 1:]
    assert torch.equal(part[:, 0, one], full.responses[[3, 0], 1, one])
    for read_all in (
        lambda: kept.responses.sum(),
        lambda: kept.responses[:, 1],
        lambda: kept.responses[[0, 1], [0, 1]],
        lambda: kept.responses.tolist(),
        lambda: np.asarray(kept.responses),
        lambda: kept.responses.mul_(2),
    ):
        with pytest.raises(AttributionError, match="were not kept"):
            read_all()
    assert torch.equal(pickle.loads(pickle.dumps(kept.responses))[:, 0, first], full.responses[:, 0, first])
    assert copy.deepcopy(kept.responses).shape == full.responses.shape


def test_what_needs_responses_that_were_not_kept_is_refused(both):
    _, kept = both
    removed = [int(kept.responses.kept[0, 0])]
    for ask in (
        lambda: kept.influence("quantile"),
        lambda: kept.standard_error("wasserstein"),
        lambda: kept.top(K, "wasserstein"),
        lambda: kept.predict(range(EXAMPLES)),
        lambda: kept.joint_influence(),
        lambda: kept.reliability("energy"),
        lambda: kept.runs_for_stable_top("mean", k=2),
        lambda: suggest_removals(kept, k=2),
        lambda: kept.select([1]).influence("mean", removed=list(range(EXAMPLES))),
    ):
        with pytest.raises(AttributionError, match=f"keep_top={K} keeps.*attribute without keep_top"):
            ask()
    with pytest.raises(AttributionError, match=rf"k=4 is more than keep_top={K}.*to_dataframe"):
        kept.top(K + 1)
    # the remedies that the messages name
    assert kept.select([0]).influence("quantile", removed=removed).shape == (1,)
    assert len(kept.to_dataframe()) == QUERIES * EXAMPLES


def test_what_is_asked_of_kept_responses_is_what_all_of_them_say(both):
    full, kept = both
    removed = kept.responses.kept[2, :2].tolist()
    assert torch.equal(kept.select([2]).predict(removed), full.select([2]).predict(removed))
    for difference in ("mean", "wasserstein"):
        expected = full.influence(difference, removed=removed)[2]
        torch.testing.assert_close(kept.select([2]).influence(difference, removed=removed)[0], expected)
    for name, ends in (
        ("interval", lambda attribution: attribution.interval("wasserstein")),
        ("seeds", lambda attribution: torch.stack(attribution.retrainings_needed())),
    ):
        found, expected = ends(kept), ends(full)
        for query, positions in enumerate(kept.responses.kept):
            torch.testing.assert_close(found[..., query, positions], expected[..., query, positions], msg=name)
        assert (found.isnan().sum(-1) == EXAMPLES - 4 * K).all(), name
    needed = kept.runs_for_significance("variance"), full.runs_for_significance("variance")
    for found, expected in zip(*needed, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1
        )  # by the millions where p, rounded, is close to 1


def test_runs_that_are_left_out_are_in_no_figure_and_in_the_responses():
    full = made(wild=True)
    kept = full.keep_top(K)
    assert kept.chaotic == ("seed-0009",)
    assert torch.equal(kept.influence("mean"), full.influence("mean").float().double())
    pd.testing.assert_frame_equal(kept.top(K, "variance"), full.top(K, "variance"), rtol=1e-13)
    with pytest.raises(AttributionError, match="over the trusted runs"):
        kept.influence("mean", runs="all")
    removed = [int(kept.responses.kept[0, 0])]
    one = kept.select([0])
    torch.testing.assert_close(one.influence("mean", removed, "all"), full.influence("mean", removed, "all")[:1])


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_few_runs_say_what_they_can(runs):
    full = made(runs)
    kept = full.keep_top(K)
    with pytest.warns(UserWarning, match=f"Influences of {runs} runs"):
        pd.testing.assert_frame_equal(kept.top(K), full.top(K), rtol=1e-13)
    assert kept.available_differences == ["mean", "spread"][: 1 + (runs > 1)]
    if runs > 1:
        torch.testing.assert_close(kept.p_values("mean"), full.p_values("mean"), rtol=1e-5, atol=0)


def test_runs_keep_their_order_on_disk(tmp_path):
    full = made()
    turned = replace(full, runs=full.runs[::-1])
    turned.keep_top(K).save(tmp_path / "kept")
    assert Attribution.load(tmp_path / "kept").runs == turned.runs


def test_a_ground_truth_needs_the_responses_to_its_subsets():
    full, removed = made(), ((0, 1, 2), (3, 4, 5), (6, 7, 8), (2, 9, 30))
    real = torch.stack([full.predict(subset) for subset in removed])
    seeds = tuple(range(100, 100 + RUNS))
    truth = GroundTruth(real, full.baseline, removed, full.queries, seeds, seeds)
    with pytest.raises(AttributionError, match="attribute without keep_top"):
        evaluate(full.keep_top(K), truth)
    # the subsets themselves, as removals: what attribute(removals=truth.removed, keep_top=...) has
    groups = [{"name": str(n), "examples": list(subset)} for n, subset in enumerate(removed)]
    sums = torch.stack([full.responses[..., subset].sum(-1) for subset in removed], -1)
    of_subsets = replace(full, responses=sums, about={"measurement": "loss", "removals": groups}).keep_top(K)
    assert evaluate(of_subsets, truth, ["mean"]).scores["mean"].score == pytest.approx(1)


def test_groups_of_examples_are_kept_by_position(tmp_path):
    groups = [{"name": f"group {n}", "examples": [n, EXAMPLES + n]} for n in range(EXAMPLES)]
    full = made(removals=groups)
    full.keep_top(K).save(tmp_path / "kept")
    kept = Attribution.load(tmp_path / "kept")
    pd.testing.assert_frame_equal(kept.top(K), full.top(K), rtol=1e-13)
    name = kept.removals[kept.responses.kept[0, 0]]
    assert torch.equal(kept.select([0]).predict([name]), full.select([0]).predict([name]))


def test_all_is_kept_where_there_is_no_more():
    full = made()
    kept = full.keep_top(EXAMPLES)
    assert kept.responses.kept.shape == (QUERIES, EXAMPLES)
    torch.testing.assert_close(kept.influence("wasserstein", removed=[3, 5]), full.influence("wasserstein", [3, 5]))
    pd.testing.assert_frame_equal(kept.top(EXAMPLES), full.top(EXAMPLES), rtol=1e-13)


def test_equal_influences_are_kept_in_their_order():
    full = made()
    full.responses[..., 5:] = 0  # as of examples that a horizon leaves out
    kept = full.keep_top(K)
    pd.testing.assert_frame_equal(kept.top(K), full.top(K), rtol=1e-13)


def test_tables_have_every_removal(both):
    full, kept = both
    pd.testing.assert_frame_equal(
        kept.to_dataframe(), full.to_dataframe().drop(columns=["wasserstein_influence", "wasserstein_standard_error"])
    )
    dataset = kept.to_xarray()
    assert dataset["responses"].dims == ("run", "query", "place")
    np.testing.assert_array_equal(
        dataset["responses"].isel(query=1), full.responses[:, 1, dataset["kept"].isel(query=1).values]
    )


def test_damaged_figures_are_found_where_they_are_read(tmp_path):
    made().keep_top(K).save(tmp_path / "kept")
    [file] = (tmp_path / "kept").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    kept = Attribution.load(tmp_path / "kept")
    place = content.find(kept.responses.figures.rows[3][0].table[3].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))
    kept = Attribution.load(tmp_path / "kept")
    assert kept.select([0, 1, 2]).influence("mean").isfinite().all()
    with pytest.raises(TrajectoryError, match=r"queries-000000\.safetensors is damaged"):
        kept.influence("variance")


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "10"])
def test_what_is_no_number_is_refused(k):
    with pytest.raises(AttributionError, match=r"keep_top=.*at least 1"):
        made().keep_top(k)
