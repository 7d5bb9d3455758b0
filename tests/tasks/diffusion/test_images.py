"""Image files with their record, and sets of images."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gspn._errors import UsageError
from gspn.tasks.diffusion.image_grid import draw_grid, draw_prompts
from gspn.tasks.diffusion.images import ImageRecord, export_npz, is_sampled, open_images, read_record, save_png


@dataclass(frozen=True, kw_only=True)
class Record(ImageRecord):
    label: int
    stages: tuple[int, ...] = (1, 2)


RECORD = Record(index=3, seed=1, height=8, width=8, steps=2, guidance=1.5, scheduler="DDIM", label=1)


@pytest.fixture
def sampled(tmp_path):
    """A folder of images that say which class they were sampled for."""
    rng = np.random.default_rng(0)
    for i in range(12):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        record = replace(RECORD, index=i, label=i % 3)
        save_png(record.path(tmp_path / "sampled"), image, record)
    save_png(tmp_path / "sampled" / "grid.png", Image.new("RGB", (99, 99)))
    return tmp_path / "sampled"


def test_a_file_holds_its_record(sampled):
    path = sampled / "00003.png"
    with Image.open(path) as image:  # as version 0.1 wrote it
        assert json.loads(image.text["gspn"])["guidance"] == 1.5
    assert read_record(path)["label"] == 0 and read_record(path)["stages"] == [1, 2]
    record = replace(RECORD, label=0)
    assert is_sampled(sampled, record)
    assert not is_sampled(sampled, replace(record, seed=2)) and not is_sampled(sampled, replace(record, index=12))
    content = path.read_bytes()
    path.write_bytes(content[:-30])  # the text is whole, the pixels are not
    assert read_record(path) == {} and not is_sampled(sampled, record)
    path.write_bytes(b"no image")
    assert read_record(path) == {} and read_record(sampled / "grid.png") == {}


def test_export_and_read_again(sampled, tmp_path):
    images = open_images(sampled)
    export_npz(images, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 3) and archive["arr_1"].tolist() == [0, 1, 2] * 4
    again = open_images(tmp_path / "samples.npz")
    assert torch.equal(again.pixels, images.pixels) and again.labels == images.labels
    assert again.digest() == images.digest()


def test_folders_of_classes_broken_images_and_sizes(tmp_path):
    for name, size in (("b/one.png", (8, 6)), ("a/two.png", (8, 6)), ("a/three.jpg", (8, 6))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / name)
    (tmp_path / "a" / "zero.png").write_bytes(b"not an image")
    found = open_images(tmp_path)
    assert found.pixels.shape == (3, 3, 6, 8) and found.labels == [0, 0, 1]
    assert len(found.broken) == 1 and "zero.png" in found.broken[0]
    Image.new("RGB", (4, 4)).save(tmp_path / "b" / "small.png")
    with pytest.raises(UsageError, match=r"small\.png is 4 x 4"):
        open_images(tmp_path)
    assert open_images(tmp_path, size=(5, 3)).pixels.shape == (4, 3, 5, 3)
    assert len(open_images(tmp_path, size=(5, 3), limit=3)) == 3  # of five files, the readable ones among the spread


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "float64"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "uint8 \\[N, H, W, 3\\]"),
        ({"other": np.zeros(2)}, "arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3)}, "arr_1"),
        *(
            ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": labels}, "arr_1 is .*; it has to be int64")
            for labels in (
                np.array([0.5, 1.5]),
                np.array([np.nan, 0]),
                np.array(["a", "b"]),
                np.array([1j, 0]),
                np.zeros(2, "datetime64[s]"),
                np.full(2, 2**63, np.uint64),
            )
        ),
        ({"arr_0": np.array([{}], dtype=object)}, "could run code"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "no images"),
    ],
)
def test_archives_that_are_wrong(tmp_path, content, message):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(UsageError, match=message):
        open_images(tmp_path / "bad.npz")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.npz", "nothing:train", "digits:middle"])
def test_sources_that_are_not_there(source):
    with pytest.raises(UsageError, match=source.partition(":")[0]):
        open_images(source)


def colours(image):
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()}


def test_grids_show_every_image():
    images = [Image.new("RGB", (8, 6), (i, 0, 200)) for i in range(5)]
    plain = draw_grid([images[:3], images[3:]])
    assert colours(plain) == {(i, 0, 200) for i in range(5)} | {(255, 255, 255)}
    # 8 x 6 becomes 48 x 36, with gaps of 8.
    assert plain.size == (8 + 3 * 56, 8 + 2 * 44) and plain.getpixel((8, 8 + 44)) == (3, 0, 200)
    named = draw_grid([images[:3], images[3:]], names=["cat", "a newt"], titles=["a", "b", "c"])
    assert named.width > plain.width and named.height > plain.height and colours(plain) < colours(named)
    assert draw_grid([images], captions=["12345"]).height == draw_grid([images]).height + 13


def test_prompts_are_wrapped_into_bands():
    rows = {name: [Image.new("RGB", (96, 96), (i, 0, base)) for i in range(5)] for name, base in (("A", 50), ("B", 99))}
    sheet = draw_prompts(rows, ["a red square", "b", "a very long prompt " * 9, "d", "e"], columns=2)
    assert {(i, 0, base) for i in range(5) for base in (50, 99)} < colours(sheet)
    assert sheet.height > 6 * 104
    assert draw_prompts({"": rows["A"]}, ["a"] * 5, columns=8).width == 8 + 5 * 104


def test_folders_know_the_names_of_their_classes(sampled, tmp_path):
    for name in ("1", "2", "10"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "folders" / name / "0.webp")
    found = open_images(tmp_path / "folders")
    assert found.classes == ["1", "10", "2"] and found.labels == [0, 2, 1]
    digits = open_images("digits:val", limit=4)
    assert digits.classes == [str(label) for label in digits.labels]
    assert set(open_images(sampled).classes) == {None}  # their record has a number only
    save_png(tmp_path / "named" / "0.png", Image.new("RGB", (8, 8)), Named(**{**vars(RECORD), "class_name": "cat"}))
    assert open_images(tmp_path / "named").classes == ["cat"]


@dataclass(frozen=True, kw_only=True)
class Named(Record):
    class_name: str


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"label": true}', '{"label": "x"}', "[]", "\x00"])
def test_records_that_nobody_sampled(text, tmp_path):
    info = PngInfo()
    info.add_text("gspn", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert open_images(tmp_path).labels == [-1]


def test_images_that_cannot_be_read_are_named_and_not_counted(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"\0\0\0\x18ftypheic")
    found = open_images(tmp_path)
    assert len(found) == 2 and [one.partition(":")[0] for one in found.broken] == ["b.png"]
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"has no images; 3 could not be read: a\.png: is not an image"):
        open_images(tmp_path)
