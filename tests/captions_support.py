"""Four images with captions, the third of which is cut off, in every form that is opened."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_support import png

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
NUMBERS = ("0", "1", "2", "3")
CAPTIONS = [("number 0", "no. 0"), ("number 1", "no. 1"), ("number 2", "no. 2"), ("number 3", "no. 3")]


# Four images, the third of which is cut off, in every form that is opened.


def image(number: str) -> bytes:
    return png()[:-40] if number == "2" else png()


def text(number: str) -> bytes:
    return f"number {number}\n\n  no.   {number}\r\n".encode()


def beside(root: Path) -> Path:
    for number in NUMBERS:
        place = root / "deep" / "er" if number == "3" else root
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.PNG").write_bytes(image(number))
        (place / f"{number}.txt").write_bytes(text(number))
    return root


def listed(root: Path, kind: str = "jsonl") -> Path:
    (root / "images").mkdir(parents=True)
    for number in NUMBERS:
        (root / "images" / f"{number}.png").write_bytes(image(number))
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
        members = [(f"x/{n}.{kind}", data) for n in numbers for kind, data in (("png", image(n)), ("txt", text(n)))]
        shard(root / f"{name}.tar", [("x/readme.txt", b"hello"), ("x/._0.png", b""), ("x/.png", b""), *members])
    return root


def rows(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "text": [datasets.Value("string")], "n": datasets.Value("int8")}
    )
    table = {
        "image": [{"bytes": image(number), "path": None} for number in NUMBERS],
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


def to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


# Hostile and damaged folders


def lines(root: Path, *records: dict | str, name: str = "metadata.jsonl") -> Path:
    (root / "a.png").write_bytes(png())
    (root / name).write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    return root


GOOD = {"file_name": "a.png", "text": "a"}
