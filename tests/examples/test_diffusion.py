"""Rankings for a diffusion model: the small version of the example."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from torch.utils.data import Subset

from examples.diffusion import diffusion
from examples.diffusion.denoising import MLP, Diffusion, Digits, Images, UNet, denoising_loss
from examples.diffusion.diffusion import agreement, by_pixels, compare_rankings, draw, of_runs, rankings
from lightning_dtda import Attribution, Ensemble, TrajectoryRecorder, UnrolledDifferentiation, attribute, record


class FewDigits(Digits):
    """The first 96 digits."""

    def __init__(self):
        super().__init__(batch_size=32, examples=96)


def trainer(steps):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    averaged = [EMAWeightAveraging(decay=0.9)]
    return pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", limit_val_batches=0, callbacks=averaged, **quiet
    )


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    root = tmp_path_factory.mktemp("diffusion") / "runs"
    record(lambda: (trainer(150), Diffusion(MLP(width=24)), FewDigits()), TrajectoryRecorder(root), 4, progress=False)
    data = FewDigits()
    data.setup("fit")
    queries = Subset(data.train, [5, 17, 40, 60, 80])
    attribution = attribute(
        Ensemble.open(root),
        Diffusion(MLP(width=24)),
        data,
        queries=queries,
        measurement=denoising_loss,
        estimator=UnrolledDifferentiation(horizon=None),
    )
    return data, queries, attribution


@pytest.mark.slow
def test_an_image_is_the_one_that_its_own_loss_needs_most(attributed):
    _, queries, attribution = attributed
    itself = torch.tensor(queries.indices)
    influence = attribution.influence("mean")
    assert torch.equal(influence.argmax(1), itself)
    assert torch.equal(rankings(attribution)["wasserstein"].argmax(1), itself)


@pytest.mark.slow
def test_the_measurement_is_the_same_each_time_and_that_of_each_image_alone(attributed):
    data, _, attribution = attributed
    module, images = Diffusion(MLP(width=24)), data.train.tensors[0][:3]
    with torch.no_grad():
        together = denoising_loss(module, (images,))
        alone = torch.cat([denoising_loss(module, (image[None],)) for image in images])
    torch.testing.assert_close(together, alone)
    # an untrained network predicts little, and the noise has variance 1
    assert attribution.baseline.max() < 0.9 < float(together.min())


@pytest.mark.slow
def test_the_page_shows_images_and_scores(attributed):
    data, queries, attribution = attributed
    found = rankings(attribution) | {"pixels": by_pixels(queries, data.train, (5, 17, 40, 60, 80)).responses[0]}
    score = {"score": 0.5, "low": 0.4, "high": 0.6, "ceiling": 0.9}
    drawn = draw(queries, data.train, found, {"unrolled differentiation": {"mean": score, "wasserstein": score}})
    picture = np.array(drawn.data[0].z)
    assert picture.shape == (3 * 4 * 10 + 2 * 3, 4 * 10 + 10 * 10)
    assert -1 <= picture.min() < -0.9 < 0.9 < picture.max() <= 1
    np.testing.assert_allclose(picture[4:36:4, 4:36:4], queries[0][0][0])  # the query at four times the size


def simulated(varied):
    """Return responses of 40 examples in 16 runs: half of them move the mean; if varied, the others the spread."""
    generator = torch.Generator().manual_seed(0)
    means, noise = (torch.randn(size, 6, 40, generator=generator) for size in (1, 16))
    spreads = torch.ones(40)
    if varied:
        means[..., 20:], spreads[20:] = 0, 4
    names = tuple(f"seed-{seed:04d}" for seed in range(16))
    baseline = 100 * torch.arange(16.0)[:, None].expand(16, 6)  # far apart: responses do not change the order of runs
    return Attribution(baseline, 3 * means + spreads * noise, names, tuple(range(6)))


def test_rankings_that_differ_by_noise_alone_are_distinguished_from_others(monkeypatch):
    monkeypatch.setattr(diffusion, "SPLITS", 10)
    different, alike = (compare_rankings(simulated(varied)) for varied in (True, False))
    assert different["wasserstein, mean"]["excess"][1] > 0.2
    assert different["wasserstein, mean"]["p"] < 0.01
    # here one seed's ranking is the mean's with noise, so that they agree less, but not by more than noise
    crossed, own = (alike[pair]["between halves"][0][0] for pair in ("mean, one seed", "mean, itself"))
    assert crossed < own - 0.03
    assert abs(alike["mean, one seed"]["excess"][0]) < 0.03


def test_a_ranking_agrees_with_itself():
    attribution = simulated(varied=True)
    first = rankings(attribution)["mean"]
    np.testing.assert_allclose(agreement(first, first), [[1] * 6, [10] * 6])
    part = of_runs(attribution, [2])
    assert part.runs == (attribution.runs[2],)
    assert torch.equal(part.responses[0], attribution.responses[2])


def test_similar_images_are_those_with_the_same_pixels():
    data = FewDigits()
    data.setup("fit")
    queries = Subset(data.train, [5, 17, 40, 60, 80])
    assert by_pixels(queries, data.train, (5, 17, 40, 60, 80)).responses[0].argmax(1).tolist() == [5, 17, 40, 60, 80]


@pytest.mark.slow
def test_samples_look_more_like_digits_than_noise_does(attributed):
    data, _, _ = attributed
    torch.manual_seed(0)
    module = Diffusion(MLP(width=64))
    untrained = module.sample((64, 1, 8, 8))[..., 0].mean()
    trainer(400).fit(module, data)
    assert data.train.tensors[0][..., 0].mean() < -0.95  # nothing is drawn in the first column
    assert module.sample((64, 1, 8, 8))[..., 0].mean() < untrained - 0.25


@pytest.mark.slow
def test_a_unet_learns_from_a_folder_and_is_attributed(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(20):
        pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")

    def make():
        return trainer(3), Diffusion(UNet(channels=8)), Images(str(tmp_path), batch_size=6)

    record(make, TrajectoryRecorder(tmp_path / "runs"), 2, progress=False)
    data = Images(str(tmp_path), batch_size=6)
    data.setup("fit")
    assert (len(data.train), len(data.validation)) == (18, 2)
    attribution = attribute(
        Ensemble.open(tmp_path / "runs"),
        Diffusion(UNet(channels=8)),
        data,
        queries=data.validation,
        measurement=denoising_loss,
    )
    assert attribution.responses.shape == (2, 2, 18)
    assert attribution.responses[:].isfinite().all()
    assert attribution.responses[:].abs().max() > 0
