"""Folders of images with captions: files beside them, and metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import gspn.data.captions.folder
import gspn.data.captions.shards
from captions_support import CAPTIONS, GOOD, beside, lines, listed, shard, shards
from data_support import png
from gspn.data import LeftOutWarning, open_captions

# Which split


@pytest.mark.parametrize(("name", "write"), [("folder", beside), ("wds", shards)])
def test_the_root_stands_for_training_alone(name, write, tmp_path) -> None:
    write(tmp_path / "whole")
    assert len(open_captions(name, root=tmp_path / "whole")) == len(open_captions(name, "all", tmp_path / "whole")) == 4
    with pytest.raises(ValueError, match=r"split='val' is not a split of root=.*not divided.*; pass 'train' or 'all'"):
        open_captions(name, "val", root=tmp_path / "whole")
    write(tmp_path / "parts" / "validation")
    assert len(open_captions(name, "val", root=str(tmp_path / "parts"))) == 4
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"split='{split}' is not a split of .*: it has 'validation', and 'all'"):
            open_captions(name, split, root=tmp_path / "parts")
    with pytest.raises(ValueError, match=r"split='\.\./whole' is not a name of a split"):
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
    with pytest.raises(ValueError, match=r"lacks 1 images that its metadata names: 2\.png"):
        open_captions("folder", "val", root=tmp_path)


def test_metadata_counts_from_its_own_folder(tmp_path) -> None:
    listed(tmp_path / "one")
    listed(tmp_path / "two", "csv")
    dataset = open_captions("folder", root=tmp_path)
    assert dataset.filename(4) == "two/images/0.png" and dataset.captions(4) == dataset.captions(0) == CAPTIONS[0]


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
    with pytest.raises(ValueError, match=r"lacks 1 images .*link/0\.PNG"):
        open_captions("folder", root=root)


def test_a_pipe_is_no_file(tmp_path) -> None:
    beside(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "0.txt.png")
    (tmp_path / "3.png").mkdir()
    (tmp_path / ".hidden.png").write_bytes(png())
    assert len(open_captions("folder", root=tmp_path)) == 4  # opening one would wait for ever


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (
            [{"file_name": "a.png", "caption": "a"}],
            r"line 1 has no caption_column='text'; it has 'file_name', 'caption'",
        ),
        ([GOOD, {"text": "a"}], r"line 2 has no 'file_name'; it has 'text'"),
        ([{"file_name": 3, "text": "a"}], r"file_name=3 is not the name of a file"),
        ([{"file_name": "a.png", "text": 3}], r"line 1: a caption is a string or a list of strings, not 3"),
        ([{"file_name": "a.png", "text": ["a", None]}], r"list of strings, not \['a', None\]"),
        ([{"file_name": "a.png", "text": {"a": 1}}], r"list of strings, not \{'a': 1\}"),
        (['{"file_name": "a.png", "text": "\\ud800"}'], r"line 1: .*is not valid text \(surrogates"),
        (["[1]"], r"line 1 is not a JSON object"),
        (["{"], r"line 1 is not JSON: Expecting property name"),
        (["[" * 100_000], r"line 1 is not JSON that can be read: it is nested too deeply"),
        (['{"file_name": ' + "9" * 5000 + "}"], r"line 1 is not JSON: .*4300 digits"),
        ([{"file_name": "b.png", "text": "b"}, GOOD], r"lacks 1 images that its metadata names: b\.png"),
        ([{"file_name": "a.png", "text": " \n"}], r"1 of 1 images have no caption: a\.png"),
        ([{"file_name": "a.png", "text": []}], r"1 of 1 images have no caption: a\.png"),
        ([{"file_name": "a.png", "text": None}], r"1 of 1 images have no caption: a\.png"),
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
        ("file_name,text\na.png,a, b", "line 2 does not have the 2 fields of the first line; put quotes"),
        ("file_name,text\na.png", "line 2 does not have the 2 fields"),
        ("file_name,text,text\na.png,a,b", "line 1 names a column twice: file_name, text, text"),
        ('file_name,text\na.png,"a', "is not CSV: unexpected end of data"),
        ("file_name,text\na.png,", "1 of 1 images have no caption"),
        ("file_name,text\na.png," + "x" * 200_000, "is not CSV: field larger than field limit"),
        ("file_name,text" + "," * 2_000_000, "line 1 has more than 1,048,576 bytes"),
        ("", "1 of 1 images have no caption"),
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


def test_images_without_captions_are_named(tmp_path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png())
    (tmp_path / "7.txt").write_text("seven")
    (tmp_path / "6.txt").write_text("\n \n")
    says = r"7 of 8 images have no caption: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 2 more\. Write it into a \.txt"
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
    monkeypatch.setattr(gspn.data.captions.folder, "_MAX_METADATA", 10)
    with pytest.raises(ValueError, match=r"metadata\.jsonl has more than 10 bytes"):
        open_captions("folder", root=lines(tmp_path, GOOD))


def test_files_of_captions_stay_inside_the_folder(tmp_path):
    """Neither a .txt, nor metadata beside the images or above their split, may be a link that leads out."""
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    (tmp_path / "metadata").write_text(json.dumps({"file_name": "train/a.png", "text": "a secret"}))
    root = tmp_path / "root"
    (root / "train").mkdir(parents=True)
    (root / "train" / "a.png").write_bytes(png())
    for place, target in (("train/a.txt", secret), ("train/metadata.jsonl", secret), ("metadata.jsonl", "../metadata")):
        (root / place).symlink_to(target)
        with pytest.raises(ValueError, match=r"1 of 1 images have no caption: a\.png.*1 link that leaves the folder"):
            open_captions("folder", root=root)
        (root / place).unlink()
    (root / "train" / "b").write_text("inside")
    (root / "train" / "a.txt").symlink_to("b")
    with pytest.warns(LeftOutWarning, match=r"1 file that is not an image \(b\)"):
        assert open_captions("folder", root=root).captions(0) == ("inside",)


def test_a_pipe_of_captions_is_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for name in ("a.txt", "metadata.jsonl", "metadata.csv"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=r"have no caption: a\.png.*3 pipes, sockets and devices"):
        open_captions("folder", root=tmp_path)


def test_captions_of_images_whose_names_are_not_utf8(tmp_path):
    name = os.fsdecode(b"\xff\n")
    (tmp_path / f"{name}.png").write_bytes(png())
    lines(tmp_path, {"file_name": "a.png", "text": "a"}, {"file_name": f"{name}.png", "text": "b"})
    dataset = open_captions("folder", root=tmp_path)
    assert [dataset.captions(i) for i in range(2)] == [("a",), ("b",)]
    assert len(dataset.identity()) == 32 and dataset[1][0].size == (16, 8)


@pytest.mark.parametrize("name", ["a\x1b[31m.png", "a\nb.png", "a\0.png", "\ud800.png"])
def test_names_in_errors_are_escaped(name, tmp_path) -> None:
    root = lines(tmp_path, {"file_name": name, "text": "a"})
    with pytest.raises(ValueError, match=r"lacks 1 images that its metadata names: (a|\\ud800)") as caught:
        open_captions("folder", root=root)
    assert str(caught.value).isprintable()
