"""Thumbnails: what is taken for an image, and the PNG files as Pillow reads them."""

import io

import numpy as np
import pytest
import torch

from lightning_dtda.attribution.gallery.pictures import as_image, figure_png, png, thumbnail

Image = pytest.importorskip("PIL.Image", reason="Pillow, which reads the PNG files")


def read(content):
    return np.array(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_another_reader_finds_the_same_pixels(channels):
    pixels = torch.randint(256, (channels, 7, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = read(png(pixels)).reshape(7, 11, channels)
    assert np.array_equal(found, pixels.permute(1, 2, 0).numpy())


def test_small_images_are_enlarged_crisply():
    digit = torch.arange(64, dtype=torch.float64).reshape(8, 8)  # scaled by its own range
    expected = (digit / 63 * 255).round().repeat_interleave(12, 0).repeat_interleave(12, 1)
    assert np.array_equal(read(thumbnail(as_image(digit))), expected)


def test_large_images_are_averaged_and_keep_their_shape():
    pixels = torch.zeros(3, 200, 100, dtype=torch.uint8)
    pixels[0, 100:] = 200
    found = read(thumbnail(as_image(pixels)))
    assert found.shape == (96, 48, 3)
    assert found[:47].max() == 0
    assert (found[49:] == [200, 0, 0]).all()
    assert read(thumbnail(as_image(np.zeros((3000, 1000), np.uint8)))).shape == (96, 32)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([0.0, 0.25, 1.0]), [0, 64, 255]),  # in [0, 1]: as they are
        (torch.tensor([0.0, 0.25, 0.5]), [0, 64, 128]),
        (torch.tensor([-1.0, 0.0, 1.0]), [0, 128, 255]),  # others by their own range
        (torch.tensor([10, 20, 30]), [0, 128, 255]),
        (torch.tensor([10, 20, 30], dtype=torch.uint8), [10, 20, 30]),
        (torch.tensor([True, False, True]), [255, 0, 255]),
        (torch.tensor([5.0, 5.0, 5.0]), [0, 0, 0]),
        (torch.tensor([torch.nan, torch.inf, 1.0]), [0, 0, 255]),
    ],
)
def test_brightness(values, expected):
    found = read(thumbnail(as_image(values[:, None].expand(3, 2).repeat(2, 3))))
    assert found[[0, 17, 33], 0].tolist() == expected


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((8, 8), 1), ((1, 8, 8), 1), ((3, 8, 9), 3), ((8, 9, 3), 3), ((4, 8, 8), 4), ((8, 8, 1), 1)],
)
def test_shapes_of_images(shape, channels):
    for image in (torch.zeros(shape), np.zeros(shape, np.float32), np.zeros(shape, np.uint16)):
        assert len(as_image(image)) == channels


@pytest.mark.parametrize("shape", [(8,), (), (2, 8, 8), (3, 100), (2, 3, 8, 8), (0, 0)])
def test_shapes_of_other_things(shape):
    assert as_image(torch.zeros(shape)) is None


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LA"])
def test_images_of_pillow_in_any_mode(mode):
    image = Image.new("L", (20, 10), 100).convert(mode) if mode != "I;16" else Image.new(mode, (20, 10), 100)
    assert read(thumbnail(as_image(image))).shape[:2] == (40, 80)


def test_figures_are_images_and_are_closed():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(8, 6))
    assert read(figure_png(figure)).shape[:2] == (240, 320)
    assert not pyplot.get_fignums()
    assert figure_png(object()) is None
