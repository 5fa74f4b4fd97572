"""Pruning by influence: the small version of the example."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from examples.pruning import pruning, vision
from examples.pruning.cifar10 import CIFAR10, ResNet9
from examples.pruning.vision import Augmented, ViT, flip
from examples.pruning.whole import FIGURES, Whole, measure

CONFIG = """
model:
  class_path: examples.pruning.vision.ViT
  init_args: {width: 16, depth: 1, heads: 2, learning_rate: 0.01}
data:
  class_path: examples.pruning.vision.Images
  init_args: {train: 200, validation: 100, batch_size: 20}
trainer:
  max_epochs: 8
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
"""


def chequered(classes=10, size=500):
    """Return images of 4 × 4 grey squares, those of the class, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (size,), generator=generator)
    squares = torch.rand(classes, 1, 4, 4, generator=generator).round()
    images = squares.repeat_interleave(7, 2).repeat_interleave(7, 3)[labels]
    return images + 0.2 * torch.randn(size, 1, 28, 28, generator=generator), labels


def test_labels_are_flipped_to_another_class():
    labels = torch.arange(200) % 10
    noisy, wrong = flip(labels, 0.15)
    assert int(wrong.sum()) == 30
    assert torch.equal(noisy != labels, wrong)


def test_augmentation_shifts_by_at_most_its_pixels():
    image = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    shifted = {tuple(Augmented(image, torch.zeros(1), 1)[0][0].flatten().tolist()) for _ in range(300)}
    expected = functional.pad(image[0, 0], (1, 1, 1, 1)).unfold(0, 4, 1).unfold(1, 4, 1).reshape(9, 16)
    assert shifted == set(map(tuple, expected.tolist()))


def test_a_query_measures_a_whole_set():
    images, labels = chequered(size=12)
    module = ViT(width=16, depth=1, heads=2).eval()
    query = Whole(torch.utils.data.TensorDataset(images, labels), FIGURES)
    found = measure(module, torch.utils.data.default_collate([query[0], query[1]]))
    scores = module(images)
    expected = functional.cross_entropy(scores, labels), (scores.argmax(1) != labels).float().mean()
    assert torch.allclose(found, torch.stack(expected))


def test_statistics():
    assert np.allclose(pruning.holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])
    differences = np.array([1.0, 2.0, 4.0, 5.0])
    mean, half, p = pruning.interval(differences)
    assert mean == 3.0
    assert half == pytest.approx(stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2)
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_cifar10_is_read_from_its_files(tmp_path):
    for number, name in enumerate([*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]):
        content = {b"data": np.full((4, 3072), number, np.uint8), b"labels": [number] * 4}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    data = CIFAR10(str(tmp_path), train=16, validation=4, batch_size=4)
    data.setup()
    assert data.test.tensors[1].tolist() == [5] * 4
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert ResNet9(width=4)(images).shape == (4, 10)
    assert len(labels) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Influences of 3 runs")
def test_influence_finds_wrong_labels_and_the_outcome_of_each_choice_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vision, "mnist", chequered)
    monkeypatch.setattr(pruning, "FOLDS", 2)
    (tmp_path / "config.yaml").write_text(CONFIG)
    make = partial(pruning.configured, tmp_path / "config.yaml", 0.15, None)
    data = make()[2]
    data.setup("fit")
    sets = pruning.choose(make, data, tmp_path, 0.1, runs=3)
    assert {len(removed) for removed in sets.values()} == {20}
    # of 20 random images three are wrong
    assert int(data.wrong[sets["mean over runs 0"]].sum()) >= 9
    measured = pruning.outcomes(make, data, sets, tmp_path, 2)
    assert measured["nothing 0"].shape == measured["cleanlab 0"].shape == (2, 2)
    pruning.show(0.15, data, sets, measured)
    assert "mean over runs - one run: accuracy" in capsys.readouterr().out
    assert len(pruning.draw({0.15: measured}).data) == 4 * len(sets)
