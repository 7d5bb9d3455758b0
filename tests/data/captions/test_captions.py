"""Images with captions: what all kinds have in common, the emoji, and what is refused."""

from __future__ import annotations

import importlib.util
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader

from captions_support import CAPTIONS, GOOD, KINDS, lines, needs_datasets, shard, to_tensor
from data_support import bomb, png, quadrants
from gspn.data import (
    CaptionedImages,
    CorruptImageError,
    CorruptImages,
    DeterministicAugmentation,
    EmojiCaptions,
    SkipCorrupt,
    collate,
    open_captions,
)


@pytest.fixture(params=[pytest.param(kind, marks=needs_datasets if kind == "rows" else ()) for kind in KINDS])
def opened(request, tmp_path) -> tuple[CaptionedImages, str]:
    name, write, broken = KINDS[request.param]
    return open_captions(name, "train", root=write(tmp_path)), broken


def test_a_sample_is_an_image_and_its_index(opened) -> None:
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
            with pytest.raises(IndexError, match=rf"index={index} is out of range for <.*4 images with captions>"):
                method(index)


def test_a_broken_image_has_a_name_and_captions(opened) -> None:
    dataset, name = opened
    assert dataset.filename(2) == name
    assert dataset.filename(2, basename=True) == name.rpartition("/")[2] or dataset.name.startswith("hfds")
    with pytest.raises(CorruptImageError) as caught:
        dataset[2]
    assert caught.value.name == name and "truncated" in caught.value.reason
    assert dataset.captions(2) == CAPTIONS[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_comes_with_its_own_index(opened, workers) -> None:
    dataset, name = opened
    dataset.transform = to_tensor
    for training, expected in ((True, [0, 1, 3, 3]), (False, [0, 1, -1, 3])):
        whole = DeterministicAugmentation(SkipCorrupt(dataset, training=training), seed=0)
        record = CorruptImages(whole)
        targets = []
        for images, target, broken in DataLoader(whole, batch_size=2, num_workers=workers, collate_fn=collate):
            assert images.shape == (2, 8, 16, 3)
            record.add(broken)
            targets += target.tolist()
        assert targets == expected
        assert record.names == {2: name}
        assert "truncated" in record.summary()


def test_workers_that_are_started_again_read_the_same(tmp_path) -> None:
    sets = []
    for kind, (name, write, _) in KINDS.items():
        if kind != "rows" or importlib.util.find_spec("datasets"):
            sets.append(open_captions(name, "train", root=write(tmp_path / kind), transform=to_tensor))
    whole = ConcatDataset([SkipCorrupt(dataset, training=True) for dataset in sets])
    loader = DataLoader(whole, batch_size=4, num_workers=2, multiprocessing_context="spawn", collate_fn=collate)
    batches = list(loader)
    assert len(batches) == len(sets) >= 4
    for images, targets, _ in batches:
        assert targets.tolist() == [0, 1, 3, 3]
        assert torch.equal(images, torch.stack([to_tensor(quadrants())] * 4))


def test_augmentation_is_a_function_of_the_index(opened) -> None:
    dataset, _ = opened
    dataset.transform = lambda image: random.random()
    seeded = DeterministicAugmentation(SkipCorrupt(dataset, training=True), seed=3)
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
        with pytest.raises(CorruptImageError, match=says):
            dataset[index]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "emojis",
            {},
            r"unknown captioned data set name='emojis'\. Did you mean 'emoji'\? The names are 'emoji', .*'hfds/",
        ),
        ("fodler", {}, r"Did you mean 'folder'"),
        ("hfd/cats", {}, r"Did you mean 'hfds/<name>'"),
        ("hfds/", {}, r"unknown captioned data set name='hfds/'"),
        ("wds/cats", {}, r"Did you mean 'wds'"),
        ("", {}, r"unknown captioned data set name=''\. The names are"),
        ("emoji", {"root": "/data"}, r"root='/data' does not apply to 'emoji'"),
        ("emoji", {"split": "dev"}, r"split='dev' is not a split of emoji"),
        ("emoji", {"caption_column": "name"}, r"caption_column='name' does not apply to 'emoji'"),
        (
            "wds",
            {"root": "/data", "image_column": "jpg"},
            r"image_column='jpg' does not apply to 'wds', which takes ",
        ),
        ("folder", {}, r"root=None: 'folder' needs root"),
        ("wds", {}, r"root=None: 'wds' needs root"),
        ("folder", {"root": "/does/not/exist"}, r"root='/does/not/exist' is not a folder"),
        ("wds", {"root": "/does/not/exist"}, r"root='/does/not/exist': 1 of 1 shards do not exist"),
    ],
)
def test_errors_show_the_value_and_the_remedy(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        open_captions(name, **options)


@pytest.mark.parametrize(("name", "says"), [("folder", r"holds no image"), ("wds", r"holds no \*\.tar")])
def test_an_empty_folder_is_shown(name, says, tmp_path) -> None:
    with pytest.raises(ValueError, match=says):
        open_captions(name, root=tmp_path)
