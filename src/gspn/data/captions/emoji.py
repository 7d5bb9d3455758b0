"""Images with captions, by name, for text to image."""

from __future__ import annotations

import difflib
import os
import re
from abc import abstractmethod
from typing import Any

from PIL import Image

from gspn.data.base import LabelledImages, Transform
from gspn.data.captions.parsing import TEXT_COLUMN
from gspn.data.emoji import Emoji, EmojiRecord
from gspn.data.registry import _need

CAPTIONED = ("emoji", "folder", "wds", "hfds/<name>")
"""What ``open_captions`` opens."""
IMAGE_COLUMN = "image"
# Keywords beside the name in one caption; it stays about the name.
_KEYWORDS = 3


class CaptionedImages(LabelledImages):
    """A map-style data set of images and what is said of them.

    ``dataset[i]`` is ``(image, i)``: a PIL image, RGB, or what ``transform`` makes of it, and its own index, by which
    ``captions`` are looked up. So ``SkipBroken``, ``Seeded`` and ``collate`` apply as to any data set, and where
    another image takes the place of a broken one the index is that of the image that came. There are no classes.

    Attributes:
        name: of the data set.
        classes: none.
        transform: applied to each image; None for none. May be set at any time.
    """

    def __init__(self, name: str, transform: Transform | None = None) -> None:
        super().__init__(name, [], transform)

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image ``index``, alternatives of each other, without decoding it: one or more."""

    def target(self, index: int) -> int:
        """The index of the image itself, never negative."""
        return self._place(index)

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index=} is out of range for {self!r}.")
        return index % len(self)

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} images with captions>"


class EmojiCaptions(CaptionedImages):
    """The emoji of ``gspn.data.Emoji``, with their names and keywords as captions.

    The first caption is the name. Each further one is the name and three keywords, in alphabetical order, of those
    that say more than the name does, until all are used.

    Args:
        split: ``"train"`` (1,546), ``"val"`` (360), or ``"all"``.
        transform: applied to each image.

    Raises:
        ValueError: another split.

    Example:
        >>> from gspn.data import EmojiCaptions
        >>> EmojiCaptions("val").captions(0)[:2]
        ('grinning face with smiling eyes', 'grinning face with smiling eyes, grin, happy, laugh')
    """

    def __init__(self, split: str = "train", *, transform: Transform | None = None) -> None:
        self.emoji = Emoji(split)
        super().__init__("emoji", transform)
        self._captions = [_say(record) for record in self.emoji.records]

    def __len__(self) -> int:
        return len(self.emoji)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, 64 x 64, before the transform."""
        return self.emoji.image(index)

    def captions(self, index: int) -> tuple[str, ...]:
        """The name of emoji ``index``, then the name with keywords."""
        return self._captions[self._place(index)]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The code points of emoji ``index`` as a file name, as in ``1f600.webp``."""
        return self.emoji.filename(index, basename, absolute)


def open_captions(
    name: str,
    split: str = "train",
    root: str | os.PathLike[str] | None = None,
    *,
    image_column: str = IMAGE_COLUMN,
    caption_column: str = TEXT_COLUMN,
    **options: Any,
) -> CaptionedImages:
    """Open images with captions by name.

    ===============  =========================================================================================
    ``"emoji"``      ``EmojiCaptions``: names, and names with keywords
    ``"folder"``     images anywhere below a folder, with ``a.txt`` beside ``a.png``, one caption a line; or named in
                     ``metadata.jsonl`` or ``metadata.csv``, with ``file_name`` and the caption column
    ``"wds"``        WebDataset shards: plain ``.tar`` files with ``a.jpg`` and ``a.txt``, or ``a.json``
    ``"hfds/name"``  a data set of the Hugging Face hub, ``root`` its cache; or a local one: the folder ``root/name``
                     or ``name``, written by ``save_to_disk`` or of any form that ``datasets.load_dataset`` takes
    ===============  =========================================================================================

    **Which split.** For ``"folder"`` and ``"wds"``, ``root/<split>/``, under any usual name of the split (``training``,
    ``validation``, ...; ``test`` is another split than ``val`` here); shards may also have the split at the beginning
    of their names, ``train-0000.tar``. Where nothing is named as a split, the root itself is ``"train"``; there is then
    no other split, as it would be the images that are trained on. ``"all"`` is the root itself, whatever it holds
    (shards of the root itself, not of its folders).

    **Which shards.** ``root`` is a folder, one ``.tar``, or a pattern: ``data/{split}-{0000..0003}.tar``, in which
    ``{split}`` is the split as it was asked for. Without ``{split}`` a pattern is ``"train"``, or ``"all"``.

    All captions are read here. An image without one is an error, and so is what could be read in two ways; captions
    have single blanks instead of line breaks.

    Args:
        name: see above.
        split: ``"train"``, ``"val"``, ``"all"``; for ``hfds/`` what the data set has.
        root: where the data is; none for ``"emoji"``.
        image_column: for ``hfds/``.
        caption_column: for ``hfds/``, metadata and ``.json``: strings, or lists of strings as alternatives.
        **options: ``transform``, for all; ``max_pixels`` of an image that is decoded, for all but ``"emoji"``;
            ``config`` and ``revision``, for ``hfds/``.

    Returns:
        A map-style data set of ``(image, index)``, with ``captions(index)``.

    Raises:
        ValueError: the name is unknown, the root is missing or has no such split, an image has no caption, or a file
            of captions or a shard is damaged.
        ImportError: ``datasets`` is not installed.

    Example:
        >>> from gspn.data import open_captions
        >>> dataset = open_captions("emoji", "val")
        >>> dataset
        <emoji: 360 images with captions>
        >>> dataset.captions(0)[0]
        'grinning face with smiling eyes'
    """
    prefix, _, rest = name.partition("/")
    if name not in ("emoji", "folder", "wds") and not (prefix == "hfds" and rest):
        raise ValueError(_unknown(name, prefix))
    if prefix != "hfds" and image_column != IMAGE_COLUMN:
        raise ValueError(f"{image_column=} has no meaning for {name!r}; leave it out.")
    if name == "emoji":
        if root is not None:
            raise ValueError(f"{root=} has no meaning for 'emoji', which needs none; leave it out.")
        if caption_column != TEXT_COLUMN:
            raise ValueError(f"{caption_column=} has no meaning for 'emoji'; leave it out.")
        return EmojiCaptions(split, **options)
    # These import the class above.
    if prefix == "hfds":
        _need("datasets", "datasets", name)
        from gspn.data.captions.hub import open_rows

        return open_rows(name, split, root, image_column=image_column, caption_column=caption_column, **options)
    if root is None:
        raise ValueError(f"{root=}: {name!r} needs root, the folder that holds the data.")
    if name == "folder":
        from gspn.data.captions.folder import CaptionedFolder

        return CaptionedFolder(root, split, caption_column=caption_column, **options)
    from gspn.data.captions.shards import CaptionedShards

    return CaptionedShards(root, split, caption_column=caption_column, **options)


def _unknown(name: str, prefix: str) -> str:
    near = difflib.get_close_matches(prefix, [one.partition("/")[0] for one in CAPTIONED], n=1)
    meant = next((f" Did you mean {one!r}?" for one in CAPTIONED if near and one.startswith(near[0])), "")
    return (
        f"{name=} is no data set with captions.{meant} There are {', '.join(map(repr, CAPTIONED))}. "
        "A folder of your own is name='folder' with root=..."
    )


def _say(record: EmojiRecord) -> tuple[str, ...]:
    known = _words(record.name)
    more = []
    for keyword in record.keywords:
        if not _words(keyword) <= known:
            more.append(keyword)
            known |= _words(keyword)
    parts = [more[first : first + _KEYWORDS] for first in range(0, len(more), _KEYWORDS)]
    return (record.name, *(", ".join([record.name, *part]) for part in parts))


def _words(text: str) -> set[str]:
    """Words in which case and a plural make no difference."""
    return {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}
