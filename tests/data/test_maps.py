"""Images with maps: the formats of maps, what is refused, folders and rows."""

from __future__ import annotations

import io
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_support import bomb, quadrants

pytest.importorskip("timm", reason="needs gspn[train]")
from gspn._errors import UsageError
from gspn.data import CorruptImageError, MapClasses, MapRule, load_map, open_maps, to_rgb
from gspn.data.maps.base import read_classes
from gspn.data.maps.hub import MappedRows

NAMES = ("sky", "road", "car")
CLASSES = MapRule(MapClasses(NAMES), ignore=255)
VALUES = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
EXPECTED = [[0, 1, 2], [None, 2, 0]]


def listed(values):
    return [[None if np.isnan(value) else value for value in row] for row in values.tolist()]


def image_bytes(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def npy_bytes(values, **options):
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def palette(values):
    image = Image.fromarray(values).convert("P")
    image.putpalette([17 * i % 256 for i in range(768)])  # the colours say nothing
    return image


FORMATS = {
    "png": image_bytes(Image.fromarray(VALUES), "PNG"),
    "png_palette": image_bytes(palette(VALUES), "PNG"),
    "png_16": image_bytes(Image.fromarray(VALUES.astype(np.uint16)), "PNG"),
    "tiff": image_bytes(Image.fromarray(VALUES), "TIFF"),
    "tiff_32": image_bytes(Image.fromarray(VALUES.astype(np.int32)), "TIFF"),
    "tiff_float": image_bytes(Image.fromarray(VALUES.astype(np.float32)), "TIFF"),
    "bmp": image_bytes(Image.fromarray(VALUES), "BMP"),
    "pgm": image_bytes(Image.fromarray(VALUES), "PPM"),
    "npy": npy_bytes(VALUES.astype(np.int64)),
    "npy_fortran": npy_bytes(np.asfortranarray(VALUES)),
    "npy_half": npy_bytes(VALUES.astype(np.float16)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form):
    values = load_map(io.BytesIO(FORMATS[form]), CLASSES)
    assert values.dtype == np.float32 and listed(values) == EXPECTED


def test_one_bit():
    data = image_bytes(Image.fromarray(np.array([[True, False]])), "PNG")
    assert load_map(io.BytesIO(data), CLASSES).tolist() == [[1, 0]]


def test_first_and_scale():
    rule = MapRule(MapClasses(NAMES), ignore=None, first=1)
    assert listed(rule.apply(np.array([[0, 1, 3]]), "x")) == [[None, 0, 2]]
    metres = MapRule(None, ignore=0, scale=0.001)
    assert listed(metres.apply(np.array([[0, 500, 2000]], np.uint16), "x")) == [[None, 0.5, 2.0]]
    assert listed(metres.apply(np.array([[np.nan, 5]], np.float32), "x")) == [[None, np.float32(0.005)]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy_bytes(np.array([[0, 3]])), "value 3 in row 0, column 1 is none of the 3 classes, 0 to 2, and not the ign"),
        (npy_bytes(np.array([[0.0], [0.5]])), "value 0.5 in row 1, column 0 is none"),
        (npy_bytes(np.array([[np.inf]])), "value inf in row 0"),
        (image_bytes(quadrants(), "PNG"), "channels RGB; a map has one"),
        (image_bytes(quadrants(), "JPEG"), "not a map of a known format without loss"),
        (image_bytes(Image.fromarray(VALUES), "PNG")[:-30], "damaged or truncated"),
        (npy_bytes(VALUES)[:-1], "is truncated"),
        (npy_bytes(np.zeros((2, 2, 2))), r"array of \[2, 2, 2\]"),
        (npy_bytes(np.zeros((2, 2), complex)), "complex"),
        (npy_bytes(np.array([[print]]), allow_pickle=True), "object"),
        (npy_bytes(VALUES)[:20], "damaged header"),
        (pickle.dumps(VALUES), "not a map of a known format"),
        (bomb(20_000), "20000 x 20000 = 400,000,000 pixels|decompression bomb"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 9999999), }" + b" " * 40,
         "pixels are more|damaged header"),
        (b"", "not a map"),
    ],
)  # fmt: skip
def test_what_is_refused(data, message):
    with pytest.raises(CorruptImageError, match=message):
        load_map(io.BytesIO(data), CLASSES, name="label.png")


def npy_header(header, body=b"\0" * 64):
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode() + body


@pytest.mark.parametrize("header", [
    "(((((", "{", "{'descr':", "{1: 2, 'a': 3}", "-" * 4000 + "1",
    *(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"
      for shape in ("(-1, -5)", "(-1, 5)", "(5, -1)", "(True, 3)", "(0, 3)")),
])  # fmt: skip
def test_damaged_headers_of_arrays(header):
    with pytest.raises(CorruptImageError, match=r"damaged header|no pixels|is an array of"):
        load_map(io.BytesIO(npy_header(header)), CLASSES)


def png_of_bits(bits, row, width):
    """A grey PNG with a row of so few bits a pixel, which PIL does not write."""
    data = b"\x89PNG\r\n\x1a\n"
    header = width.to_bytes(4, "big") + b"\0\0\0\x01" + bytes([bits, 0, 0, 0, 0])
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")):
        part = kind + content
        data += len(content).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    return data


def tiff_of(values, bits, photometric):
    """A TIFF with a row of these bytes, which PIL does not write."""
    entries = {256: 8 * len(values) // bits, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1,
               279: len(values)}  # fmt: skip
    data = b"II*\0" + (8 + len(values)).to_bytes(4, "little") + bytes(values) + len(entries).to_bytes(2, "little")
    return data + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + bytes(4)


def grey_bmp(bits, colours):
    """A BMP with a palette of grey in order, which PIL does not write with these bits."""
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in colours)
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, bits, 0, 4, 0, 0, len(colours), 0)
    return struct.pack("<2sIHHI", b"BM", 58 + len(palette), 0, 0, 54 + len(palette)) + head + palette + b"\1\0\0\0"


@pytest.mark.parametrize(("data", "message"), [
    (b"P5\n3 1\n1\n\0\1\0", "a PGM with the largest value 1, to which decoders scale"),
    (b"P2\n3 1\n2\n0 1 2\n", "largest value 2"),
    (b"P5\n1 1\n300\n\0\1", "largest value 300"),
    (b"P1\n3 1\n0 1 0\n", "1;I"),
    (png_of_bits(4, b"\x01\x20", 3), r"samples \(L;4\) that decoders scale or invert"),
    (png_of_bits(2, b"\x1b", 4), "L;2"),
    (tiff_of([0x01, 0x20], 4, 1), "L;4"),
    (tiff_of([0, 1], 8, 0), "L;I"),
    (tiff_of([0x40], 1, 0), "1;I"),
    (grey_bmp(8, (0, 255)), "a grey BMP of 8 bits, which PIL misreads"),
    (grey_bmp(4, range(16)), "of 4 bits"),
])  # fmt: skip
def test_values_that_a_decoder_would_change_are_refused(data, message):
    with pytest.raises(CorruptImageError, match=message):
        load_map(io.BytesIO(data), MapRule(None))


def test_values_that_only_look_as_if_they_were_changed():
    for data, expected in (
        (b"P5\n2 1\n65535\n\0\1\1\0", [1, 256]),
        (b"P2\n2 1\n255\n1 2\n", [1, 2]),
        (png_of_bits(1, b"\x40", 2), [0, 1]),
        (tiff_of([1, 0, 0, 0, 0, 0, 0, 0x80], 32, 1), [1, 2**31]),
        (grey_bmp(1, (0, 255)), [0, 0]),
        (grey_bmp(8, range(256)), [1, 0]),
        (grey_bmp(4, (3, 2, 1)), [0, 1]),
    ):
        assert load_map(io.BytesIO(data), MapRule(None)).tolist() == [expected]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_orientation_is_that_of_the_image(form):
    exif = Image.Exif()
    exif[0x0112] = 8  # turned by a quarter
    grey = Image.fromarray(VALUES)
    shown = to_rgb(Image.open(io.BytesIO(image_bytes(grey, form, exif=exif))))
    values = load_map(io.BytesIO(image_bytes(grey, form, exif=exif)), CLASSES)
    assert listed(values) == listed(np.rot90(np.where(VALUES == 255, np.nan, VALUES)))
    assert values.shape == (shown.height, shown.width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale=0"),
        ({"scale": 10**400}, "scale=1000"),
        ({"scale": True}, "scale=True"),
        ({"first": True}, "first=True"),
        ({"ignore": 10**400}, "ignore=1000"),
        ({"scale": "x"}, "scale='x'"),
        ({"first": -1}, "first=-1"),
        ({"ignore": "sky"}, "ignore='sky'"),
    ],
)
def test_rules_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        MapRule(None, **options)


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets")


def write_folder(root: Path, splits=("train", "val"), count=3, inner=False) -> Path:
    for split in splits:
        for kind in ("images", "labels"):
            folder = root / kind / split if inner else root / split / kind
            (folder / "a").mkdir(parents=True)
            for i in range(count):
                if kind == "images":
                    quadrants().save(folder / "a" / f"{i}.jpg")
                else:
                    Image.fromarray(np.full((8, 16), i % 3, np.uint8)).save(folder / "a" / f"{i}.png")
    (root / "classes.txt").write_text("sky #0000ff\nroad #808080\ncar #ff0000\n")
    return root


@pytest.mark.parametrize("inner", [False, True], ids=["split_outside", "split_inside"])
def test_folder(tmp_path, inner):
    root = write_folder(tmp_path / "pets", inner=inner)
    dataset = open_maps("folder", "train", root=root)
    assert (len(dataset), dataset.classes, dataset.map_classes.colours[2]) == (3, list(NAMES), (255, 0, 0))
    (image, values), index = dataset[2]
    assert image.size == (16, 8) and values.tolist() == np.full((8, 16), 2.0).tolist() and index == 2
    assert [dataset.filename(i) for i in range(3)] == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    assert open_maps("folder", "validation", root=root).identity() == dataset.identity()  # the same names
    with pytest.raises(ValueError, match="test/images"):
        open_maps("folder", "test", root=root)
    # Neither split stands for the whole.
    write_folder(tmp_path / "only", splits=("val",), inner=inner)
    with pytest.raises(ValueError, match="train/images"):
        open_maps("folder", "train", root=tmp_path / "only")


def test_folder_without_splits(tmp_path):
    root = write_folder(tmp_path / "pets", splits=(".",))
    assert len(open_maps("folder", "train", root=root)) == 3
    with pytest.raises(ValueError, match="val/images"):
        open_maps("folder", "val", root=root)


def test_what_does_not_fit_in_a_folder(pets):
    (pets / "train" / "images" / "a" / "9.png").write_bytes(image_bytes(quadrants(), "PNG"))
    with pytest.raises(UsageError, match=r"1 of 4 images .* have no map .*a/9\.png"):
        open_maps("folder", "train", root=pets)
    label = pets / "train" / "labels" / "a" / "9.png"
    Image.fromarray(np.zeros((4, 16), np.uint8)).save(label)
    dataset = open_maps("folder", "train", root=pets)
    with pytest.raises(CorruptImageError, match="the image is 16 x 8 and its map 16 x 4"):
        dataset[3]
    label.unlink()
    os.mkfifo(label)
    with pytest.raises(UsageError, match=r"have no map.*1 pipe, socket or device"):
        open_maps("folder", "train", root=pets)


def test_a_map_without_an_image_is_counted(pets):
    Image.fromarray(np.zeros((8, 16), np.uint8)).save(pets / "val" / "labels" / "extra.png")
    with pytest.warns(match=r"1 map without an image \(extra\.png\)"):
        open_maps("folder", "val", root=pets)


def test_two_files_of_one_name(pets):
    (pets / "val" / "labels" / "a" / "0.npy").write_bytes(npy_bytes(np.zeros((8, 16), np.uint8)))
    with pytest.raises(UsageError, match="may not differ in the ending alone"):
        open_maps("folder", "val", root=pets)


def test_classes_are_named(pets, tmp_path):
    (pets / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"has no classes\.txt; .*unit=NAME"):
        open_maps("folder", "train", root=pets)
    assert open_maps("folder", "train", root=pets, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    numbers = open_maps("folder", "train", root=pets, unit="m", scale=0.5)
    assert numbers.classes == [] and numbers.map(2).max() == 1.0
    for text, message in (
        ("a\na\n", "'a' is there twice"),
        ("\n", "0 classes"),
        ("a #ff0000\nb\n", "1 of 2 classes have a colour"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_classes(tmp_path / "classes.txt")
    for wrong in ("abc", [1], ["a", ""]):
        with pytest.raises(UsageError, match="class"):
            open_maps("folder", "train", root=pets, classes=wrong)


def test_classes_of_unusual_files(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("a  b\t#0000ff\n#ffffff #00ff00\nx#123456 #ff0000\n")
    classes = read_classes(file)
    assert classes.names == ("a  b", "#ffffff", "x#123456") and classes.colours[0] == (0, 0, 255)
    started = time.process_time()
    file.write_text("a" + " " * 100_000 + "b\n" + "\n".join(map(str, range(60_000))))
    assert len(read_classes(file).names) == 60_001
    assert time.process_time() - started < 5  # a time that grew with the square would be minutes


def test_rows_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "photo": [{"bytes": image_bytes(quadrants(), "PNG"), "path": None} for _ in range(4)],
        "mask": [{"bytes": image_bytes(Image.fromarray(np.full((8, 16), i, np.uint8)), "PNG"), "path": None}
                 for i in range(4)],
        "n": [1, 2, 3, 4],
    }  # fmt: skip
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image(), "n": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    name = f"hfds/{tmp_path / 'rows'}"
    columns = {"image_column": "photo", "map_column": "mask"}
    dataset = open_maps(name, "train", classes=list(NAMES), **columns)
    (image, values), _ = dataset[2]
    assert image.size == (16, 8) and set(values.flat) == {2.0}
    with pytest.raises(CorruptImageError, match="value 3 in row 0"):
        dataset.map(3)
    rows["mask"][0] = {"bytes": None, "path": "/etc/hostname"}  # a path is part of the data
    foreign = MappedRows(datasets.Dataset.from_dict(rows, features=features), "rows", classes=["a"], **columns)
    with pytest.raises(CorruptImageError, match="is not a file of this data set"):
        foreign.map(0)
    with pytest.raises(ValueError, match="pass classes="):
        open_maps(name, "train", **columns)
    with pytest.raises(ValueError, match="is not a column"):
        open_maps(name, "train", classes=["a"])
    with pytest.raises(ValueError, match="of type"):
        open_maps(name, "train", classes=["a"], image_column="photo", map_column="n")


def test_unknown_names_and_options(pets):
    with pytest.raises(ValueError, match=r"unknown mapped data set name='erth'\. Did you mean 'earth'"):
        open_maps("erth")
    with pytest.raises(ValueError, match="colour='x' does not apply"):
        open_maps("folder", "train", root=pets, colour="x")
