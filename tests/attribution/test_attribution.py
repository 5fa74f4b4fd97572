"""The result: predictions, influences, tables, and what is on disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_dtda import Attribution, suggest_removals
from lightning_dtda.errors import AttributionError, TrajectoryError
from lightning_dtda.statistics.differences import Mean
from lightning_dtda.trajectory.storage import read_json, write_json

RUNS, QUERIES, EXAMPLES = 10, 3, 7


@pytest.fixture
def attribution():
    generator = torch.Generator().manual_seed(0)
    baseline = 40 + torch.randn(RUNS, QUERIES, generator=generator)
    responses = 0.1 * torch.randn(RUNS, QUERIES, EXAMPLES, generator=generator)
    drift = {f"seed-{s:04d}": {"parameters": 1e-7 * s, "gradients": None} for s in range(RUNS)}
    about = {"measurement": "loss", "estimator": {"class": "E"}, "removal": "reweight", "drift": drift}
    return Attribution(baseline, responses, tuple(drift), (4, 8, 15), about)


def test_samples_are_computed_in_parts_of_one_query_or_of_many(attribution, monkeypatch):
    for module in ("responses", "attribution"):
        monkeypatch.setattr(f"lightning_dtda.attribution.{module}.AT_ONCE", 4 * 2 * RUNS * EXAMPLES)
    shapes = []

    class Noted(Mean):
        def interval(self, baseline, predicted, level):
            assert baseline.shape == (RUNS, predicted.shape[1], 1)
            shapes.append(tuple(predicted.shape[1:]))
            return super().interval(baseline, predicted, level)

    expected = attribution.interval("mean")  # which needs the memory of four samples
    torch.testing.assert_close(attribution.interval(Noted()), expected)
    assert shapes == [(2, EXAMPLES), (1, EXAMPLES)]
    for module in ("responses", "attribution"):
        monkeypatch.setattr(f"lightning_dtda.attribution.{module}.AT_ONCE", 4 * RUNS * (EXAMPLES - 1))
    shapes.clear()
    torch.testing.assert_close(attribution.interval(Noted()), expected)
    assert shapes == QUERIES * [(1, EXAMPLES - 1), (1, 1)]


def test_prediction_adds_the_responses_of_the_removed(attribution):
    predicted = attribution.predict(removed=[1, 5])
    expected = attribution.baseline + attribution.responses[..., 1] + attribution.responses[..., 5]
    torch.testing.assert_close(predicted, expected)
    assert torch.equal(attribution.predict(removed=[]), attribution.baseline)


@pytest.mark.parametrize("difference", ["mean", "variance", "wasserstein"])
def test_influence_of_a_set_of_one_is_that_of_the_example(attribution, difference):
    each = attribution.influence(difference)
    assert each.shape == (QUERIES, EXAMPLES)
    torch.testing.assert_close(attribution.influence(difference, removed=[2]), each[:, 2])
    torch.testing.assert_close(
        attribution.standard_error(difference, removed=[2]), attribution.standard_error(difference)[:, 2]
    )


def test_small_variance_changes_survive_large_measurements(attribution):
    # responses of 1e-4 on measurements of 40: in float32 the squares would cancel to noise
    small = Attribution(attribution.baseline, attribution.responses * 1e-3, attribution.runs, attribution.queries)
    x, r = small.baseline.double().numpy()[:, :, None], small.responses.double().numpy()
    # Var(x + r) - Var(x) = 2 Cov(x, r) + Var(r), written so that nothing large cancels
    covariance = ((x - x.mean(0)) * (r - r.mean(0))).sum(0) / (RUNS - 1)
    np.testing.assert_allclose(small.influence("variance"), 2 * covariance + r.var(0, ddof=1), rtol=1e-6)


def test_top_examples_are_the_largest_in_absolute_value(attribution):
    top = attribution.top(2, "variance", query=1)
    influence = attribution.influence("variance")[1]
    best = influence.abs().argsort(descending=True)[:2]
    assert top["example"].tolist() == best.tolist()
    assert top["query"].tolist() == [8, 8]
    assert top["rank"].tolist() == [1, 2]
    np.testing.assert_allclose(top["influence"], influence[best])
    np.testing.assert_allclose(top["mean_influence"], attribution.influence("mean")[1, best])
    np.testing.assert_allclose(top["spread_influence"], attribution.influence("spread")[1, best])
    np.testing.assert_allclose(top["standard_error"], attribution.standard_error("variance")[1, best])


def test_a_saved_attribution_is_the_one_that_is_loaded(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    loaded = Attribution.load(tmp_path / "saved")
    assert torch.equal(loaded.baseline, attribution.baseline)
    assert torch.equal(loaded.responses, attribution.responses)
    assert (loaded.runs, loaded.queries) == (attribution.runs, attribution.queries)
    assert loaded.about.items() >= attribution.about.items()


def test_a_saved_attribution_is_replaced_only_on_demand(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    fewer = Attribution(
        attribution.baseline[:2], attribution.responses[:2], attribution.runs[:2], attribution.queries, {}
    )
    with pytest.raises(AttributionError, match=r"holds an attribution.*overwrite=True"):
        fewer.save(tmp_path / "saved")
    assert Attribution.load(tmp_path / "saved").runs == attribution.runs
    fewer.save(tmp_path / "saved", overwrite=True)
    assert Attribution.load(tmp_path / "saved").runs == fewer.runs
    names = ["attribution.json", *(f"{run}.safetensors" for run in fewer.runs)]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names


def test_a_damaged_file_is_named(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    path = tmp_path / "saved" / "seed-0003.safetensors"
    sound = path.read_bytes()
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(TrajectoryError, match="seed-0003"):
            Attribution.load(tmp_path / "saved").predict([2])


@pytest.mark.parametrize(
    "ask",
    [
        lambda stored: stored.top(2, "wasserstein", query=1),
        lambda stored: stored.select([1]).reliability(),
        lambda stored: stored.joint_influence(queries=[1]),
        lambda stored: suggest_removals(stored, k=1, queries=[1]),
    ],
    ids=["top", "select", "joint_influence", "suggest_removals"],
)
def test_what_is_asked_of_a_query_reads_its_responses_alone(attribution, tmp_path, ask):
    attribution.save(tmp_path / "saved")
    stored = Attribution.load(tmp_path / "saved")
    ask(stored)
    assert {query for run in stored.responses.runs for query in run.compared.nonzero().flatten().tolist()} == {1}


def test_some_queries_have_the_influences_of_these(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    for whole in (attribution, Attribution.load(tmp_path / "saved")):
        some = whole.select([2, 0])
        assert some.queries == (15, 4)
        for difference in ("mean", "variance", "wasserstein"):
            torch.testing.assert_close(some.influence(difference), attribution.influence(difference)[[2, 0]])
    with pytest.raises(AttributionError, match="no query at position 3; positions are 0 to 2"):
        attribution.select([3])


def test_a_newer_format_is_refused(attribution, tmp_path):
    attribution.save(tmp_path / "saved")
    index = tmp_path / "saved" / "attribution.json"
    write_json(index, read_json(index) | {"format_version": 99})
    with pytest.raises(TrajectoryError, match="99"):
        Attribution.load(tmp_path / "saved")


def test_xarray_has_named_dimensions(attribution):
    dataset = attribution.to_xarray()
    assert dict(dataset.sizes) == {"run": RUNS, "query": QUERIES, "example": EXAMPLES}
    expected = attribution.responses[:, 2, 3].numpy()
    np.testing.assert_array_equal(dataset["responses"].sel(query=15, example=3), expected)
    np.testing.assert_allclose(dataset["variance_influence"], attribution.influence("variance"))


def test_dataframe_has_a_row_for_each_query_and_example(attribution):
    frame = attribution.to_dataframe()
    assert len(frame) == QUERIES * EXAMPLES
    row = frame[(frame["query"] == 8) & (frame["example"] == 4)].iloc[0]
    assert row["mean_influence"] == pytest.approx(attribution.influence("mean")[1, 4].item())
    assert row["wasserstein_standard_error"] == pytest.approx(attribution.standard_error("wasserstein")[1, 4].item())


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([7], "no training example 7"),
        ([-1], "-1"),
        ([2, 2], "twice"),
        (3, "removed=3 is not a list"),
        ([1.5], "not a list of the indices"),
        (torch.arange(EXAMPLES) > 3, "is a mask"),
    ],
)
def test_a_removal_that_cannot_be_is_refused(attribution, removed, message):
    with pytest.raises(AttributionError, match=message):
        attribution.influence("mean", removed=removed)


def test_few_runs_warn_and_one_run_has_no_variance(attribution):
    few = Attribution(attribution.baseline[:4], attribution.responses[:4], attribution.runs[:4], attribution.queries)
    with pytest.warns(UserWarning, match="Influences of 4 runs"):
        few.influence("mean")
    one = Attribution(attribution.baseline[:1], attribution.responses[:1], attribution.runs[:1], attribution.queries)
    with pytest.raises(AttributionError, match="needs 2 runs"):
        one.influence("variance")


def test_indices_may_be_a_tensor_or_an_array(attribution):
    expected = attribution.predict([1, 4])
    assert torch.equal(attribution.predict(torch.tensor([1, 4])), expected)
    assert torch.equal(attribution.predict(np.array([1, 4])), expected)


def test_top_refuses_what_is_not_there_and_warns_once(attribution):
    with pytest.raises(AttributionError, match="no query at position 77; positions are 0 to 2"):
        attribution.top(query=77)
    with pytest.raises(AttributionError, match="at least 1"):
        attribution.top(0)
    few = Attribution(attribution.baseline[:4], attribution.responses[:4], attribution.runs[:4], attribution.queries)
    with pytest.warns(UserWarning, match="Influences of 4 runs") as caught:
        few.top()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.fixture
def grouped(attribution):
    groups = [{"name": "web", "examples": [0, 1, 2]}, {"name": "books", "examples": [3]}]
    groups.append({"name": "rare", "examples": [2, 5]})
    about = {**attribution.about, "removals": groups, "step": 40}
    return Attribution(
        attribution.baseline, attribution.responses[..., :3], attribution.runs, attribution.queries, about
    )


def test_groups_are_removed_by_name_or_by_position(grouped):
    expected = grouped.baseline + grouped.responses[..., 0] + grouped.responses[..., 1]
    for removed in (["web", "books"], [0, "books"], [0, 1], torch.tensor([0, 1]), np.array([1, 0])):
        torch.testing.assert_close(grouped.predict(removed), expected)
    by_name = grouped.influence("variance", removed=["rare"])
    torch.testing.assert_close(by_name, grouped.influence("variance")[:, 2])
    assert repr(grouped) == "Attribution(10 runs, 3 queries, 3 groups, loss after step 40)"


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["web", "rare"], "Groups 'web' and 'rare' both contain training example 2, which can be removed only once"),
        ([1, "books"], "Groups 'books' and 'books' both contain training example 3"),
        (["movies"], "no group 'movies'; the groups are web, books, rare"),
        ("web", r"is a single name. Give a list, \['web'\]"),
        ([3], "no group at position 3; positions are 0 to 2"),
        (1, "not a list of the indices of groups"),
        ([True, False, False], "is a mask"),
    ],
)
def test_groups_that_cannot_be_removed_together_are_refused(grouped, removed, message):
    with pytest.raises(AttributionError, match=message):
        grouped.predict(removed)


def test_names_of_groups_are_no_examples(attribution):
    with pytest.raises(AttributionError, match="not a list of the indices of training examples"):
        attribution.predict(["web"])


def test_tables_name_groups_and_their_sizes(grouped):
    top = grouped.top(3, "variance", query=1)
    assert list(top.columns[:4]) == ["query", "rank", "removal", "size"]
    order = grouped.influence("variance")[1].abs().argsort(descending=True).tolist()
    assert top["removal"].tolist() == [("web", "books", "rare")[n] for n in order]
    assert top["size"].tolist() == [(3, 1, 2)[n] for n in order]
    dataset = grouped.to_xarray()
    assert dict(dataset.sizes) == {"run": RUNS, "query": QUERIES, "removal": 3}
    np.testing.assert_array_equal(
        dataset["responses"].sel(query=15, removal="books"), grouped.responses[:, 2, 1].numpy()
    )
    frame = grouped.to_dataframe()
    [row] = frame[(frame["query"] == 8) & (frame["removal"] == "rare")].itertuples()
    assert row.size == 2
    assert row.mean_influence == pytest.approx(grouped.influence("mean")[1, 2].item())


def test_saved_groups_are_those_that_are_loaded(grouped, tmp_path):
    grouped.save(tmp_path / "saved")
    loaded = Attribution.load(tmp_path / "saved")
    assert (loaded.removals, loaded.members, loaded.step) == (grouped.removals, grouped.members, 40)
    assert torch.equal(loaded.responses, grouped.responses)


def test_groups_are_as_many_as_responses(attribution):
    about = {"removals": [{"name": "web", "examples": [0]}]}
    with pytest.raises(AttributionError, match="names 1 groups; there are responses to 7"):
        Attribution(attribution.baseline, attribution.responses, attribution.runs, attribution.queries, about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"baseline": torch.ones(1, QUERIES)},
            r"shape \(1, 3\), but must be \(runs, queries\) = \(10, 3\)",
        ),
        ({"responses": torch.ones(RUNS, QUERIES)}, r"responses has shape .* must be \(runs, queries, removals\)"),
        ({"responses": torch.ones(RUNS, QUERIES, 2).long()}, "responses has data type torch.int64"),
        ({"baseline": np.ones((RUNS, QUERIES))}, "baseline is of type ndarray, but must be a tensor"),
        ({"responses": torch.ones(RUNS, QUERIES, 0)}, "at least one run, one query and one removal"),
        ({"runs": ("seed-0000",) * RUNS}, "has a name twice"),
        ({"runs": ("a/b", *map(str, range(RUNS - 1)))}, r"runs is not valid: .* at `\$\[0\]`"),
        ({"queries": ("first", 1, 2)}, r"queries is not valid: Expected `int`, got `str`"),
        ({"about": {"step": -1}}, r"about is not valid: .* at `\$.step`"),
        ({"about": {"removals": [{"name": "a"}]}}, "missing required field `examples`"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_once(attribution, change, message):
    with pytest.raises(AttributionError, match=message):
        replace(attribution, **change)


def test_what_is_not_a_number_is_known_as_such_and_leaves_the_others_alone(attribution):
    expected = attribution.influence("mean")
    responses = attribution.responses.clone()
    responses[3, 1, 2] = torch.nan
    found = replace(attribution, responses=responses).influence("mean")
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    found[1, 2] = expected[1, 2]
    torch.testing.assert_close(found, expected)


def test_arrays_of_a_training_in_bfloat16_have_single_precision(attribution):
    coarse = replace(attribution, baseline=attribution.baseline.bfloat16(), responses=attribution.responses.bfloat16())
    table = coarse.to_xarray()
    assert table.responses.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(table.baseline.values), coarse.baseline.float())
