"""Pictures with captions: four kinds, whatever their files hold."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

import gspn.data.captions_folder
import gspn.data.captions_shards
from data_support import bomb, jpeg, png, quadrants
from gspn.data import (
    BrokenImageError,
    BrokenImages,
    CaptionedPictures,
    EmojiCaptions,
    Seeded,
    SkipBroken,
    collate,
    open_captions,
)

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
NUMBERS = ("0", "1", "2", "3")
CAPTIONS = [("number 0", "no. 0"), ("number 1", "no. 1"), ("number 2", "no. 2"), ("number 3", "no. 3")]


# Four pictures, the third of which is cut off, in every form that is opened.


def picture(number: str) -> bytes:
    return png()[:-40] if number == "2" else png()


def text(number: str) -> bytes:
    return f"number {number}\n\n  no.   {number}\r\n".encode()


def beside(root: Path) -> Path:
    for number in NUMBERS:
        place = root / "deep" / "er" if number == "3" else root
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.PNG").write_bytes(picture(number))
        (place / f"{number}.txt").write_bytes(text(number))
    return root


def listed(root: Path, kind: str = "jsonl") -> Path:
    (root / "images").mkdir(parents=True)
    for number in NUMBERS:
        (root / "images" / f"{number}.png").write_bytes(picture(number))
    names = [f"images/{number}.png" for number in NUMBERS]
    if kind == "jsonl":
        rows = [{"file_name": name, "text": list(captions)} for name, captions in zip(names, CAPTIONS, strict=True)]
        (root / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    else:
        with (root / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["other", "file_name", "text"])
            writer.writerows(["a, b", name, one] for name, pair in zip(names, CAPTIONS, strict=True) for one in pair)
    return root


def shard(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def shards(root: Path) -> Path:
    for name, numbers in (("a", "01"), ("b", "23")):
        members = [(f"x/{n}.{kind}", data) for n in numbers for kind, data in (("png", picture(n)), ("txt", text(n)))]
        shard(root / f"{name}.tar", [("x/readme.txt", b"hello"), ("x/._0.png", b""), ("x/.png", b""), *members])
    return root


def rows(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "text": [datasets.Value("string")], "n": datasets.Value("int8")}
    )
    table = {
        "image": [{"bytes": picture(number), "path": None} for number in NUMBERS],
        "text": [list(captions) for captions in CAPTIONS],
        "n": [0] * 4,
    }
    stored = datasets.Dataset.from_dict(table, features=features)
    stored.with_format("numpy").save_to_disk(str(root / "saved"))  # the format is saved, too
    return root


KINDS = {
    "beside": ("folder", beside, "2.PNG"),
    "jsonl": ("folder", listed, "images/2.png"),
    "csv": ("folder", lambda root: listed(root, "csv"), "images/2.png"),
    "shards": ("wds", shards, "b.tar/x/2.png"),
    "rows": ("hfds/saved", rows, "hfds/saved/2"),
}


@pytest.fixture(params=[pytest.param(kind, marks=needs_datasets if kind == "rows" else ()) for kind in KINDS])
def opened(request, tmp_path) -> tuple[CaptionedPictures, str]:
    name, write, broken = KINDS[request.param]
    return open_captions(name, "train", root=write(tmp_path)), broken


def to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def test_a_sample_is_a_picture_and_its_index(opened) -> None:
    dataset, _ = opened
    assert len(dataset) == 4 and dataset.classes == []
    image, target = dataset[-1]
    assert image.mode == "RGB" and np.array_equal(image, quadrants())
    assert target == dataset.target(-1) == dataset.target(3) == 3
    assert [dataset.captions(index) for index in range(4)] == CAPTIONS
    assert dataset.captions(-4) == CAPTIONS[0]
    dataset.transform = to_tensor
    assert dataset[0][0].shape == (8, 16, 3)
    for method in (dataset.__getitem__, dataset.image, dataset.captions, dataset.target, dataset.filename):
        for index in (4, -5):
            with pytest.raises(IndexError, match=rf"index={index} is out of range for <.*4 pictures with captions>"):
                method(index)


def test_a_broken_picture_has_a_name_and_captions(opened) -> None:
    dataset, name = opened
    assert dataset.filename(2) == name
    assert dataset.filename(2, basename=True) == name.rpartition("/")[2] or dataset.name.startswith("hfds")
    with pytest.raises(BrokenImageError) as caught:
        dataset[2]
    assert caught.value.name == name and "truncated" in caught.value.reason
    assert dataset.captions(2) == CAPTIONS[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_picture_comes_with_its_own_index(opened, workers) -> None:
    dataset, name = opened
    dataset.transform = to_tensor
    for training, expected in ((True, [0, 1, 3, 3]), (False, [0, 1, -1, 3])):
        whole = Seeded(SkipBroken(dataset, training=training), seed=0)
        record = BrokenImages(whole)
        targets = []
        for images, target, broken in DataLoader(whole, batch_size=2, num_workers=workers, collate_fn=collate):
            assert images.shape == (2, 8, 16, 3)
            record.add(broken)
            targets += target.tolist()
        assert targets == expected
        assert record.names == {2: name}
        assert "truncated" in record.summary()


def test_workers_that_are_started_anew_read_the_same(tmp_path) -> None:
    sets = []
    for kind, (name, write, _) in KINDS.items():
        if kind != "rows" or importlib.util.find_spec("datasets"):
            sets.append(open_captions(name, "train", root=write(tmp_path / kind), transform=to_tensor))
    whole = ConcatDataset([SkipBroken(dataset, training=True) for dataset in sets])
    loader = DataLoader(whole, batch_size=4, num_workers=2, multiprocessing_context="spawn", collate_fn=collate)
    batches = list(loader)
    assert len(batches) == len(sets) >= 4
    for images, targets, _ in batches:
        assert targets.tolist() == [0, 1, 3, 3]
        assert torch.equal(images, torch.stack([to_tensor(quadrants())] * 4))


def test_augmentation_is_a_function_of_the_index(opened) -> None:
    dataset, _ = opened
    dataset.transform = lambda image: random.random()
    seeded = Seeded(SkipBroken(dataset, training=True), seed=3)
    first = [seeded[index] for index in range(4)]
    assert [seeded[index] for index in (3, 2, 1, 0)] == first[::-1]
    assert len({one[0] for one in first}) == 4


def test_a_pickled_data_set_holds_no_open_file(opened) -> None:
    dataset, _ = opened
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.captions(3) == CAPTIONS[3] and np.array_equal(copy[3][0], quadrants())


# Emoji


@pytest.mark.parametrize(("split", "length"), [("train", 1546), ("test", 360), ("all", 1906)])
def test_emoji(split, length) -> None:
    dataset = open_captions("emoji", split, transform=np.asarray)
    assert len(dataset) == length and dataset[-1][0].shape == (64, 64, 3) and dataset[-1][1] == length - 1
    for index, record in enumerate(dataset.emoji.records):
        name, *more = dataset.captions(index)
        assert name == record.name
        assert all(caption.startswith(name + ", ") for caption in more)
        said = [word for caption in more for word in caption.removeprefix(name + ", ").split(", ")]
        assert set(said) <= set(record.keywords) and len(said) == len(set(said))
        assert not {*name.lower().split()} & {word.lower() for word in said}


def test_captions_of_emoji_do_not_change() -> None:
    assert open_captions("emoji", "val").captions(0) == (
        "grinning face with smiling eyes",
        "grinning face with smiling eyes, grin, happy, laugh",
        "grinning face with smiling eyes, lol, mouth, open",
        "grinning face with smiling eyes, smile",
    )
    dataset = EmojiCaptions("all")
    zany = next(index for index, record in enumerate(dataset.emoji.records) if record.name == "zany face")
    assert {"eye", "eyes"} <= set(dataset.emoji.records[zany].keywords)  # which say the same
    assert dataset.captions(zany) == ("zany face", "zany face, crazy, eye, goofy", "zany face, large, small")
    assert len({dataset.captions(index) for index in range(len(dataset))}) == len(dataset)
    assert dataset.filename(0).endswith(".webp")


# Which split


@pytest.mark.parametrize(("name", "write"), [("folder", beside), ("wds", shards)])
def test_the_root_stands_for_training_alone(name, write, tmp_path) -> None:
    write(tmp_path / "whole")
    assert len(open_captions(name, root=tmp_path / "whole")) == len(open_captions(name, "all", tmp_path / "whole")) == 4
    with pytest.raises(ValueError, match=r"not divided into splits, so it has no split='val'.*split='all'"):
        open_captions(name, "val", root=tmp_path / "whole")
    write(tmp_path / "parts" / "validation")
    assert len(open_captions(name, "val", root=str(tmp_path / "parts"))) == 4
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"no folder for split='{split}', but \['validation'\]"):
            open_captions(name, split, root=tmp_path / "parts")
    with pytest.raises(ValueError, match=r"split='\.\./whole' is no name of a split"):
        open_captions(name, "../whole", root=tmp_path / "parts")


def test_metadata_of_all_splits_may_lie_above_them(tmp_path) -> None:
    lines = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in "01":
            (tmp_path / split / f"{number}.png").write_bytes(png())
            lines.append(json.dumps({"file_name": f"{split}/{number}.png", "text": f"{split} {number}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    dataset = open_captions("folder", "val", root=tmp_path)
    assert [dataset.captions(index) for index in range(2)] == [("val 0",), ("val 1",)]
    assert len(open_captions("folder", "all", root=tmp_path)) == 4
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "val/2.png", "text": "a"}')
    assert len(open_captions("folder", "train", root=tmp_path)) == 2
    with pytest.raises(ValueError, match=r"lacks 1 pictures that its metadata names: 2\.png"):
        open_captions("folder", "val", root=tmp_path)


def test_metadata_counts_from_its_own_folder(tmp_path) -> None:
    listed(tmp_path / "one")
    listed(tmp_path / "two", "csv")
    dataset = open_captions("folder", root=tmp_path)
    assert dataset.filename(4) == "two/images/0.png" and dataset.captions(4) == dataset.captions(0) == CAPTIONS[0]


# Hostile and damaged folders


def lines(root: Path, *records: dict | str, name: str = "metadata.jsonl") -> Path:
    (root / "a.png").write_bytes(png())
    (root / name).write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    return root


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.png", "b/../../a.png", "b/../a.png", "\\\\host\\a.png", "..\\a.png", "C:\\a.png", "C:a.png"],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_does_not_leave_the_folder(name, kind, tmp_path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.png").write_bytes(png())
    if kind == "jsonl":
        lines(inner, {"file_name": name, "text": "a"})
    else:
        lines(inner, "file_name,text", f"{name},a", name="metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\..*line \d: file_name=.* leaves the folder"):
        open_captions("folder", root=inner)


def test_a_linked_folder_is_not_entered(tmp_path) -> None:
    beside(tmp_path / "secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    lines(root, {"file_name": "link/0.PNG", "text": "a"}, {"file_name": "a.png", "text": "b"})
    with pytest.raises(ValueError, match=r"lacks 1 pictures .*link/0\.PNG"):
        open_captions("folder", root=root)


def test_a_pipe_is_no_file(tmp_path) -> None:
    beside(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "0.txt.png")
    (tmp_path / "3.png").mkdir()
    (tmp_path / ".hidden.png").write_bytes(png())
    assert len(open_captions("folder", root=tmp_path)) == 4  # opening one would wait for ever


GOOD = {"file_name": "a.png", "text": "a"}


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (
            [{"file_name": "a.png", "caption": "a"}],
            r"line 1 has no caption_column='text'; it has 'file_name', 'caption'",
        ),
        ([GOOD, {"text": "a"}], r"line 2 has no 'file_name'; it has 'text'"),
        ([{"file_name": 3, "text": "a"}], r"file_name=3 names no file"),
        ([{"file_name": "a.png", "text": 3}], r"line 1: a caption is a string or a list of strings, not 3"),
        ([{"file_name": "a.png", "text": ["a", None]}], r"list of strings, not \['a', None\]"),
        ([{"file_name": "a.png", "text": {"a": 1}}], r"list of strings, not \{'a': 1\}"),
        (['{"file_name": "a.png", "text": "\\ud800"}'], r"line 1: .*is no valid text \(surrogates"),
        (["[1]"], r"line 1 is no JSON object"),
        (["{"], r"line 1 is no JSON: Expecting property name"),
        (["[" * 100_000], r"line 1 is no JSON: maximum recursion depth"),
        (['{"file_name": ' + "9" * 5000 + "}"], r"line 1 is no JSON: .*4300 digits"),
        ([{"file_name": "b.png", "text": "b"}, GOOD], r"lacks 1 pictures that its metadata names: b\.png"),
        ([{"file_name": "a.png", "text": " \n"}], r"1 of 1 pictures have no caption: a\.png"),
        ([{"file_name": "a.png", "text": []}], r"1 of 1 pictures have no caption: a\.png"),
        ([{"file_name": "a.png", "text": None}], r"1 of 1 pictures have no caption: a\.png"),
        ([{"file_name": "a.png", "text": "x" * (1 << 20)}], r"line 1 has more than 1,048,576 bytes"),
    ],
)
def test_bad_rows_of_jsonl(records, says, tmp_path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        open_captions("folder", root=lines(tmp_path, *records))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text\na", "has no 'file_name'"),
        ("file_name,caption\na.png,a", "has no caption_column='text'"),
        ("file_name,text\na.png,a, b", "line 2 has not the 2 fields of the first line; put quotes"),
        ("file_name,text\na.png", "line 2 has not the 2 fields"),
        ('file_name,text\na.png,"a', "is no CSV: unexpected end of data"),
        ("file_name,text\na.png,", "1 of 1 pictures have no caption"),
        ("file_name,text\na.png," + "x" * 200_000, "is no CSV: field larger than field limit"),
        ("file_name,text" + "," * 2_000_000, "line 1 has more than 1,048,576 bytes"),
        ("", "1 of 1 pictures have no caption"),
    ],
)
def test_bad_rows_of_csv(text, says, tmp_path) -> None:
    with pytest.raises(ValueError, match=says):
        open_captions("folder", root=lines(tmp_path, text, name="metadata.csv"))


def test_metadata_as_spreadsheets_write_it(tmp_path) -> None:
    root = lines(tmp_path, name="metadata.csv")
    (root / "metadata.csv").write_bytes('\ufefffile_name,title\r\n"./a.png","zwei,\r\nÄpfel"\r\n'.encode())
    assert open_captions("folder", root=root, caption_column="title").captions(0) == ("zwei, Äpfel",)
    (root / "metadata.csv").write_bytes("file_name,title\na.png,Äpfel".encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata.csv, line 2 is not UTF-8: byte 0xc4 .*save it as UTF-8"):
        open_captions("folder", root=root, caption_column="title")


def test_pictures_without_captions_are_named(tmp_path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png())
    (tmp_path / "7.txt").write_text("seven")
    (tmp_path / "6.txt").write_text("\n \n")
    says = r"7 of 8 pictures have no caption: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 2 more\. Write it into a \.txt"
    with pytest.raises(ValueError, match=says):
        open_captions("folder", root=tmp_path)


def test_captions_that_could_be_read_in_two_ways(tmp_path) -> None:
    root = lines(tmp_path, GOOD)
    (root / "a.txt").write_text("another")
    with pytest.raises(ValueError, match=r"a\.png has captions in a\.txt and in metadata"):
        open_captions("folder", root=root)
    (root / "a.txt").unlink()
    assert open_captions("folder", root=root).captions(0) == ("a",)
    (root / "metadata.csv").write_text("file_name,text\na.png,another")
    with pytest.raises(ValueError, match=r"holds both metadata\.jsonl and metadata\.csv"):
        open_captions("folder", root=root)


@pytest.mark.parametrize("name", ["folder", "wds"])
def test_caption_files_that_are_none(name, tmp_path) -> None:
    def write(data: bytes) -> Path:
        if name == "wds":
            return shard(tmp_path / "a.tar", [("a.png", png()), ("a.txt", data)])
        (tmp_path / "a.png").write_bytes(png())
        (tmp_path / "a.txt").write_bytes(data)
        return tmp_path

    assert open_captions(name, root=write("\ufeffÄpfel".encode())).captions(0) == ("Äpfel",)
    assert open_captions(name, root=write(b"a\x85b\x1cc".replace(b"\x85", b"\xc2\x85"))).captions(0) == ("a b c",)
    assert open_captions(name, root=write(b"a\rb\r\nc\n")).captions(0) == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 0xff at position 0"):
        open_captions(name, root=write("Äpfel".encode("utf-16")))
    with pytest.raises(ValueError, match=r"a\.txt has more than 65,536 bytes"):
        open_captions(name, root=write(b"a" * 65_537))
    assert len(open_captions(name, root=write(b"a" * 65_536)).captions(0)[0]) == 65_536


def test_metadata_of_no_end_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gspn.data.captions_folder, "_MAX_METADATA", 10)
    with pytest.raises(ValueError, match=r"metadata\.jsonl has more than 10 bytes"):
        open_captions("folder", root=lines(tmp_path, GOOD))


# Hostile and damaged shards


def test_patterns_and_single_shards(tmp_path) -> None:
    for split in ("train", "val"):
        for number in range(3):
            members = [("a.jpg", jpeg()), ("a.txt", f"{split} {number}".encode())]
            shard(tmp_path / f"{split}-{number:04}.tar", members)

    def said(split: str, root) -> list[str]:
        dataset = open_captions("wds", split, root=root)
        return [dataset.captions(index)[0] for index in range(len(dataset))]

    assert said("train", tmp_path) == ["train 0", "train 1", "train 2"]  # by the beginning of the name
    assert said("validation", tmp_path) == ["val 0", "val 1", "val 2"]
    assert len(said("all", tmp_path)) == 6
    assert said("train", f"{tmp_path}/train-{{0001..0002}}.tar") == ["train 1", "train 2"]
    assert said("val", f"{tmp_path}/{{split}}-000{{2,0}}.tar") == ["val 2", "val 0"]
    assert said("all", f"{tmp_path}/{{train,val}}-{{0000..0001}}.tar") == ["train 0", "train 1", "val 0", "val 1"]
    assert said("train", tmp_path / "train-0001.tar") == ["train 1"]
    for split, root, says in [
        ("test", tmp_path, r"no shards for split='test', but for \['train', 'val'\]"),
        ("val", tmp_path / "val-0001.tar", r"without \{split\} in it, is not divided"),
        ("train", f"{tmp_path}/train-{{0002..0004}}.tar", r"2 of 3 shards do not exist: .*0003\.tar"),
        ("train", f"{tmp_path}/train-{{0001..0000}}.tar", r"\{0001\.\.0000\} is no pattern"),
        ("train", f"{tmp_path}/{{train}}-0000.tar", r"\{train\} is no pattern"),
        ("train", f"{tmp_path}/train-{{0..{10**30}}}.tar", r"more than 100,000 shards"),
        ("train", f"{tmp_path}/{{0..999}}-{{0..999}}.tar", r"more than 100,000 shards"),
        ("train", f"{tmp_path}/train-000{{1,1}}.tar", r"names a shard twice"),
        ("train", tmp_path / "none", r"1 of 1 shards do not exist"),
    ]:
        with pytest.raises(ValueError, match=says):
            open_captions("wds", split, root=root)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(form, tmp_path) -> None:
    long = "ä" * 90
    members = [(f"{long}/{long}.jpg", jpeg()), ("b/1.seg.png", b"no"), ("1.Webp", jpeg()), (f"{long}/{long}.txt", b"a")]
    if form == tarfile.USTAR_FORMAT:
        members = [(name.replace(long, "long"), data) for name, data in members]
    shard(tmp_path / "a.tar", [*members, ("1.json", b'{"text": ["b", "c"], "caption": "d"}')], format=form)
    dataset = open_captions("wds", root=tmp_path)
    assert [dataset.captions(index) for index in range(len(dataset))] == [("a",), ("b", "c")]
    assert [dataset[index][0].size for index in range(2)] == [(256, 256)] * 2
    with pytest.raises(ValueError, match=r"a\.tar: .* is no JSON|have no caption|1 of 2 pictures"):
        open_captions("wds", root=tmp_path, caption_column="caption")


def test_text_goes_before_json_unless_a_column_is_asked_for(tmp_path) -> None:
    shard(tmp_path / "a.tar", [("1.jpg", jpeg()), ("1.json", b'{"caption": "b"}'), ("1.txt", b"a")])
    assert open_captions("wds", root=tmp_path).captions(0) == ("a",)
    assert open_captions("wds", root=tmp_path, caption_column="caption").captions(0) == ("b",)
    with pytest.raises(ValueError, match=r"1\.json has no caption_column='title'; it has 'caption'"):
        open_captions("wds", root=tmp_path, caption_column="title")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(mode, tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}"):
        pass
    with pytest.raises(ValueError, match=r"a\.tar is compressed.* unpack the shard: \w+ -d"):
        open_captions("wds", root=tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / f"a.tar.{mode}")
    with pytest.raises(ValueError, match=rf"holds compressed shards.*: a\.tar\.{mode}\. Unpack them"):
        open_captions("wds", root=tmp_path)
    shards(tmp_path)  # nor are they left out where there are others
    with pytest.raises(ValueError, match=r"holds compressed shards"):
        open_captions("wds", root=tmp_path)


def header(data: bytearray, start: int, **fields: bytes) -> bytes:
    """A tar with another header at a position, and the checksum that belongs to it."""
    places = {"size": (124, 12), "type": (156, 1)}
    for name, value in fields.items():
        first, length = places[name]
        data[start + first : start + first + length] = value
    block = data[start : start + 512]
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    data[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(data)


def samples(path: Path) -> bytearray:
    """Two samples, headers at 0, 1024, 2048 and 3072; the end at 4096."""
    members = [(f"{n}.{kind}", data) for n in "01" for kind, data in (("png", png()), ("txt", b"a"))]
    data = bytearray(shard(path, members, format=tarfile.USTAR_FORMAT).read_bytes())
    assert not any(data[4096:]) and data[3072:3073] == b"1"
    return data


DAMAGES = {
    "empty": lambda data: b"",
    "no tar": lambda data: b"a letter" * 1000,
    "cut within a picture": lambda data: bytes(data[:2600]),
    "cut within a header": lambda data: bytes(data[:2300]),
    "cut between two members": lambda data: bytes(data[:2048]),
    "cut before the end": lambda data: bytes(data[:4096]),
    "a damaged header": lambda data: bytes(data[:2048] + b"x" * 20 + data[2068:]),
    "a header of zeros": lambda data: bytes(data[:2048] + bytes(512) + data[2560:]),
    "two archives": lambda data: bytes(data + data),
    "a size beyond the file": lambda data: header(data, 2048, size=b"77777777777\0"),
    "a size of 2**80": lambda data: header(data, 2048, size=b"\x80" + (1 << 80).to_bytes(11, "big")),
    "a negative size": lambda data: header(data, 2048, size=b"\xff" * 10 + b"\xf0\x00"),
    "a negative size at once": lambda data: header(data, 0, size=b"\xff" * 12),
    "an endless long name": lambda data: header(data, 2048, size=b"77777777777\0", type=b"L"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_named(damage, tmp_path) -> None:
    data = samples(tmp_path / "good.tar")
    assert len(open_captions("wds", root=tmp_path)) == 2
    (tmp_path / "bad.tar").write_bytes(DAMAGES[damage](data))
    with pytest.raises(
        ValueError, match=r"bad\.tar is no tar, or is damaged or cut off \(.+\); fetch or write it again"
    ):
        open_captions("wds", root=tmp_path)


def test_no_damage_passes_unseen_or_unnamed(tmp_path) -> None:
    data = samples(tmp_path / "a.tar")
    chance = random.Random(0)
    unnamed = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 20))):
            place = chance.randrange(0, 4096, 1024) + chance.randrange(512)
            damaged[place] = chance.randrange(256)
        damaged = damaged[: chance.choice((len(data), chance.randrange(4608)))]
        if damaged == data:
            continue
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            dataset = open_captions("wds", root=tmp_path)
        except ValueError as error:
            unnamed += "a.tar" not in str(error)
        else:  # all headers are covered by their checksums, and the end is where it was
            assert len(dataset) == 2
    assert unnamed == 0


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("a.png", b"")], r"1 of 1 pictures have no caption: a\.tar/a\.png"),
        ([("a.png", b""), ("a.txt", b" ")], r"1 of 1 pictures have no caption: a\.tar/a\.png"),
        ([("a.png", b""), ("b.txt", b"b")], r"1 of 1 pictures have no caption"),
        ([("x/a.png", b""), ("y/a.txt", b"b")], r"1 of 1 pictures have no caption"),
        ([("a.png", b""), ("a.jpg", b""), ("a.txt", b"a")], r"a\.tar: a\.jpg, a\.png have one name"),
        ([("a.png", b""), ("a.png", b""), ("a.txt", b"a")], r"a\.tar: a\.png is there twice"),
        ([("a.png", b""), ("a.json", b"{")], r"a\.tar: a\.json is no JSON"),
        ([("a.png", b""), ("a.json", b"x" * (2 << 20))], r"a\.json has more than 1,048,576 bytes"),
        ([("a.txt", b"a")], r"a\.tar: no picture"),
        ([], r"a\.tar: no picture"),
    ],
)
def test_bad_samples_of_shards(members, says, tmp_path) -> None:
    shard(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=says):
        open_captions("wds", root=tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_shards_are_refused(kind, tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"a\.tar: a\.png is a link or a sparse file"):
        open_captions("wds", root=tmp_path)


def test_names_that_lead_out_of_a_shard_do_no_harm(tmp_path) -> None:
    shard(
        tmp_path / "in" / "a.tar",
        [("../../b.png", png()), ("../../b.txt", b"b"), ("/etc/c.png", png()), ("/etc/c.txt", b"c")],
    )
    dataset = open_captions("wds", root=tmp_path / "in")
    assert [dataset.captions(index) for index in range(2)] == [("b",), ("c",)]
    assert np.array_equal(dataset[1][0], quadrants())  # nothing is ever unpacked
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_a_shard_that_shrinks_or_goes_is_broken(tmp_path, monkeypatch) -> None:
    data = samples(tmp_path / "a.tar")
    dataset = open_captions("wds", root=tmp_path)
    monkeypatch.setattr(gspn.data.captions_shards, "_MAX_FILE", 10)
    with pytest.raises(BrokenImageError, match=r"a\.tar/0\.png: has \d+ bytes, more than the 10"):
        dataset[0]
    monkeypatch.undo()
    (tmp_path / "a.tar").write_bytes(data[:2600])
    assert dataset[0][1] == 0
    with pytest.raises(BrokenImageError, match=r"a\.tar/1\.png: the shard ends within it"):
        dataset[1]
    (tmp_path / "a.tar").unlink()
    assert SkipBroken(dataset, training=True).reason(0).startswith("[Errno 2]")


# datasets


@needs_datasets
def test_the_columns_of_rows(tmp_path) -> None:
    import datasets

    plain = datasets.Dataset.from_dict({"picture": [png(), b"", None], "said": ["one", "two", "three"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    dataset = open_captions("hfds/plain", root=tmp_path, image_column="picture", caption_column="said")
    assert [dataset.captions(index) for index in range(3)] == [("one",), ("two",), ("three",)]
    assert np.array_equal(dataset[0][0], quadrants())
    for index in (1, 2):
        with pytest.raises(BrokenImageError, match=rf"hfds/plain/{index}: the row holds no picture"):
            dataset[index]
    for options, says in [
        ({"caption_column": "said"}, r"image_column='image' is no column of 'hfds/plain', which has 'picture', 'said'"),
        ({"image_column": "picture"}, r"caption_column='text' is no column"),
        ({"image_column": "said", "caption_column": "said"}, r"image_column='said' .* is of type Value"),
        ({"image_column": "picture", "caption_column": "picture"}, r"row 0, 'picture': a caption is a string"),
        ({"config": "a"}, r"config='a', .*was saved to disk"),
    ]:
        with pytest.raises(ValueError, match=says):
            open_captions("hfds/plain", root=tmp_path, **options)


@needs_datasets
def test_rows_without_captions_are_named(tmp_path) -> None:
    import datasets

    table = {"image": [png()] * 3, "text": ["a", None, " "]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "some"))
    with pytest.raises(ValueError, match=r"2 of 3 pictures of 'hfds/some' have no caption in 'text': row 1, row 2"):
        open_captions("hfds/some", root=tmp_path)
    with pytest.raises(ValueError, match=r"'rows' has no rows"):
        gspn_rows(datasets.Dataset.from_dict(table).select([]))
    for damage in ("{}", "[]", "{"):
        (tmp_path / "some" / "state.json").write_text(damage)
        with pytest.raises(ValueError):  # noqa: PT011  (what datasets says of it)
            open_captions("hfds/some", root=tmp_path)


@needs_datasets
def test_a_path_in_a_row_does_not_lead_elsewhere(tmp_path) -> None:
    import datasets

    (tmp_path / "secret.png").write_bytes(png())
    table = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}], "text": ["a"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    # Written by the table alone: datasets itself would put the bytes in.
    stored = datasets.Dataset.from_dict(table, features=features.copy())
    dataset = gspn_rows(stored)
    with pytest.raises(
        BrokenImageError, match=r"the row holds no bytes, and '.*secret\.png' is no file of this data set"
    ):
        dataset[0]
    assert np.array_equal(gspn_rows(stored, folders=(tmp_path,))[0][0], quadrants())


def gspn_rows(stored, **options):
    from gspn.data.captions_hub import CaptionedRows

    return CaptionedRows(stored, "rows", **options)


@needs_datasets
def test_splits_of_rows(tmp_path) -> None:
    import datasets

    def part(said: str):
        return datasets.Dataset.from_dict({"image": [png()], "text": [said]})

    datasets.DatasetDict({"train": part("a"), "validation": part("b")}).save_to_disk(str(tmp_path / "two"))
    part("c").save_to_disk(str(tmp_path / "one"))
    for split, captions in (("train", ["a"]), ("val", ["b"]), ("all", ["a", "b"])):
        dataset = open_captions("hfds/two", split, root=tmp_path)
        assert [dataset.captions(index)[0] for index in range(len(dataset))] == captions
    assert open_captions(f"hfds/{tmp_path}/one").captions(0) == ("c",)
    with pytest.raises(
        ValueError, match=r"split='test' is no split of .*two', which has 'train', 'validation', and 'all'"
    ):
        open_captions("hfds/two", "test", root=tmp_path)
    with pytest.raises(ValueError, match=r"one' is not divided into splits, so it has no split='val'"):
        open_captions("hfds/one", "val", root=tmp_path)


@needs_datasets
def test_a_local_folder_that_datasets_opens(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    listed(tmp_path / "data" / "train")
    dataset = open_captions(f"hfds/{tmp_path}/data", "train")
    assert sorted(dataset.captions(index) for index in range(4)) == CAPTIONS
    broken = next(index for index in range(4) if dataset.captions(index) == CAPTIONS[2])
    for index in range(4):
        if index == broken:
            with pytest.raises(BrokenImageError, match="truncated"):
                dataset[index]
        else:
            assert np.array_equal(dataset[index][0], quadrants())
    with pytest.raises(ValueError, match='Unknown split "val"'):
        open_captions(f"hfds/{tmp_path}/data", "val")


def test_datasets_is_named_where_it_is_missing(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *rest: None if one == "datasets" else find(one, *rest))
    with pytest.raises(ImportError, match=r"'hfds/cats' needs datasets, which is not installed: pip install datasets"):
        open_captions("hfds/cats")


# All


@pytest.mark.parametrize("name", ["folder", "wds"])
def test_the_limit_of_pixels_holds(name, tmp_path) -> None:
    if name == "wds":
        shard(tmp_path / "a.tar", [("a.png", bomb(100_000)), ("a.txt", b"a"), ("b.png", png()), ("b.txt", b"b")])
    else:
        lines(tmp_path, GOOD, {"file_name": "b.png", "text": "b"})
        (tmp_path / "a.png").write_bytes(bomb(100_000))
        (tmp_path / "b.png").write_bytes(png())
    dataset = open_captions(name, root=tmp_path, max_pixels=100)
    for index, says in enumerate(("pixels", r"b\.png: 16 x 8 = 128 pixels are more than max_pixels=100")):
        with pytest.raises(BrokenImageError, match=says):
            dataset[index]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "emojis",
            {},
            r"name='emojis' is no data set with captions\. Did you mean 'emoji'\? There are 'emoji', .*'hfds/",
        ),
        ("fodler", {}, r"Did you mean 'folder'"),
        ("hfd/cats", {}, r"Did you mean 'hfds/<name>'"),
        ("hfds/", {}, r"name='hfds/' is no data set with captions"),
        ("wds/cats", {}, r"Did you mean 'wds'"),
        ("", {}, r"name='' is no data set with captions\. There are"),
        ("emoji", {"root": "/data"}, r"root='/data' has no meaning for 'emoji'"),
        ("emoji", {"split": "dev"}, r"split='dev' is no split of emoji"),
        ("emoji", {"caption_column": "name"}, r"caption_column='name' has no meaning"),
        ("wds", {"root": "/data", "image_column": "jpg"}, r"image_column='jpg' has no meaning for 'wds'"),
        ("folder", {}, r"root=None: 'folder' needs root"),
        ("wds", {}, r"root=None: 'wds' needs root"),
        ("folder", {"root": "/does/not/exist"}, r"root='/does/not/exist' is no folder"),
        ("wds", {"root": "/does/not/exist"}, r"root='/does/not/exist': 1 of 1 shards do not exist"),
    ],
)
def test_errors_show_the_value_and_the_remedy(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        open_captions(name, **options)


@pytest.mark.parametrize(("name", "says"), [("folder", r"holds no picture"), ("wds", r"holds no \*\.tar")])
def test_an_empty_folder_is_shown(name, says, tmp_path) -> None:
    with pytest.raises(ValueError, match=says):
        open_captions(name, root=tmp_path)
