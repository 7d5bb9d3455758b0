"""Data sets by name, and folders through timm."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import tarfile
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from captions_support import shard
from data_support import folder, png, quadrants
from gspn._errors import UsageError
from gspn.data import CorruptImageError, CorruptImageWarning, help_text, open_captions, open_dataset
from gspn.data.registry import ENTRIES, Entry
from support import run_python


@pytest.mark.parametrize("name", ["emoji", "emoji/subcategory", "digits"])
def test_those_that_ship_open_by_name(name) -> None:
    dataset = open_dataset(name, "val", transform=np.asarray)
    assert dataset.name == name
    assert isinstance(dataset[0][0], np.ndarray)
    with pytest.raises(ValueError, match=r"root='/data' does not apply to"):
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
    with pytest.raises(ValueError, match=r"split='val' is not a split of root=.*'train', and 'all'"):
        open_dataset("folder", "val", root=root)
    for options in ({"split": "val", "search_split": False}, {"split": "all"}, {"split": "train"}):
        assert len(open_dataset("folder", root=root / "train", **options)) == 6
    with pytest.raises(ValueError, match=r"split='val' is not a split of root=.*not divided into splits"):
        open_dataset("folder", "val", root=root / "train")


def test_classes_of_training_hold_for_validation(tmp_path) -> None:
    pytest.importorskip("timm")
    root = folder(tmp_path)
    for path in (root / "val" / "cat").iterdir():
        path.unlink()
    train = open_dataset("folder", "train", root=root)
    val = open_dataset("folder", "val", root=root, classes=train.classes)
    assert val.classes == ["cat", "dog"]
    assert {val.target(i) for i in range(len(val))} == {val[0][1]} == {1}
    with pytest.raises(ValueError, match=r"not in classes=\['cat'\]: \['dog'\]"):
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
    with pytest.raises(CorruptImageError, match=r"1\.png: cannot be decoded"):
        dataset[1]


def test_the_limit_of_pixels_is_passed_on(tmp_path) -> None:
    pytest.importorskip("timm")
    dataset = open_dataset("folder", "train", root=folder(tmp_path), max_pixels=100)
    with pytest.raises(CorruptImageError, match=r"cat/0\.png: 16 x 8 = 128 pixels"):
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
    with pytest.raises(CorruptImageError, match=r"0\.png"):
        dataset[0]


def test_a_stream_has_a_name_classes_and_a_transform(monkeypatch) -> None:
    timm_data = pytest.importorskip("timm.data.dataset")

    class Reader:
        class_to_idx = MappingProxyType({"dog": 1, "cat": 0})
        epoch = 0

        def __iter__(self):
            return iter([("a", 0), ("b", 1)])

        def __len__(self):
            return 2

        def set_epoch(self, epoch):
            self.epoch = epoch

    def create_dataset(name, root, split, is_training, target_transform, input_img_mode):
        assert input_img_mode == ""
        assert (name, root, split, is_training) == ("hfids/cats", "/data", "train[:10%]", True)
        return timm_data.IterableImageDataset(None, Reader(), target_transform=target_transform)

    monkeypatch.setattr("gspn.data.timm_datasets.create_dataset", create_dataset)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    options = dict(transform=str.upper, target_transform=lambda target: target + 5)
    stream = open_dataset("hfids/cats", "train[:10%]", root="/data", **options)
    assert (stream.name, stream.classes, len(stream)) == ("hfids/cats", ["cat", "dog"], 2)
    assert list(stream) == [("A", 5), ("B", 6)]
    stream.set_epoch(3)
    stream.transform = None
    assert next(iter(stream)) == ("a", 5) and stream.reader.epoch == 3


@pytest.mark.parametrize("kind", ["hfids", "wds"])
def test_the_images_of_a_stream(kind, tmp_path, monkeypatch) -> None:
    """They are opened by the rules of all images, and a corrupt one is named, or counted where timm leaves it out."""
    pytest.importorskip({"hfids": "datasets", "wds": "webdataset"}[kind])
    grey = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(grey, "PNG")  # 16 bits, 128 of 255
    images = [grey.getvalue(), png()[:-40], grey.getvalue()]
    if kind == "wds":
        labels = [(f"{i}.cls", b"1") for i in range(3)]
        members = [member for i in range(3) for member in ((f"{i}.png", images[i]), labels[i])]
        shard(tmp_path / "a.tar", members)
        split = {"name": "train", "filenames": ["a.tar"], "shard_lengths": [3], "num_samples": 3}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
        stream = open_dataset("wds/x", "train", root=tmp_path, is_training=False)
        with pytest.warns(CorruptImageWarning, match=r"wds/x: 1 samples were corrupt and left out; the first: .*trunc"):
            found = list(stream)
    else:
        for i, one in enumerate(images):
            (tmp_path / "train" / "cd"[i // 2]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "train" / "cd"[i // 2] / f"{i}.png").write_bytes(one)
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        stream = open_dataset(f"hfids/{tmp_path}", "train", num_samples=3, is_training=False)
        samples, found = iter(stream), []
        with pytest.raises(CorruptImageError, match=rf"hfids/{tmp_path}, sample 1: cannot be decoded"):
            found.extend(samples)
    assert found and {image.getpixel((0, 0)) for image, _ in found} == {(128, 128, 128)}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "emojis",
            {},
            r"unknown labelled data set name='emojis'. Did you mean 'emoji'\? The names are 'emoji', .*'wds/<name>'",
        ),
        ("imagenet", {"root": "/data"}, "unknown labelled data set name='imagenet'"),
        ("hfds/", {}, "unknown labelled data set name='hfds/'"),
        ("folder", {}, "root=None: 'folder' needs root"),
        ("folder", {"root": "/does/not/exist"}, "root='/does/not/exist' is not a folder"),
        ("digits", {"max_pixels": 9}, "max_pixels=9 does not apply to 'digits', which takes transform"),
        ("torch/cifar10", {}, "root=None: 'torch/cifar10' needs root"),
    ],
)
def test_errors_show_the_value_and_the_remedy(name, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        open_dataset(name, "train", **options)


def test_an_empty_folder_is_shown(tmp_path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train holds no image in a folder of its class .*nothing is left out"):
        open_dataset("folder", "train", root=tmp_path)


@pytest.mark.parametrize("name", ["torch/foo", "torch/cifar10", "torch/places365", "torch/inaturalist", "torch/mnist"])
def test_what_other_packages_raise_is_one_kind_of_error(name, tmp_path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(UsageError, match=rf"'{name}' cannot be opened by torchvision: \w+, .*Check its name"):
        open_dataset(name, "train", root=tmp_path)


@pytest.mark.parametrize("opens", [open_dataset, open_captions])
def test_a_data_set_of_the_hub(opens, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    image = {"bytes": png(), "path": None}
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    loaded = datasets.Dataset.from_dict({"image": [image] * 2, "text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    for root in (None, tmp_path):
        dataset = opens("hfds/cats/dogs", "train", root=root)
        assert len(dataset) == 2 and dataset[0][0].size == (16, 8)


@pytest.mark.parametrize(("name", "module"), [("hfds/cats", "datasets"), ("wds/cats", "webdataset")])
def test_a_missing_package_is_named(name, module, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == module else find(wanted))
    with pytest.raises(ImportError, match=f"needs {module}, which is not installed: pip install {module}"):
        open_dataset(name, "train", root="/data")


def test_help_and_entries_need_no_other_package() -> None:
    code = "import sys; from gspn.data.registry import help_text; print(help_text('labelled')); "
    done = run_python(code + "assert not {'PIL', 'timm'} & set(sys.modules)")
    assert done.stdout.startswith("emoji, emoji/subcategory, digits, mnist5k, folder, hfds/NAME")


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_entry_opens_what_is_there(kind) -> None:
    for entry in ENTRIES[kind]:
        module, _, function = entry.opens.partition(":")
        if "timm" in entry.needs or "datasets" in entry.needs:
            pytest.importorskip("timm")
        assert callable(getattr(importlib.import_module(f"gspn.data.{module}"), function)), entry
        assert entry.help and len({one.name for one in ENTRIES[kind]}) == len(ENTRIES[kind])
        assert entry.name.replace("<name>", "NAME") in help_text(kind)


def test_a_new_data_set_is_an_entry(monkeypatch) -> None:
    entry = Entry("two/<name>", "digits:Digits", "two digits", root="optional")
    monkeypatch.setattr("gspn.data.registry.ENTRIES", {"labelled": (entry,), "captioned": ()})
    seen = []
    monkeypatch.setattr("gspn.data.digits.Digits", lambda **options: seen.append(options))
    open_dataset("Two/digits", "train", transform=abs)
    assert seen == [{"split": "train", "root": None, "name": "Two/digits", "transform": abs}]
    assert help_text("labelled") == "two/NAME"
    with pytest.raises(ValueError, match="unknown captioned data set name='two/digits'"):
        open_captions("two/digits")
