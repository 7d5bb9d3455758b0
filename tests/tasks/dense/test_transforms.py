"""Crops and flips move image and map together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from gspn.tasks.dense import AugmentConfig
from gspn.tasks.dense.transforms import Normalization, RandomCrop, WholeImage, separate

PLAIN = Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels stay what they are


def located(height, width):
    """An image whose red and green are row and column, and a map of the same number."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)
    return Image.fromarray(pixels), (rows * 1000 + columns).astype(np.float32)


def drawn(transform, image, values, seed):
    torch.manual_seed(seed)
    pixels, maps = separate(transform(image, values)[None])
    return pixels[0], maps[0]


def test_a_crop_shows_one_place_in_both():
    image, values = located(90, 120)
    augment = AugmentConfig(scale=(1.0, 1.0), hflip=0.5, vflip=0.5)
    seen = set()
    for seed in range(40):
        pixels, maps = drawn(RandomCrop(32, augment, PLAIN), image, values, seed)
        assert pixels.shape == (3, 32, 32) and maps.shape == (32, 32)
        assert torch.equal(pixels[0].round() * 1000 + pixels[1].round(), maps)
        seen.add((bool(maps[0, 0] > maps[-1, 0]), bool(maps[0, 0] > maps[0, -1]), int(maps.min())))
    assert len({one[:2] for one in seen}) == 4 and len(seen) > 30  # every flip, and many places


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_resized_crop_shows_one_place_in_both(scale):
    image, values = located(120, 160)
    augment = AugmentConfig(scale=(scale, scale), hflip=0.0)
    pixels, maps = drawn(RandomCrop(32, augment, PLAIN), image, values, 3)
    assert set(maps.flatten().tolist()) <= set(values.flatten().tolist())  # no value is made up
    rows, columns = maps // 1000, maps % 1000
    assert int(rows.max() - rows.min()) == pytest.approx(32 / scale, abs=2)
    inside = slice(2, -2)
    for channel, expected in ((pixels[0], rows), (pixels[1], columns)):
        assert (channel - expected)[inside, inside].abs().max() <= 1.5


def test_a_crop_from_within_an_image_is_whole():
    image, values = located(90, 120)
    transform = RandomCrop(64, AugmentConfig(scale=(1.0, 1.5)), PLAIN)
    assert not any(drawn(transform, image, values, seed)[1].isnan().any() for seed in range(60))


def test_an_image_smaller_than_the_crop_is_continued():
    image, values = located(20, 50)
    pixels, maps = drawn(RandomCrop(32, AugmentConfig(scale=(1.0, 1.0), hflip=0.0), PLAIN), image, values, 0)
    assert maps[20:].isnan().all() and not maps[:20].isnan().any()
    assert torch.equal(pixels[:, 20:], torch.zeros(3, 12, 32))


def test_labelled_crops_are_preferred():
    image, values = located(64, 256)
    values[:, :200] = np.nan
    shares = []
    for least in (0.0, 0.5):
        augment = AugmentConfig(scale=(1.0, 1.0), least_labelled=least)
        maps = [drawn(RandomCrop(32, augment, PLAIN), image, values, seed)[1] for seed in range(30)]
        shares.append(sum(1 - float(one.isnan().float().mean()) for one in maps) / 30)
    assert shares[0] < 0.4 and shares[1] > 0.6


def test_a_whole_image_is_normalised_and_not_moved():
    image, values = located(5, 7)
    sample = WholeImage(Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))(image, values)
    assert sample.shape == (4, 5, 7)
    assert torch.allclose(sample[0], (torch.arange(5.0)[:, None].expand(5, 7) / 255 - 0.5) / 0.5)
    assert torch.equal(sample[3], torch.from_numpy(values))


def test_the_scale_is_drawn_evenly_in_its_logarithm():
    transform = RandomCrop(100, AugmentConfig(scale=(0.5, 2.0)), PLAIN)
    torch.manual_seed(0)
    drawn_scales = [math.log2(transform._draw(1000, 1000)[1]) for _ in range(2000)]
    assert np.mean(drawn_scales) == pytest.approx(0, abs=0.05)
    assert np.std(drawn_scales) == pytest.approx(2 / math.sqrt(12), abs=0.03)
