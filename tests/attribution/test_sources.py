"""The variance of a crossed ensemble by source, from recording to the page; and that its runs are not independent."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dtda import (
    Attribution,
    Ensemble,
    TrajectoryRecorder,
    UnrolledDifferentiation,
    attribute,
    record,
    report,
    retrain,
    suggest_removals,
)
from lightning_dtda.errors import AttributionError, RetrainingError
from lightning_dtda.recording import CrossedSeeds
from lightning_dtda.recording.recording import checked_seeds
from lightning_dtda.recording.seeds import record_seeds
from lightning_dtda.reporting import find
from lightning_dtda.reporting.terminal import print_summary
from lightning_dtda.statistics import Mean
from lightning_dtda.statistics.variance_components import Crossed, components

EXAMPLES, QUERIES = 24, 4


class Regressor(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, inputs):
        return self.net(inputs)[:, 0]

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def tensors(number, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.prod(1) + 0.3 * torch.randn(number, generator=generator, dtype=torch.float64))


def loader():
    return DataLoader(tensors(EXAMPLES, 0), batch_size=4, shuffle=True)


def make():
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(max_epochs=3, accelerator="cpu", **quiet), Regressor(), loader()


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    root = tmp_path_factory.mktemp("crossed")
    seeds = CrossedSeeds(initialisation=5, order=4)
    assert record(make, TrajectoryRecorder(root), seeds, progress=False) == {}
    return Ensemble.open(root)


@pytest.fixture(scope="module")
def attribution(ensemble):
    return attribute(
        ensemble,
        Regressor(),
        loader(),
        queries=tensors(QUERIES, 1),
        measurement="prediction",
        estimator=UnrolledDifferentiation(horizon=None),
        progress=False,
    )


def test_the_split_is_that_of_the_measured_values(attribution):
    split = attribution.variance_by_source()
    assert split.parts == ("initialisation", "order", "rest")
    assert split.seeds == {"initialisation": 5, "order": 4}
    # runs are named after both seeds: 3 of the initialisation and 1 of the order make 1003
    names = [int(run.removeprefix("seed-")) for run in attribution.runs]
    crossed = Crossed.of({"initialisation": [n % 1000 for n in names], "order": [n // 1000 for n in names]})
    torch.testing.assert_close(split.variance, components(crossed, attribution.baseline.double()))
    assert (split.interval[0] <= split.variance.clamp_min(0)).all()
    assert (split.variance <= split.interval[1]).all()
    torch.testing.assert_close(split.share.sum(0), torch.ones(QUERIES, dtype=torch.float64))


def test_an_influence_on_a_part_is_what_the_split_without_the_example_says(attribution):
    before, after = attribution.variance_by_source(), attribution.variance_by_source(removed=[5])
    for number, name in enumerate(("initialisation_variance", "order_variance", "rest_variance")):
        influence = attribution.influence(name)
        torch.testing.assert_close(influence[:, 5], (after.variance - before.variance)[number])
        assert ((attribution.p_values(name) >= 0) & (attribution.p_values(name) <= 1)).all()


@pytest.mark.slow
def test_influences_on_parts_agree_with_retraining_of_the_same_runs(ensemble, attribution):
    truth = retrain(
        Regressor(),
        loader(),
        ensemble=ensemble,
        subsets=[[n] for n in range(EXAMPLES)],
        seeds=[int(run.removeprefix("seed-")) for run in attribution.runs],
        removal="reweight",
        queries=tensors(QUERIES, 1),
        measurement="prediction",
        progress=False,
    )
    crossed = Crossed.of(_seeds(attribution))
    before = components(crossed, truth.baseline)[..., None]
    real = components(crossed, truth.measurements.permute(1, 2, 0)) - before
    for number, name in enumerate(("initialisation_variance", "order_variance", "rest_variance")):
        both = torch.stack([attribution.influence(name).flatten(), real[number].flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.8, name


def _seeds(attribution):
    recorded = [attribution.about["seeds"][run] for run in attribution.runs]
    return {source: [of_run[source] for of_run in recorded] for source in recorded[0]}


@pytest.mark.parametrize(
    "infer",
    [
        lambda attribution: attribution.influence("variance"),
        lambda attribution: attribution.influence("wasserstein"),
        lambda attribution: attribution.standard_error(Mean("trimmed")),
        lambda attribution: attribution.p_values("spread"),
        lambda attribution: attribution.joint_standard_error(),
        lambda attribution: attribution.joint_influence(),
        lambda attribution: attribution.keep_top(3),
        suggest_removals,
    ],
)
def test_runs_that_share_seeds_are_not_taken_for_independent_ones(attribution, infer):
    with pytest.raises(AttributionError, match=r"Take the 4 runs that share none: attribution\.independent\(\)"):
        infer(attribution)


def test_the_mean_has_the_standard_error_of_runs_that_share_seeds(attribution):
    # by hand, for one query and example
    changes = attribution.responses[:, 0, 5].double().numpy()
    names = np.array([int(run.removeprefix("seed-")) for run in attribution.runs])
    y = np.empty((5, 4))
    y[names % 1000, names // 1000] = changes
    rows, columns, mean = y.mean(1), y.mean(0), y.mean()
    squares = np.array(
        [
            4 * ((rows - mean) ** 2).sum() / 4,
            5 * ((columns - mean) ** 2).sum() / 3,
            ((y - rows[:, None] - columns + mean) ** 2).sum() / 12,
        ]
    )
    coefficients = np.array([1.0, 1.0, -1.0]) / 20
    if squares[0] < squares[2]:
        coefficients += np.array([-1.0, 0.0, 1.0]) / 20
    if squares[1] < squares[2]:
        coefficients += np.array([0.0, -1.0, 1.0]) / 20
    variance = coefficients @ squares
    freedom = 3  # of the order
    assert float(attribution.influence("mean")[0, 5]) == pytest.approx(mean)
    assert float(attribution.standard_error("mean")[0, 5]) == pytest.approx(variance**0.5)
    p = 2 * stats.t.sf(abs(mean) / variance**0.5, freedom)
    assert float(attribution.p_values("mean")[0, 5]) == pytest.approx(p)
    width = stats.t.ppf(0.975, freedom) * variance**0.5
    low, high = attribution.interval("mean")[:, 0, 5].tolist()
    assert (low, high) == pytest.approx((mean - width, mean + width))
    assert attribution.top(3)["standard_error"].gt(0).all()
    assert attribution.significant("mean").shape == (QUERIES, EXAMPLES)


def test_the_mean_is_that_of_all_runs_and_its_error_from_those_that_are_complete(attribution):
    without_a_run = attribution.without_runs(["seed-0000"])
    expected = without_a_run.responses[:].double().mean(0)
    torch.testing.assert_close(without_a_run.influence("mean"), expected)
    torch.testing.assert_close(
        torch.tensor(without_a_run.top(1)["influence"]), torch.tensor(without_a_run.top(1)["mean_influence"])
    )
    names = [int(run.removeprefix("seed-")) for run in attribution.runs]
    left = [n for n, name in enumerate(names) if name % 1000]  # 4 x 4 runs
    grid = Crossed.of({"initialisation": [names[n] % 1000 for n in left], "order": [names[n] // 1000 for n in left]})
    found = components(grid, attribution.responses[left].double()).clamp_min(0)
    # of the 19 runs, 3 have one initialisation and 4 each of the other four; 4 have one order and 5 the others
    shares = torch.tensor([9 + 4 * 16, 16 + 3 * 25, 19], dtype=torch.float64) / 19**2
    variance = (shares[:, None, None] * found).sum(0)
    torch.testing.assert_close(without_a_run.standard_error("mean"), variance.sqrt())
    # where most runs are not in a grid, as little is said as before
    few = attribution.without_runs([run for run in attribution.runs if run not in _CROSS])
    assert torch.allclose(few.influence("mean"), few.responses.double().mean(0))
    with pytest.raises(AttributionError, match=r"attribution\.independent\(\)"):
        few.standard_error("mean")


_CROSS = ("seed-0000", "seed-0001", "seed-1000", "seed-1001", "seed-0002", "seed-0003", "seed-2004", "seed-3004")
"""2 x 2 runs and four others."""


@pytest.mark.parametrize(
    "plan",
    [
        lambda attribution: attribution.runs_for_significance("mean"),
        lambda attribution: attribution.retrainings_needed(),
        lambda attribution: attribution.reliability(),
        lambda attribution: attribution.runs_for_stable_top(),
    ],
)
def test_plans_of_the_mean_need_independent_runs(attribution, plan):
    with pytest.raises(AttributionError, match=r"Take the runs that share none: attribution\.independent\(\)"):
        plan(attribution)


def test_independent_runs_share_no_seed(attribution):
    some = attribution.independent()
    assert some.runs == ("seed-0000", "seed-1001", "seed-2002", "seed-3003")
    assert some.interval("mean").shape == (2, QUERIES, EXAMPLES)
    assert some.independent() is some
    with pytest.raises(AttributionError, match="each combined with each"):
        some.variance_by_source()


def test_an_ordinary_ensemble_is_independent(attribution):
    ordinary = Attribution(attribution.baseline, attribution.responses, attribution.runs, attribution.queries)
    assert ordinary.independent() is ordinary
    with pytest.raises(AttributionError, match="each combined with each"):
        ordinary.influence("order_variance")


def test_a_part_has_no_interval_and_says_so(attribution):
    with pytest.raises(AttributionError, match=r"few seeds of a source\. Use the p-value"):
        attribution.interval("order_variance")


@pytest.mark.parametrize("planned", ["runs_for_significance", "reliability", "runs_for_stable_top"])
def test_numbers_of_runs_are_not_given_for_parts_which_depend_on_seeds(attribution, planned):
    with pytest.raises(AttributionError, match="it depends on the seeds of each source"):
        getattr(attribution, planned)("order_variance")


def test_the_advice_of_the_refusal_works(attribution, tmp_path):
    some = attribution.independent()
    assert report(some, tmp_path / "some.html", progress=False).exists()
    without_a_run = attribution.without_runs(["seed-0000"])
    assert without_a_run.variance_by_source().seeds == {"initialisation": 4, "order": 4}
    with pytest.raises(AttributionError, match="Leave order_variance out of the differences"):
        report(attribution, tmp_path / "parts.html", differences=["order_variance"], progress=False)


def test_a_number_of_repeated_runs_means_independent_ones(ensemble):
    def repeated(seeds):
        return retrain(
            Regressor(),
            loader(),
            ensemble=ensemble,
            subsets=[[0]],
            seeds=seeds,
            removal="reweight",
            queries=tensors(QUERIES, 1),
            measurement="prediction",
            progress=False,
        )

    assert repeated(3).seeds == (0, 1001, 2002)
    with pytest.raises(RetrainingError, match="Use 1 to 4, or give a list"):
        repeated(5)


def test_chaotic_runs_are_left_out_before_independent_ones_are_chosen(attribution):
    about = attribution.about | {"chaotic": ["seed-0000"]}
    some = Attribution(attribution.baseline, attribution.responses, attribution.runs, attribution.queries, about)
    assert "seed-0000" not in some.independent().runs
    assert len(some.independent().runs) == 4


def test_tables_have_the_parts(attribution):
    table = attribution.to_dataframe()
    parts = ["initialisation_variance", "order_variance", "rest_variance"]
    assert list(attribution.available_differences) == ["mean", *parts]
    assert len(table) == QUERIES * EXAMPLES
    of_first = table[(table["query"] == 0) & (table["example"] == 5)]["order_variance_influence"]
    assert float(of_first.iloc[0]) == pytest.approx(float(attribution.influence("order_variance")[0, 5]))
    assert list(attribution.top(2, "order_variance", query=0)["rank"]) == [1, 2]


def test_it_is_kept_on_disk(attribution, tmp_path):
    attribution.save(tmp_path / "stored")
    loaded = Attribution.load(tmp_path / "stored")
    torch.testing.assert_close(loaded.variance_by_source().variance, attribution.variance_by_source().variance)


def test_more_seeds_continue_a_stored_answer(tmp_path):
    def grown(orders):
        seeds = CrossedSeeds(initialisation=2, order=orders)
        assert record(make, TrajectoryRecorder(tmp_path / "runs"), seeds, progress=False) == {}
        return attribute(
            Ensemble.open(tmp_path / "runs"),
            Regressor(),
            loader(),
            queries=tensors(QUERIES, 1),
            output=tmp_path / "answer",
            progress=False,
        )

    few = grown(2)
    print_summary(few)  # two seeds are too few to test, but not to split
    assert few.variance_by_source().seeds == {"initialisation": 2, "order": 2}
    assert few.p_values("order_variance").isnan().all()
    assert grown(3).variance_by_source().seeds == {"initialisation": 2, "order": 3}


def test_a_source_whose_seeds_change_nothing_has_no_part(tmp_path, caplog):
    def unshuffled():
        return make()[0], Regressor(), DataLoader(tensors(EXAMPLES, 0), batch_size=4)

    def attributed(seeds):
        root = tmp_path / f"{len(seeds)}"
        assert record_seeds(unshuffled, TrajectoryRecorder(root), checked_seeds(seeds), crossed=seeds) == {}
        return attribute(Ensemble.open(root), Regressor(), loader(), queries=tensors(1, 1), progress=False)

    found = attributed(CrossedSeeds(initialisation=2, order=2))
    said = "Runs that differ only in the seed of the order have the same batches"
    assert said in caplog.text
    for ask in (lambda: found.variance_by_source(), lambda: found.influence("order_variance")):
        with pytest.raises(AttributionError, match=f"{said}, so it contributes nothing"):
            ask()
    assert find(found).sources is None
    # of three sources, the other two are split
    seeds = CrossedSeeds(initialisation=4, order=2, noise=4)
    about = found.about | {"seeds": {f"run-{of_run.run}": of_run.crossed for of_run in seeds.runs()}}
    cells = {
        f"run-{of_run.run}": 4 * of_run.crossed["initialisation"] + of_run.crossed["noise"] for of_run in seeds.runs()
    }
    values = torch.randn(16, 1, 2, generator=torch.Generator().manual_seed(0))[list(cells.values())]
    three = Attribution(values[..., 0], values[..., 1:], tuple(about["seeds"]), (0,), about)
    assert three.variance_by_source().parts == ("initialisation", "noise", "rest")
    # runs that differ in the order alone are the same run, so twice as many say no more
    one_order = three.without_runs([run for run, of_run in about["seeds"].items() if of_run["order"]])
    torch.testing.assert_close(three.standard_error("mean"), one_order.standard_error("mean"))
    assert len(three.independent().runs) == 4
    with pytest.raises(AttributionError, match=r"\AUnknown difference"):
        three.influence("wassserstein")
    with pytest.raises(AttributionError, match="such as initialisation_variance"):
        three.influence("wasserstein")


def test_page_terminal_and_json_say_where_the_variance_comes_from(attribution, tmp_path, capsys):
    report(attribution, tmp_path / "report.html", progress=False)
    page = (tmp_path / "report.html").read_text()
    assert "Where the variance comes from" in page
    assert page.count('class="bar"') == 3 * QUERIES
    print_summary(attribution)
    printed = " ".join(capsys.readouterr().out.split())
    assert "20 runs combine seeds (5 of the initialisation" in printed
    report(attribution, tmp_path / "report.json", progress=False)
    told = json.loads((tmp_path / "report.json").read_text())["variance_by_source"]
    assert len(told["parts"]) == QUERIES
    assert sum(part["share"] for part in told["parts"][0]) == pytest.approx(1)


def test_what_else_is_found_is_of_independent_runs(attribution):
    found = find(attribution)
    assert found.attribution.runs == attribution.independent().runs


def test_more_runs_are_more_seeds_of_each_source():
    seeds = {f"seed-{n:04d}": {"initialisation": n % 3, "order": [0, 5][n // 3]} for n in range(6)}
    made = Attribution(torch.randn(6, 1), torch.randn(6, 1, 4), tuple(seeds), (0,), {"seeds": seeds})
    (step,) = [each for each in find(made).next_steps if each.title.startswith("Record")]
    assert step.title == "Record 66 more runs, and attribute again"
    assert step.commands[0] == "record(..., seeds=CrossedSeeds(initialisation=9, order=[0, 5, 6, 7, 8, 9, 10, 11]))"


def test_an_example_that_sets_off_the_order_is_named():
    # without example 0, the effects of the order are gone
    seeds = {f"seed-{n:04d}": {"initialisation": n % 8, "order": n // 8} for n in range(64)}
    generator = torch.Generator().manual_seed(0)
    effects = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (8, 8, 64)]
    of_order = effects[1].repeat_interleave(8)
    baseline = effects[0].repeat(8) + 2 * of_order + 0.3 * effects[2]
    responses = 0.05 * torch.randn(64, 1, 30, generator=generator, dtype=torch.float64)
    responses[:, 0, 0] -= 1.9 * of_order
    made = Attribution(baseline[:, None], responses, tuple(seeds), (7,), {"seeds": seeds})
    (effect,) = [each for each in find(made).sources.effects if each.source == "order"]
    assert effect.name == "example 0"
    assert "the part of query 7's variance that comes from the order falls by 100 %" in effect.sentence
