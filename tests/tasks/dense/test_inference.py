"""Prediction by windows: a partition of the image, in bounded memory, equal to the whole where the model is local."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gspn._errors import UsageError
from gspn.tasks.dense import predict
from gspn.tasks.dense.inference import Windows, predict_map, predict_rows
from gspn.tasks.dense.model import DenseModel
from tasks.dense.dense_runs import CLASSES, NUMBERS, tiny_model

CPU = torch.device("cpu")


class Pixelwise(DenseModel):
    """Looks at each pixel alone, so that windows cannot change the result."""

    def __init__(self, target=CLASSES):
        super().__init__(nn.Conv2d(3, target.outputs, 1), {}, target)

    def forward(self, images):
        self.seen = [*getattr(self, "seen", []), tuple(images.shape)]
        return self.core(images)


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (50, 70), (33, 200), (200, 33), (64, 64)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_windows_give_the_whole(size, overlap):
    torch.manual_seed(0)
    model, pixels = Pixelwise(), image(*size)
    whole = torch.cat([rows for _, rows in predict_rows(pixels, model, Windows(0), device=CPU)], 1)
    parts = list(predict_rows(pixels, model, Windows(32, overlap, 3), device=CPU))
    assert [top for top, _ in parts] == np.cumsum([0, *(rows.shape[1] for _, rows in parts)])[:-1].tolist()
    torch.testing.assert_close(torch.cat([rows for _, rows in parts], 1), whole)
    assert max(shape[0] for shape in model.seen[1:]) <= 3
    assert max(max(shape[2:]) for shape in model.seen[1:]) <= 32


def test_a_normalised_tensor_is_the_same_as_pixels():
    model, pixels = Pixelwise(), image(40, 60)
    tensor = CLASSES.normalization.apply(torch.from_numpy(pixels).permute(2, 0, 1))
    one, other = (predict_map(source, model, Windows(32), device=CPU) for source in (pixels, tensor))
    assert torch.equal(one, other) and one.shape == (40, 60)


def test_numbers_have_their_scale():
    model = Pixelwise(NUMBERS)
    nn.init.zeros_(model.core.weight)
    nn.init.constant_(model.core.bias, 1.5)
    values = predict_map(image(10, 10), model, Windows(8), device=CPU)
    assert values.dtype == torch.float32 and values.unique().tolist() == [100 + 1.5 * 20]


def test_no_more_than_the_rows_of_a_window_are_held():
    model = Pixelwise()
    sizes = [rows.shape for _, rows in predict_rows(image(500, 40), model, Windows(32, 0.25), device=CPU)]
    assert max(shape[1] for shape in sizes) <= 32 and sum(shape[1] for shape in sizes) == 500


def test_the_transition_between_windows_is_gradual():
    """Two windows that disagree: from the one to the other the output never jumps."""
    model = Pixelwise()
    calls = iter([0.0, 1.0])

    def disagree(images):
        return torch.full((len(images), 3, *images.shape[2:]), next(calls))

    options = {"device": CPU, "forward": disagree}
    [(_, rows)] = predict_rows(image(64, 96), model, Windows(64, 0.5, 1), **options)
    assert rows[0, 0, 0] == 0 and rows[0, 0, -1] == 1
    assert rows[0].diff(dim=1).abs().max() < 0.1


@pytest.mark.parametrize("size", [(64, 64), (37, 101), (1, 5)])
def test_models_take_any_size(size):
    model = tiny_model()
    assert model.stride == 32
    with torch.no_grad():
        outputs = model(torch.zeros(2, 3, *size))
    assert outputs.shape == (2, 3, *size) and outputs.isfinite().all()


def test_windows_out_of_range():
    for arguments in ((-1,), (32, 0.9), (32, 0.1, 0)):
        with pytest.raises(UsageError, match="overlap has to be"):
            Windows(*arguments)
    assert Windows(32, 0.0).starts(64) == [0, 32]
    assert Windows(32, 0.5).starts(33) == [0, 1]


def test_no_image_is_overwritten(tmp_path):
    model, own = tiny_model(), tmp_path / "images"
    own.mkdir()
    for name in ("a.png", "a.overlay.jpg", "b.png"):
        Image.new("RGB", (64, 64), "red").save(own / name)
    before = (own / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(own)
    for output in (own, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"a\.png is to be predicted, and would be overwritten"):
            predict([own / "a.png"], model, output)
    with pytest.raises(UsageError, match=r"would be written as .*a\.overlay\.png, which is a legend or of another"):
        predict([own / "a.png", own / "a.overlay.jpg"], model, tmp_path / "maps")
    assert before == (own / "a.png").read_bytes() and not (tmp_path / "maps").exists()
    both = predict([own / "a.png", own / "a.overlay.jpg"], model, tmp_path / "maps", overlays=False)
    assert [Path(one.map).name for one in both] == ["a.png", "a.overlay.png"]
    (own / "b.png").rename(own / "legend.png")
    for output, message in ((own, "overwritten by the legend"), (tmp_path / "maps", "which is a legend")):
        with pytest.raises(UsageError, match=message):
            predict([own / "legend.png"], model, output)


def test_an_encoder_of_one_size_says_so_and_takes_the_other_images(tmp_path):
    model = tiny_model(CLASSES, "model.name=swin_tiny_patch4_window7_224", 'model.kwargs={"embed_dim": 12}')
    for name, size in (("small", (40, 20)), ("large", (64, 64))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    small, large = predict([tmp_path / "small.png", tmp_path / "large.png"], model, tmp_path / "maps")
    assert "does not take 20 x 40 pixels at a time, of an image of 20 x 40" in small.broken
    assert small.map is None and large.broken is None and Path(large.map).is_file()
