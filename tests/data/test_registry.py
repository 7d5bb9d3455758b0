"""Data sets by name, and folders through timm."""

from __future__ import annotations

import importlib.util
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_support import folder, png, quadrants
from gspn.data import DATASETS, BrokenImageError, open_dataset


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "mnist5k"])
def test_those_that_ship_open_by_name(name) -> None:
    dataset = open_dataset(name, "val", transform=np.asarray)
    assert dataset.name == name
    assert isinstance(dataset[0][0], np.ndarray)
    with pytest.raises(ValueError, match=r"root='/data' has no meaning"):
        open_dataset(name, "val", root="/data")


@pytest.mark.parametrize("name", ["folder", ""])
def test_a_folder(name, tmp_path) -> None:
    pytest.importorskip("timm")
    root = folder(tmp_path)
    dataset = open_dataset(name, "train", root=root)
    assert len(dataset) == 6
    assert dataset.classes == ["cat", "dog"]
    image, target = dataset[4]
    assert np.array_equal(image, quadrants()) and image.mode == "RGB"
    assert target == dataset.target(4) == 1
    assert dataset.filename(4) == "dog/1.png"
    assert dataset.filename(4, absolute=True) == str(root / "train" / "dog" / "1.png")
    assert len(open_dataset(name, "validation", root=str(root))) == 6


def test_a_missing_split_is_not_replaced(tmp_path) -> None:
    pytest.importorskip("timm")
    root = folder(tmp_path, ("train",))
    # timm would take the root, and with it the images that were trained on.
    with pytest.raises(ValueError, match=r"no folder for split='val'.*but \['train'\].*search_split=False"):
        open_dataset("folder", "val", root=root)
    assert len(open_dataset("folder", "val", root=root / "train", search_split=False)) == 6


def test_classes_of_training_hold_for_validation(tmp_path) -> None:
    pytest.importorskip("timm")
    root = folder(tmp_path)
    for path in (root / "val" / "cat").iterdir():
        path.unlink()
    train = open_dataset("folder", "train", root=root)
    val = open_dataset("folder", "val", root=root, classes=train.classes)
    assert val.classes == ["cat", "dog"]
    assert {val.target(i) for i in range(len(val))} == {val[0][1]} == {1}
    with pytest.raises(ValueError, match=r"not in the given ones: \['dog'\]"):
        open_dataset("folder", "val", root=root, classes=["cat"])


def test_a_tar(tmp_path) -> None:
    pytest.importorskip("timm")
    root = folder(tmp_path / "files", ("train",))
    (root / "train" / "cat" / "1.png").write_bytes(png()[:-40])
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(root / "train", "data")
    dataset = open_dataset("folder", "train", root=tmp_path / "data.tar")
    assert len(dataset) == 6 and len(dataset.classes) == 2
    assert np.array_equal(dataset[0][0], quadrants())
    with pytest.raises(BrokenImageError, match=r"1\.png: cannot be decoded"):
        dataset[1]


def test_the_limit_of_pixels_is_passed_on(tmp_path) -> None:
    pytest.importorskip("timm")
    dataset = open_dataset("folder", "train", root=folder(tmp_path), max_pixels=100)
    with pytest.raises(BrokenImageError, match=r"cat/0\.png: 16 x 8 = 128 pixels"):
        dataset[0]


def test_torchvision_folders_are_opened_the_same_way(tmp_path) -> None:
    pytest.importorskip("torchvision")
    root = folder(tmp_path)
    Image.fromarray(np.array([[65535]], np.uint16)).save(root / "val" / "cat" / "0.png")
    dataset = open_dataset("torch/folder", "val", root=root, transform=np.asarray)
    assert dataset.classes == ["cat", "dog"] and dataset.filename(0) == "cat/0.png"
    assert dataset[0][0].tolist() == [[[255, 255, 255]]]
    assert dataset[5][1] == dataset.target(5) == 1
    (root / "val" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match=r"0\.png"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("emojis", {}, r"name='emojis' is no data set. Did you mean 'emoji'\? There are 'emoji', .*'wds/<name>'"),
        ("imagenet", {"root": "/data"}, "name='imagenet' is no data set"),
        ("hfds/", {}, "name='hfds/' is no data set"),
        ("folder", {}, "root=None: a folder data set needs root"),
        ("folder", {"root": "/does/not/exist"}, "root='/does/not/exist' is neither a folder nor a .tar file"),
        ("torch/cifar10", {}, "root=None: 'torch/cifar10' needs root"),
    ],
)
def test_errors_show_the_value_and_the_remedy(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        open_dataset(name, "train", **options)


def test_an_empty_folder_is_shown(tmp_path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"Found 0 images .*train"):
        open_dataset("folder", "train", root=tmp_path)


@pytest.mark.parametrize(("name", "module"), [("hfds/cats", "datasets"), ("wds/cats", "webdataset")])
def test_a_missing_package_is_named(name, module, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == module else find(wanted))
    with pytest.raises(ImportError, match=f"needs {module}, which is not installed: pip install {module}"):
        open_dataset(name, "train", root="/data")
