"""The Noto emoji, which come with gspn."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image

from .base import LabelledImages, Transform
from .images import load_image
from .splits import find_split

_FILE = Path(__file__).with_name("emoji.zip")
_TARGETS = ("category", "subcategory")


@dataclass(frozen=True)
class EmojiRecord:
    """The description of an emoji."""

    name: str
    """In English, from CLDR: ``"cat with wry smile"``."""
    keywords: tuple[str, ...]
    """In English, from CLDR, in alphabetical order."""
    category: str
    """One of 9: ``"Animals & Nature"``."""
    subcategory: str
    """One of 98: ``"animal-mammal"``."""
    unified: str
    """Code points: ``"1F468-200D-1F680"``."""
    short_names: tuple[str, ...]
    """Names in chat programs: ``("smirk_cat",)``."""
    group: str
    """Emoji of one group are variants of one drawing, and are on the same side of the split."""
    misdrawn: str
    """The fault of the image, if it has one; empty for nearly all."""
    file: str
    """Name of the image inside ``emoji.zip``."""

    @property
    def character(self) -> str:
        """The emoji as text."""
        return "".join(chr(int(code, 16)) for code in self.unified.split("-"))


class Emoji(LabelledImages):
    """1,906 Noto emoji, 64 x 64, on white, with names, keywords, categories and subcategories.

    **Split.** 80 to 20 within each subcategory, by the hash of a group's name, so it does not depend on a random
    generator. A group holds the variants of one drawing (man, woman and person; colours; directions; hours; families;
    flags that look alike) and is on one side as a whole: no name in ``"val"`` and no variant of its drawing is in
    ``"train"``. Groups of more than a fifth of a subcategory are in ``"train"``. There is no third part, so a result on
    ``"val"`` is optimistic if settings were chosen by it.

    Images: Google Noto 16.0, Apache-2.0, each reduced to 256 colours. Names and keywords: Unicode CLDR 48, Unicode-3.0.
    Categories: emoji-data 16.0.0, MIT. The five skin tones of the category Component are left out. See the file NOTICE
    of this package.

    Args:
        split: ``"train"`` (1,546), ``"val"`` (360; also called ``"test"``), or ``"all"``.
        target: ``"category"``, 9 classes, or ``"subcategory"``, 98.

    Attributes:
        records: an ``EmojiRecord`` for each image.

    Raises:
        ValueError: the split or target is unknown.

    Example:
        >>> from gspn.data import Emoji
        >>> emoji = Emoji("val")
        >>> image, target = emoji[0]
        >>> image.size, emoji.classes[target], emoji.captions[0]
        ((64, 64), 'Smileys & Emotion', 'grinning face with smiling eyes')
    """

    def __init__(
        self,
        split: str = "train",
        target: Literal["category", "subcategory"] = "category",
        *,
        transform: Transform | None = None,
    ) -> None:
        if target not in _TARGETS:
            raise ValueError(f"{target=} is not a target of emoji; pass one of {', '.join(map(repr, _TARGETS))}.")
        split = find_split(split, ("train", "val", "test"), "emoji")
        records, files = _read()
        classes = sorted({getattr(record, target) for record in records})
        super().__init__("emoji" if target == "category" else "emoji/subcategory", classes, transform)
        held_out = _held_out()
        chosen = [i for i in range(len(records)) if split == "all" or (i in held_out) == (split != "train")]
        self.records = [records[i] for i in chosen]
        self._files = [files[i] for i in chosen]
        index = {name: i for i, name in enumerate(classes)}
        self.targets = [index[getattr(record, target)] for record in self.records]

    @property
    def captions(self) -> list[str]:
        """The name of each emoji."""
        return [record.name for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, 64 x 64, before the transform."""
        return load_image(io.BytesIO(self._files[index]), name=self.filename(index))

    def target(self, index: int) -> int:
        """The class of image ``index``."""
        return self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The code points of emoji ``index`` as a file name, as in ``1f600.webp``."""
        del basename, absolute
        return self.records[index].file


@cache
def _read() -> tuple[Sequence[EmojiRecord], Sequence[bytes]]:
    """All records but the skin tones, and their compressed images: 3 MB that all data sets share."""
    records, files = [], []
    with zipfile.ZipFile(_FILE) as archive:
        for entry in json.loads(archive.read("index.json"))["emoji"]:
            if entry["category"] == "Component":
                continue
            entry["keywords"] = tuple(entry["keywords"])
            entry["short_names"] = tuple(entry["short_names"])
            records.append(EmojiRecord(**{"misdrawn": ""} | entry))
            files.append(archive.read(entry["file"]))
    return records, files


@cache
def _held_out() -> frozenset[int]:
    """The indices of validation: groups in the order of their hash, as long as no subcategory exceeds a fifth."""
    records, _ = _read()
    groups: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        groups[record.group].append(i)
    room = {name: round(count / 5) for name, count in Counter(record.subcategory for record in records).items()}
    held_out: set[int] = set()
    for group in sorted(groups, key=lambda group: hashlib.sha256(group.encode()).digest()):
        needed = Counter(records[i].subcategory for i in groups[group])
        if all(room[name] >= count for name, count in needed.items()):
            held_out.update(groups[group])
            for name, count in needed.items():
                room[name] -= count
    return frozenset(held_out)
