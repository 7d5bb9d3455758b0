"""Data sets of the hub and of ``datasets``, from local files."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from captions_support import CAPTIONS, listed, needs_datasets
from data_support import png, quadrants
from gspn.data import (
    CorruptImageError,
    open_captions,
)

# datasets


@needs_datasets
def test_the_columns_of_rows(tmp_path) -> None:
    import datasets

    plain = datasets.Dataset.from_dict({"photo": [png(), b"", None], "said": ["one", "two", "three"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    dataset = open_captions("hfds/plain", root=tmp_path, image_column="photo", caption_column="said")
    assert [dataset.captions(index) for index in range(3)] == [("one",), ("two",), ("three",)]
    assert np.array_equal(dataset[0][0], quadrants())
    for index in (1, 2):
        with pytest.raises(CorruptImageError, match=rf"hfds/plain/{index}: the row holds no image"):
            dataset[index]
    for options, says in [
        (
            {"caption_column": "said"},
            r"image_column='image' is not a column of 'hfds/plain'; pass image_column= one of 'photo', 'said'",
        ),
        ({"image_column": "photo"}, r"caption_column='text' is not a column"),
        ({"image_column": "said", "caption_column": "said"}, r"image_column='said' .* is of type Value"),
        ({"image_column": "photo", "caption_column": "photo"}, r"row 0, 'photo': a caption is a string"),
        ({"config": "a"}, r"config='a', .*was saved to disk"),
    ]:
        with pytest.raises(ValueError, match=says):
            open_captions("hfds/plain", root=tmp_path, **options)


@needs_datasets
def test_rows_without_captions_are_named(tmp_path) -> None:
    import datasets

    table = {"image": [png()] * 3, "text": ["a", None, " "]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "some"))
    with pytest.raises(ValueError, match=r"2 of 3 images of 'hfds/some' have no caption in 'text': row 1, row 2"):
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
        CorruptImageError, match=r"the row holds no bytes, and '.*secret\.png' is not a file of this data set"
    ):
        dataset[0]
    assert np.array_equal(gspn_rows(stored, folders=(tmp_path,))[0][0], quadrants())


def gspn_rows(stored, **options):
    from gspn.data.captions.hub import CaptionedRows

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
        ValueError, match=r"split='test' is not a split of .*two': it has 'train', 'validation', and 'all'"
    ):
        open_captions("hfds/two", "test", root=tmp_path)
    with pytest.raises(ValueError, match=r"split='val' is not a split of .*one': it is not divided into splits"):
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
            with pytest.raises(CorruptImageError, match="truncated"):
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
