"""What attribute shows beside the influences: which items, how, and where they are stored."""

import random
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, attribute
from lightning_dtda.attribution import Gallery, Shown
from lightning_dtda.attribution.gallery import filling, model_outputs
from lightning_dtda.attribution.gallery.filling import gallery_of, most_influential
from lightning_dtda.errors import AttributionError, TrajectoryError, UnknownFormatError
from lightning_dtda.estimators import GradientDot, Identity, InfluenceFunctions
from lightning_dtda.trajectory.storage import read_json, write_json
from tests.attribution import regressors
from tests.attribution.regressors import DATA, QUERIES, module, recorded

ask = partial(regressors.ask, estimator=GradientDot())  # the fastest


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    def fit(module, data, *callbacks, **arguments):
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        pl.Trainer(callbacks=list(callbacks), accelerator="cpu", **quiet, **arguments).fit(module, data)

    return recorded(fit, tmp_path_factory.mktemp("runs"), seeds=3)


def as_text(item):
    return f"target {item[1]:.3f}"


def as_shown(item):
    return Shown(name="mine", label="own", fields=(("a", "b"),), prediction="said")


def fails(item):
    raise ValueError("broken")


def most_by_hand(attribution, k=5):
    """The positions of the k largest influences on each query, by each difference."""
    influences = [attribution.influence(name) for name in ("mean", "spread", "wasserstein")]
    return {n for each in influences for row in each.abs() for n in row.argsort(descending=True)[:k].tolist()}


@pytest.mark.filterwarnings("ignore:Influences of 3 runs")
def test_all_queries_and_the_most_influential_examples_are_shown(ensemble):
    attribution = ask(ensemble, queries=Subset(QUERIES, [4, 2]))
    gallery = attribution.gallery
    assert list(gallery.queries) == [4, 2]
    assert set(gallery.examples) == most_by_hand(attribution)
    for name in (4, 2):
        inputs, target, _ = QUERIES[name]
        shown = gallery.query(name)
        assert shown.label == f"{target:.4g}"
        assert shown.fields[1:] == tuple((f"x{n}", f"{value:.4g}") for n, value in enumerate(inputs.tolist(), start=1))
    assert gallery.examples[next(iter(gallery.examples))].prediction is None
    assert gallery.example(10**6) == gallery.query(0) == Shown()


def test_predictions_are_those_of_the_trained_models(ensemble):
    predictions = ask(ensemble, measurement="prediction").baseline.double()
    for query, shown in ask(ensemble).gallery.queries.items():
        mean, _, deviation, *over = shown.prediction.split()
        assert " ".join(over) == "over 3 runs"
        values = predictions[:, query]
        digits = len(mean.partition(".")[2])
        assert abs(float(mean) - values.mean()) <= 0.5 * 10.0**-digits
        assert abs(float(deviation) - values.std()) <= 0.5 * 10.0**-digits
        assert float(deviation) > 0
    assert "over" not in ask(ensemble[:1]).gallery.query(0).prediction


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([150.0, 152.0, 166.0], "156 ± 9 over 3 runs"),
        ([150.0, 151.0, 152.8], "151.3 ± 1.4 over 3 runs"),
        ([0.12, 0.15, 0.18], "0.15 ± 0.03 over 3 runs"),
        ([1e-12, 3e-12], "2e-12 ± 1.4e-12 over 2 runs"),
        ([2.0, 2.0], "2 ± 0 over 2 runs"),
        ([torch.nan, 1.0], "nan ± nan over 2 runs"),
        ([151.6], "152"),
    ],
)
def test_scalar_outputs_in_words(values, expected):
    of_runs = {str(run): torch.tensor([value]) for run, value in enumerate(values)}
    assert model_outputs.ModelOutputs(of_runs).describe(0, list(of_runs), []) == expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ([7] * 14 + [3] * 6, "7 in 14 of 20 runs, 3 in 6"),
        ([2, 2], "2 in all 2 runs"),
        ([1], "one"),
        ([0, 0, 0, 1, 1, 2, 3], "zero in 3 of 7 runs, one in 2, 2 in 1, others in 1"),
    ],
)
def test_classes_in_words(classes, expected):
    of_runs = {str(run): torch.tensor([float(number)]) for run, number in enumerate(classes)}
    outputs = model_outputs.ModelOutputs(of_runs, are_classes=True)
    assert outputs.describe(0, list(of_runs), ["zero", "one"]) == expected
    assert outputs.describe(1, list(of_runs), []) is None


class Digits(TensorDataset):
    classes = ("even", "odd")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(36, 2)

    def forward(self, images):
        return self.net(images.flatten(1))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_classes_of_a_classifier(fit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = Digits(torch.rand(20, 6, 6, generator=generator), torch.arange(20) % 2)
    for seed in range(3):
        pl.seed_everything(seed, verbose=False)
        fit(Classifier(), DataLoader(data, 5, shuffle=True), TrajectoryRecorder(tmp_path), max_epochs=1)
    runs = Ensemble.open(tmp_path)
    gallery = attribute(runs, Classifier(), data, queries=Subset(data, range(6)), progress=False).gallery
    for query, shown in gallery.queries.items():
        votes = []
        for run in runs:
            trained = Classifier()
            trained.load_state_dict(run.theta(run.steps))
            votes.append(int(trained(data[query][0][None]).argmax()))
        odd = sum(votes)
        alone = {0: "even in all 3 runs", 3: "odd in all 3 runs"}
        expected = {1: "even in 2 of 3 runs, odd in 1", 2: "odd in 2 of 3 runs, even in 1"} | alone
        assert shown.prediction == expected[odd]
        assert shown.label == Digits.classes[query % 2]
        assert shown.image is not None


def test_modules_without_such_an_output_predict_nothing(ensemble, monkeypatch):
    regressor = module()
    monkeypatch.setattr(type(regressor), "predict_step", lambda self, batch: torch.zeros(len(batch[0]), 4, 5))
    assert ask(ensemble).gallery.query(0).prediction is None


def test_the_number_of_outputs_is_bounded(ensemble, monkeypatch):
    monkeypatch.setattr(model_outputs, "MOST_PAIRS", 7)
    predicted = [shown.prediction is not None for shown in ask(ensemble).gallery.queries.values()]
    assert predicted == [True, True, False, False, False]


@pytest.mark.filterwarnings("ignore:Influences of 3 runs")
@pytest.mark.parametrize("keep_top", [None, 2])
def test_a_gallery_is_stored_and_shown_in_another_way_at_once(ensemble, tmp_path, monkeypatch, keep_top):
    arguments = {"output": tmp_path / "answer", "keep_top": keep_top}
    first = ask(ensemble, **arguments)
    assert first.path == tmp_path / "answer"
    assert Attribution.load(first.path).gallery == first.gallery
    assert len(first.gallery.queries) == len(QUERIES)
    monkeypatch.setattr(GradientDot, "estimate", lambda *_: pytest.fail("attributed again"))
    names = [f"patient {n}" for n in range(len(QUERIES))]
    again = ask(ensemble, show=f"{__name__}.as_text", query_names=names, **arguments)
    assert again.gallery.query(1) == Shown(
        "patient 1",
        first.gallery.query(1).label,
        text=as_text(QUERIES[1]),
        prediction=first.gallery.query(1).prediction,
    )
    assert again.gallery.examples.keys() == first.gallery.examples.keys()
    loaded = Attribution.load(first.path)
    assert loaded.gallery == again.gallery
    assert loaded.select([1]).trusted().gallery == loaded.gallery
    assert torch.equal(loaded.baseline, first.baseline)
    loaded.save(tmp_path / "copy")
    assert Attribution.load(tmp_path / "copy").gallery == loaded.gallery


def test_old_attributions_have_an_empty_gallery(ensemble, tmp_path):
    path = ask(ensemble, output=tmp_path / "answer").path
    (path / "gallery.json").unlink()
    assert Attribution.load(path).gallery == Gallery()


def test_another_answer_does_not_keep_the_gallery(ensemble, tmp_path):
    attribution = ask(ensemble, output=tmp_path / "answer")
    Attribution(attribution.baseline, attribution.responses[...], attribution.runs, attribution.queries).save(
        tmp_path / "answer", overwrite=True
    )
    assert Attribution.load(tmp_path / "answer").gallery == Gallery()


def test_several_dampings_have_a_gallery_each(ensemble, tmp_path):
    estimator = InfluenceFunctions(curvature=Identity())
    found = ask(ensemble, estimator=estimator, dampings=[0.1, 1.0], output=tmp_path, show=as_shown)
    for damping, attribution in found.items():
        assert attribution.path == tmp_path / f"damping-{damping}"
        loaded = Attribution.load(attribution.path).gallery
        assert loaded == attribution.gallery
        assert loaded.query(0) == as_shown(None)


def test_of_groups_the_first_members_are_shown(ensemble):
    groups = {"many": range(8), "few": [9, 10]}
    assert set(ask(ensemble, removals=groups).gallery.examples) == {0, 1, 2, 3, 9, 10}


def test_the_first_ranks_come_first_and_the_numbers_are_bounded(monkeypatch):
    responses = torch.zeros(1, 2, 40)
    responses[0, 0, [7, 3]], responses[0, 1, [5, 6]] = torch.tensor([9.0, -1.0]), torch.tensor([-8.0, 2.0])
    attribution = Attribution(torch.zeros(1, 2), responses, ("a",), (0, 1))
    assert most_influential(attribution)[:4] == [7, 5, 3, 6]
    monkeypatch.setattr(filling, "_MOST_EXAMPLES", 3)
    assert most_influential(attribution) == [7, 5, 3]
    monkeypatch.setattr(filling, "MOST_QUERIES", 1)
    assert most_influential(attribution)[:2] == [7, 3]


@pytest.mark.parametrize("show", [as_text, lambda item: item[0].repeat(6, 2), lambda item: {"a": item[0]}])
def test_a_function_may_return_texts_arrays_and_dictionaries(ensemble, show):
    shown = ask(ensemble, show=show).gallery.query(0)
    assert shown.text or shown.image or shown.fields
    assert shown.label == f"{QUERIES[0][1]:.4g}"  # from the item


def test_data_are_kept_out_by_showing_nothing(ensemble):
    gallery = ask(ensemble, show=lambda item: Shown()).gallery
    assert set(gallery.examples.values()) == {Shown()}
    assert {replace(shown, prediction=None) for shown in gallery.queries.values()} == {Shown()}


def test_a_function_may_return_a_figure(ensemble):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")

    def show(item):
        figure, axes = pyplot.subplots()
        axes.plot(item[0])
        return figure

    assert ask(ensemble, show=show).gallery.query(0).image.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("show", "message"),
    [
        (fails, r"training example 0, a tuple, fails \(ValueError\('broken'\)\). Return a Shown, a PIL image"),
        (lambda item: None, "returns None, a NoneType. Return a Shown"),
        (lambda item: item, r"returns \(tensor.*, a tuple. Return a Shown"),
        (lambda item: Shown(label=3), "returns a Shown that is not valid: .*label"),
        (lambda item: Shown(image=b"JPEG"), "image that is not a PNG file. Return the image itself"),
        (lambda item: Shown(image=b"\x89PNG\r\n\x1a\n" + bytes(2**20)), "more than 262,144. Return the image itself"),
        ("nowhere.at_all", "not the import path of a function"),
        ("as_text", "not the import path of a function"),
        (3, "no function. Give a function of an item"),
    ],
)
def test_wrong_functions_are_refused_before_the_work(ensemble, monkeypatch, show, message):
    monkeypatch.setattr(GradientDot, "estimate", lambda *_: pytest.fail("attributed"))
    with pytest.raises(AttributionError, match=message):
        ask(ensemble, show=show)


@pytest.mark.parametrize("names", [["a"], "abcde", [1, 2, 3, 4, 5], 5, {"a": 1}])
def test_wrong_names_are_refused(ensemble, names):
    with pytest.raises(AttributionError, match=r"query_names.*(Give one for each|give a list with a text)"):
        ask(ensemble, query_names=names)


def test_a_function_that_fails_later_costs_no_work(ensemble, caplog):
    def show(item):
        if torch.equal(item[0], QUERIES[3][0]):
            raise ValueError("late")
        return "shown"

    gallery = ask(ensemble, show=show).gallery
    assert gallery.query(2).text == "shown"
    assert gallery.query(3).text is None
    assert gallery.query(3).label
    assert "1 items of the data are shown otherwise, or not at all. The first: show, for query 3" in caplog.text


class Noisy(Dataset):
    """Draws random numbers for each item."""

    def __len__(self):
        return len(QUERIES)

    def __getitem__(self, index):
        random.random(), np.random.rand()
        return tuple(value + 0 * torch.rand(()) for value in QUERIES[index])


def test_random_states_are_left_alone(ensemble):
    attribution = ask(ensemble)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)

    def show(item):
        return torch.rand(8, 8)

    assert gallery_of(attribution, DATA, Noisy(), show).query(0).image is not None
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))


def test_data_sets_that_return_whole_batches(ensemble):
    class Batches(Dataset):
        def __len__(self):
            return len(QUERIES)

        def __getitem__(self, indices):
            rows = np.atleast_1d(indices)
            return {"x": QUERIES.tensors[0][rows], "text": [f"row {n}" for n in rows], "y": [1.0 for _ in rows]}

    attribution = replace(ask(ensemble), about={})
    gallery = gallery_of(attribution, None, DataLoader(Batches(), batch_size=None, sampler=range(5)))
    assert (gallery.query(3).text, gallery.query(3).label, len(gallery.query(3).fields)) == ("row 3", "1", 3)


@pytest.mark.filterwarnings("ignore:Influences of 3 runs")
def test_a_gallery_can_be_made_afterwards(ensemble, tmp_path):
    before = ask(ensemble, output=tmp_path / "answer")
    (tmp_path / "answer" / "gallery.json").unlink()
    attribution = Attribution.load(tmp_path / "answer")
    gallery = gallery_of(attribution, DATA, QUERIES)
    assert gallery.examples == before.gallery.examples
    assert [shown.prediction for shown in gallery.queries.values()] == [None] * len(QUERIES)

    gallery = gallery_of(before, DATA, QUERIES, as_text, examples=[11])
    assert gallery.query(0).text == as_text(QUERIES[0])
    assert gallery.query(0).prediction == before.gallery.query(0).prediction
    assert gallery.example(11).text == as_text(DATA[11])
    assert gallery.examples.keys() == before.gallery.examples.keys() | {11}

    assert not gallery_of(attribution, DATA).queries
    assert not gallery_of(attribution, None, QUERIES).examples
    with pytest.raises(AttributionError, match=r"data has 5 examples; .* trained on 12. Give those"):
        gallery_of(attribution, QUERIES, QUERIES)
    for others in (DATA, Subset(QUERIES, [0])):
        with pytest.raises(AttributionError, match="queries are not those of the attribution"):
            gallery_of(attribution, DATA, others)


def test_damaged_galleries_are_refused(ensemble, tmp_path):
    path = ask(ensemble, output=tmp_path / "answer").path / "gallery.json"
    content = read_json(path)
    write_json(path, content | {"format_version": 99})
    with pytest.raises(UnknownFormatError, match=r"format version 99; .* Delete it, and attribute again"):
        Attribution.load(path.parent)
    write_json(path, content | {"queries": {"0": {"image": "SlBFRw=="}}})
    with pytest.raises(TrajectoryError, match=r"queries 0, has an image that is not a PNG file. Delete it"):
        Attribution.load(path.parent)
    for wrong in ({"0": {"label": 3}}, {"zero": {}}, [], None):
        write_json(path, content | {"examples": wrong})
        with pytest.raises(TrajectoryError, match=r"is not valid: .* Delete it, and attribute again"):
            Attribution.load(path.parent)
    path.unlink()
    assert Attribution.load(path.parent).gallery == Gallery()
    assert ask(ensemble, output=path.parent).gallery.queries
