"""Opening files that nobody has checked."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from data_support import bomb, jpeg, png, quadrants
from gspn.data import MAX_PIXELS, CorruptImageError, load_image


def saved(image: Image.Image, form: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_format_is_rgb_and_decoded(form, tmp_path) -> None:
    path = tmp_path / f"image.{form.lower()}"
    quadrants().save(path, form)
    for file in (path, str(path)):
        image = load_image(file)
        path.touch()
        assert image.mode == "RGB" and image.size == (16, 8)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(quadrants())).mean() < 40  # JPEG at this size


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    assert np.asarray(load_image(saved(clear))).tolist() == [[[255, 255, 255], [255, 127, 127]]]
    assert load_image(saved(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert load_image(saved(palette)).getpixel((0, 0)) == (9, 9, 9)
    assert load_image(saved(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(saved(Image.new("RGB", (1, 1), (5, 6, 7)), transparency=(5, 6, 7))).getpixel((0, 0)) == (255,) * 3


def test_grey_of_sixteen_bits_keeps_its_range() -> None:
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(load_image(saved(Image.fromarray(grey))))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(load_image(saved(Image.fromarray(grey), "TIFF")))[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("values", [np.array([[1 << 20]], np.int32), np.array([[0.5]], np.float32)])
def test_values_without_a_range_are_refused(values) -> None:
    with pytest.raises(CorruptImageError, match="save it as 8 or 16 bits"):
        load_image(saved(Image.fromarray(values), "TIFF"), name="depth.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode) -> None:
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    image = load_image(saved(Image.new("RGB", (8, 8), "white").convert(mode), form))
    assert image.mode == "RGB"
    assert min(image.getpixel((4, 4))) > 250


@pytest.mark.parametrize(("orientation", "method"), [
    (1, None), (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270),
    (8, Image.Transpose.ROTATE_90),
])  # fmt: skip
def test_the_orientation_of_exif_is_applied(orientation, method) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = quadrants() if method is None else quadrants().transpose(method)
    assert np.array_equal(load_image(saved(quadrants(), exif=exif)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image() -> None:
    file = saved(quadrants(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", quality=95)
    assert load_image(file).size == (16, 8)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (png()[:-40], "damaged or truncated"),
        (jpeg()[: len(jpeg()) // 2], "damaged or truncated"),
        (b"not an image", "not an image of a known format"),
        (b"", "not an image of a known format"),
        (jpeg()[:200], "damaged header"),
        (png()[:20], "header|known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    ],
    ids=["png", "jpeg", "text", "empty", "jpeg header", "png header", "eps"],
)
def test_broken_files_are_named(data, says, tmp_path) -> None:
    path = tmp_path / "some.png"
    path.write_bytes(data)
    with pytest.raises(CorruptImageError, match=says) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker
    assert (again.name, again.reason) == (caught.value.name, caught.value.reason)


def test_a_missing_file_is_the_system_s_own_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 100_000], ids=["where PIL warns", "where PIL refuses"])
def test_bombs_are_refused_before_they_are_decoded(side, tmp_path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    with pytest.raises(ValueError, match="max_pixels") as caught:
        load_image(path)
    assert "bomb.png" in str(caught.value)
    assert f"{side * side:,}" in str(caught.value) or str(side * side) in str(caught.value)


def test_the_limit_is_the_caller_s() -> None:
    with pytest.raises(CorruptImageError, match=r"16 x 8 = 128 pixels are more than max_pixels=127"):
        load_image(io.BytesIO(png()), max_pixels=127)
    assert load_image(io.BytesIO(png()), max_pixels=128).size == (16, 8)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
