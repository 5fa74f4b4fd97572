"""Fine-tuning a sentence encoder, the example: its small version, with a random encoder of the same class."""

import importlib.util
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch.utils.data import DataLoader

for package in ("transformers", "peft", "datasets", "cleanlab"):
    pytest.importorskip(package)

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402

from examples.finetuning import finetuning  # noqa: E402
from examples.finetuning.finetuning import REMOVED, Study, make_trainer, run  # noqa: E402
from examples.finetuning.presentation import figure, print_scores, print_sentences  # noqa: E402
from examples.finetuning.reviews import ENCODER, FILE, Classifier, Reviews  # noqa: E402
from examples.finetuning.scores import confirm, holm, interval, precision, sizes  # noqa: E402
from lightning_dtda import Attribution, Ensemble, GroundTruth, TrajectoryRecorder, attribute  # noqa: E402


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder as ``save_pretrained`` leaves it."""
    path = str(tmp_path_factory.mktemp("encoder"))
    words = sorted({word for line in FILE.read_text(encoding="utf-8").splitlines() for word in line.split()})
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    return path


def record(module, data, root, seeds, **settings):
    for seed in range(seeds):
        pl.seed_everything(seed, verbose=False)
        trainer = make_trainer(3, "cpu", callbacks=[TrajectoryRecorder(root)], **settings)
        trainer.fit(module(), datamodule=data())
    return Ensemble.open(root)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Influences of 3 runs")
def test_the_example_runs_on_a_tiny_encoder(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "VALIDATION", 8)
    data = Reviews(encoder, sentences=25)
    module = partial(Classifier, encoder, learning_rate=1e-2)
    ensemble = record(module, partial(Reviews, encoder, sentences=25), tmp_path / "runs", 3)
    study = Study(ensemble, module(), data, partial(make_trainer, 3, "cpu"), tmp_path / "study")

    found = run(study, queries=2, seeds=3)

    influence = Attribution.load(tmp_path / "study" / "influence").select(range(8))
    spread = influence.baseline.std(0)
    assert sorted(found["asked"]) == sorted(spread.argsort(descending=True)[:2].tolist())
    for query, (chosen, random) in zip(found["asked"], found["removals"], strict=True):
        assert len(chosen) == len(random) == REMOVED
        left = influence.influence("mean")[query].clone()
        assert left[list(chosen)].min() > left[[k for k in range(25) if k not in chosen]].max()
    # the last row is the average over queries, seed by seed
    *rows, average = found["rows"]
    assert average["chosen"] == pytest.approx((rows[0]["chosen"] + rows[1]["chosen"]) / 2)
    # exact unrolling is another attribution of the same queries: it has the same baseline, under the same names
    attributions = found["attributions"]
    assert torch.allclose(attributions["influence"].baseline, attributions["exact"].baseline, atol=1e-5)
    assert len({each.queries for each in attributions.values()}) == 1
    assert found["sizes"]["influence"]["shared"] == [REMOVED, REMOVED]
    assert found["sizes"]["influence"]["gain"].gain == 0
    # a sentence's own loss rises without it: the order of queries and of training sentences is the same
    assert (found["suspicions"]["self-influence"] > 0).all()
    assert all(np.isfinite(rows).all() and rows.shape[1] == 25 for rows in found["suspicions"].values())
    assert all(0 < each["low"] <= each["score"] <= each["high"] for each in found["precision"].values())
    assert (tmp_path / "study" / "report.html").exists()
    results = found["rows"], ["a", "b"], found["sizes"], found["precision"]
    assert figure(*results).data
    print_sentences(found["asked"], attributions, data)
    print_scores(*results)
    printed = capsys.readouterr().out
    assert "cleanlab" in printed
    assert data.validation[found["asked"][0]]["text"] in printed


def test_wrong_labels_are_those_of_sentences_on_which_people_agree(encoder):
    data, right = Reviews(encoder, wrong=0.1), Reviews(encoder, wrong=0.0)
    data.setup("fit")
    right.setup("fit")
    turned = np.array(data.train["label"]) != np.array(right.train["label"])
    assert turned.tolist() == data.wrong.tolist()
    assert turned.sum() == 30
    assert (np.abs(np.array(data.train["rating"])[turned]) >= 1).all()
    assert not set(data.train["text"]) & set(data.validation["text"])


def test_only_adapters_and_head_are_trained(encoder):
    module = Classifier(encoder)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if not name.startswith("head")} == {
        name for name, _ in module.named_parameters() if "lora_" in name
    }
    assert len(trained) == 2 * 2 * 2 + 2
    assert all(layer.training for layer in module.modules())


def test_scores():
    wrong, generator = np.arange(40) < 8, np.random.default_rng(0)
    best = wrong + generator.normal(0, 0.01, (5, 40))
    found = precision({"best": best, "random": generator.normal(0, 1, (5, 40))}, wrong)
    assert found["best"]["score"] == 1
    assert found["random"]["high"] < 1
    assert found["random"]["less"][2] < 0
    assert found["random"]["p"] == found["random"]["holm"] < 0.05
    assert found["best"]["found"] == 8
    first, second = generator.normal(0.3, 1, 9), generator.normal(0, 1, 9)
    mean, low, high, p = interval(first - second)
    expected = ttest_rel(first, second)
    assert (mean, p) == pytest.approx(((first - second).mean(), expected.pvalue))
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval()))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_sizes_are_those_of_a_truth_made_for_it():
    # the truth follows from weights of the examples, of which one estimator says twice as much and one the opposite
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 30, generator=generator)
    removals = [
        (tuple(sorted(weights[query].argsort(descending=True)[:4].tolist())), (0, 1, query + 2)) for query in (0, 1)
    ]
    removed = tuple(each for pair in removals for each in pair)
    noise = torch.randn(6, 1, generator=generator)  # of a seed, in all its trainings alike
    real = torch.stack([weights[:, list(each)].sum(1) + noise for each in removed])
    seeds = tuple(range(1000, 1006))
    truth = GroundTruth(real, noise.expand(-1, 2), removed, (0, 1), seeds, seeds)
    runs = tuple(f"seed-{seed}" for seed in range(5))
    attributions = {
        name: Attribution(torch.zeros(5, 2), factor * weights.expand(5, -1, -1), runs, (0, 1))
        for name, factor in (("right", 1.0), ("double", 2.0), ("opposite", -1.0))
    }

    rows, found = confirm(truth, removals), sizes(truth, removals, attributions, draws=20)

    expected = [float(weights[query, list(pair[0])].sum()) for query, pair in enumerate(removals)]
    assert [row["chosen"].mean() for row in rows[:2]] == pytest.approx(expected)
    assert found["right"]["chosen"] == pytest.approx([*expected, np.mean(expected)])
    assert {name: each["ratio"] for name, each in found.items()} == {
        "right": pytest.approx((1, 1, 1)),
        "double": pytest.approx((0.5, 0.5, 0.5)),
        "opposite": pytest.approx((-1, -1, -1)),
    }
    assert [found[name]["shared"] for name in attributions] == [[4, 4], [4, 4], [0, 0]]
    assert found["right"]["evaluation"].scores["mean"].score == pytest.approx(1)
    assert found["opposite"]["gain"].gain == pytest.approx(-2)


@pytest.mark.skipif(importlib.util.find_spec(ENCODER) is None, reason=f"needs {ENCODER}")
def test_the_real_encoder_is_attributed(tmp_path):
    data = partial(Reviews, sentences=30)
    ensemble = record(Classifier, data, tmp_path / "runs", 1, limit_train_batches=2)
    module = data()
    module.setup("fit")
    queries = DataLoader(module.validation.select([0]), collate_fn=module.collate)
    attribution = attribute(ensemble, Classifier(), module, queries=queries, progress=False)
    assert attribution.responses.shape == (1, 1, 30)
    assert attribution.responses[:].abs().min() > 0
    assert ensemble[0].layout.size == 6 * 2 * 2 * 4 * 384 + 2 * 384 + 2
