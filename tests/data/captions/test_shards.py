"""WebDataset shards, read at any place: every form of tar, and damage of every kind."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

import gspn.data.captions.folder
import gspn.data.tars
from captions_support import shard, shards
from data_support import jpeg, png, quadrants
from gspn.data import (
    CorruptImageError,
    SkipCorrupt,
    open_captions,
)

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
        ("test", tmp_path, r"split='test' is not a split of the shards of root=.*: it has 'train', 'val'"),
        ("val", tmp_path / "val-0001.tar", r"which has no \{split\} in it: it is not divided into splits"),
        ("train", f"{tmp_path}/train-{{0002..0004}}.tar", r"2 of 3 shards do not exist: train-0003\.tar"),
        ("train", f"{tmp_path}/train-{{0001..0000}}.tar", r"\{0001\.\.0000\} is not a pattern"),
        ("train", f"{tmp_path}/{{train}}-0000.tar", r"\{train\} is not a pattern"),
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
    with pytest.raises(ValueError, match=r"a\.tar: .* is not JSON|have no caption|1 of 2 images"):
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
    with pytest.raises(ValueError, match=r"a\.tar is compressed.* unpack it: \w+ -d"):
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
    "cut within an image": lambda data: bytes(data[:2600]),
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
        ValueError, match=r"bad\.tar is not a tar, or damaged or cut off \(.+\); fetch or write it again"
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
        ([("a.png", b"")], r"1 of 1 images have no caption: a\.tar/a\.png"),
        ([("a.png", b""), ("a.txt", b" ")], r"1 of 1 images have no caption: a\.tar/a\.png"),
        ([("a.png", b""), ("b.txt", b"b")], r"1 of 1 images have no caption"),
        ([("x/a.png", b""), ("y/a.txt", b"b")], r"1 of 1 images have no caption"),
        ([("a.png", b""), ("a.jpg", b""), ("a.txt", b"a")], r"a\.tar: a\.jpg, a\.png share their name"),
        ([("a.png", b""), ("a.png", b""), ("a.txt", b"a")], r"a\.tar: a\.png is there twice"),
        ([("a.png", b""), ("a.json", b"{")], r"a\.tar: a\.json is not JSON"),
        ([("a.png", b""), ("a.json", b"x" * (2 << 20))], r"a\.json has more than 1,048,576 bytes"),
        ([("a.txt", b"a")], r"a\.tar: no image"),
        ([], r"a\.tar: no image"),
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
    with pytest.raises(ValueError, match=r"a\.tar: a\.png is a link or sparse"):
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
    monkeypatch.setattr(gspn.data.tars, "_MAX_FILE", 10)
    with pytest.raises(CorruptImageError, match=r"a\.tar/0\.png: has \d+ bytes, more than the 10"):
        dataset[0]
    monkeypatch.undo()
    (tmp_path / "a.tar").write_bytes(data[:2600])
    assert dataset[0][1] == 0
    with pytest.raises(CorruptImageError, match=r"a\.tar/1\.png: the tar has become shorter"):
        dataset[1]
    (tmp_path / "a.tar").unlink()
    assert SkipCorrupt(dataset, training=True).reason(0).startswith("[Errno 2]")
