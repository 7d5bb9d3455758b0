"""Opening files that nobody has checked."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

import gspn.data.images
from data_support import bomb, jpeg, png, quadrants
from gspn.data import MAX_PIXELS, CorruptImageError, load_image, to_rgb, trimmed


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


# --- A PIL image is treated like its file -----------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


FILES = {
    "transparent": lambda: saved(Image.new("RGBA", (4, 2), (255, 0, 0, 0))),
    "palette with bytes of transparency": lambda: saved(
        Image.new("RGB", (4, 2), "red").quantize(4), transparency=b"\x00\xff"
    ),
    "one transparent colour": lambda: saved(Image.new("RGB", (4, 2), (5, 6, 7)), transparency=(5, 6, 7)),
    "16 bits": lambda: saved(Image.fromarray(np.full((2, 4), 32896, np.uint16))),
    "16 bits, big end first": lambda: saved(Image.frombytes("I;16B", (4, 2), b"\x80\x80" * 8), "TIFF"),
    "one bit": lambda: saved(Image.new("1", (4, 2), 1)),
    "grey and alpha": lambda: saved(Image.new("LA", (4, 2), (0, 0))),
    "CMYK": lambda: saved(Image.new("CMYK", (4, 2), (9, 99, 0, 3)), "TIFF"),
    "YCbCr": lambda: saved(Image.new("YCbCr", (4, 2), (99, 9, 77)), "TIFF"),
    "turned": lambda: saved(quadrants(), exif=exif(6)),
    "animated": lambda: saved(
        Image.new("RGB", (4, 2), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (4, 2), "blue")]
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_pil_image_is_treated_like_its_file(kind) -> None:
    from gspn.tasks.classify.prediction import _open
    from gspn.tasks.diffusion.images import read_images

    file = FILES[kind]()
    loaded = load_image(file)
    opened = Image.open(file)
    assert loaded.mode == "RGB" and np.array_equal(to_rgb(opened), loaded)
    assert np.array_equal(_open("0", Image.open(file)), loaded)
    found, _ = read_images("some", [("a", file)], lambda one: (Image.open(one), 0))
    assert np.array_equal(found.to_pil(0), loaded)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (lambda: Image.new("LAB", (2, 2)), "LAB"),
        (lambda: Image.new("F", (2, 2)), "floating-point"),
        (lambda: Image.new("I", (2, 2), -1), "beyond 16 bits"),
        (lambda: Image.new("RGB", (0, 3)), "no pixels"),
        (lambda: Image.open(io.BytesIO(png()[:-40])), "damaged or truncated"),
    ],
)
def test_a_pil_image_without_a_meaning_is_named(image, says) -> None:
    with pytest.raises(CorruptImageError, match=f"^some: .*{says}"):
        to_rgb(image(), name="some")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SyntaxError, OSError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize("method", ["open", "load"])
def test_whatever_a_decoder_raises_is_a_corrupt_image(error, method, monkeypatch, tmp_path) -> None:
    def fail(*_, **__):
        raise error("in the decoder")

    (tmp_path / "a.avif").write_bytes(png())
    monkeypatch.setattr(*((Image, "open") if method == "open" else (Image.Image, "load")), fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    if error is MemoryError and method == "open":
        pytest.skip("a header takes no memory")
    with pytest.raises(CorruptImageError, match=r"a\.avif"):
        load_image(tmp_path / "a.avif")


def test_a_damaged_avif_is_a_corrupt_image(tmp_path) -> None:
    if "AVIF" not in gspn.data.images.FORMATS:
        pytest.skip("this Pillow opens no AVIF")
    good = saved(quadrants().resize((64, 64)), "AVIF").getvalue()
    damaged = good[: len(good) - 40] + bytes(40)
    (tmp_path / "a.avif").write_bytes(damaged)
    with pytest.raises(CorruptImageError, match=r"a\.avif"):
        load_image(tmp_path / "a.avif")


def test_an_endless_file_is_not_read(tmp_path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8 ")
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # which takes no room on the disk
    with pytest.raises(CorruptImageError, match=r"has 1,099,511,627,776 bytes"):
        load_image(path)


# --- Memory -----------------------------------------------------------------------------------------------------------


def transforms():
    from gspn.tasks.classify.config import AugmentConfig
    from gspn.tasks.classify.data import train_transform
    from gspn.tasks.classify.model import Preprocessing
    from gspn.tasks.diffusion.images import read_images
    from gspn.tasks.diffusion.transforms import image_transform

    preprocessing = Preprocessing((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    yield "generative", image_transform(64)
    yield "grey", image_transform(64, 1)
    yield "evaluation", preprocessing.transform()
    yield "training", train_transform(AugmentConfig(), preprocessing)
    yield "training on whole images", train_transform(AugmentConfig(crop="none"), preprocessing)
    yield "comparison", lambda image: read_images("some", [("a", 0)], lambda _: (image, 0), (64, 48))[0].pixels


@pytest.mark.parametrize(
    "name", ["generative", "grey", "evaluation", "training", "training on whole images", "comparison"]
)
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 20_000)])
def test_memory_is_bounded_for_any_shape(name, size, monkeypatch) -> None:
    pytest.importorskip("timm")
    resize = Image.Image.resize

    def bounded(image, size, *args, **options):
        # Pillow resizes in two passes, the width first.
        assert size[0] * max(image.height, size[1]) < 2_000_000, (image.size, size)
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    result = dict(transforms())[name](Image.new("RGB", size, "red"))
    assert result.shape[-2:] == ((64, 48) if name == "comparison" else (64, 64))


def test_usual_images_are_not_trimmed() -> None:
    for size in ((16, 1), (1, 16), (640, 480)):
        image = Image.new("RGB", size)
        assert trimmed(image) is image
    assert trimmed(Image.new("RGB", (170, 10))).size == (160, 10)
    assert trimmed(Image.new("RGB", (4000, 10)), width=20, height=1).size == (3200, 10)
