"""Images in class folders, or in a tar of them."""

from __future__ import annotations

import os
import posixpath
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .._errors import UsageError
from .._files import open_regular, printable
from .base import LabelledImages, Transform
from .files import HIDDEN, LOOSE, NOT_IMAGES, LeftOut, image_files, is_hidden, is_image, natural_order
from .images import EXTENSIONS, MAX_PIXELS, load_image
from .splits import choose_split, split_folder
from .tars import members, read_member

_NO_FILE = ("link or device", "links and devices")
_REPLACED = ("file that a later one of its name replaces", "files that later ones of their names replace")


class ClassFolder(LabelledImages):
    """The images below a folder of class folders; see ``open_dataset``.

    The folder that an image is in is its class, whatever is above it. Both images and classes are in
    :func:`~gspn.data.files.natural_order`. Images beside the class folders are left out. Where there is no class folder
    there are no classes: every target is 0.

    Attributes:
        root: the folder of the split.
        left_out: what is left out.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.max_pixels, self.left_out = max_pixels, LeftOut()
        self.root, paths = self._files(root, split)
        every = natural_order(paths)
        if not every:
            raise UsageError(
                f"{printable(self.root)} holds no image in a folder of its class "
                f"({', '.join(sorted(EXTENSIONS))}); {self.left_out}."
            )
        self.paths = [path for path in every if "/" in path] or every
        if len(self.paths) < len(every):
            self.left_out.add(LOOSE, *(path for path in every if "/" not in path))
        own = natural_order({class_of(path) for path in self.paths} - {""})
        index = index_of_classes(own if classes is None else classes)
        super().__init__("folder", list(index), transform)
        if classes and not own:
            raise UsageError(
                f"{printable(self.root)} has images and no class folders; put them in a folder for each class. "
                f"{self.left_out}."
            )
        unknown = [name for name in own if name not in index]
        if unknown:
            raise UsageError(
                f"{printable(self.root)} has classes that are not in classes={self.classes}: {unknown[:10]}."
            )
        self.targets = array("q", (index.get(class_of(path), 0) for path in self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        path = self.paths[index]
        return load_image(self.root / path, max_pixels=self.max_pixels, name=path)

    def target(self, index: int) -> int:
        """The class of image ``index``; 0 where there are no classes."""
        return self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, within the folder of the split unless ``absolute``."""
        path = self.paths[index]
        return posixpath.basename(path) if basename else str(self.root / path) if absolute else path

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self.targets[index]

    def _files(self, root: Path, split: str) -> tuple[Path, Sequence[str]]:
        """The folder of the split, and the paths of the images in it."""
        root = split_folder(root, split)
        paths, self.left_out = image_files(root)
        return root, paths


class ClassTar(ClassFolder):
    """The images in an uncompressed tar of class folders; see ``open_dataset``. Of two equal paths the last counts."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Arrays, because each worker that reads a list of numbers gets its own copy of it.
        self._offsets = array("q", (self._places[path][0] for path in self.paths))
        self._sizes = array("q", (self._places[path][1] for path in self.paths))
        del self._places

    def _files(self, root: Path, split: str) -> tuple[Path, Sequence[str]]:
        places, others = dict[str, tuple[int, int]](), list[tuple[tuple[str, str], str]]()
        with open_regular(root) as file:
            for member in members(file, root):
                path = posixpath.normpath(member.name).lstrip("/")
                if any(is_hidden(part) and part != ".." for part in path.split("/")):
                    others.append((HIDDEN, path))
                elif member.isdir():
                    continue
                elif not member.isreg() or member.sparse is not None:
                    others.append((_NO_FILE, path))
                elif not is_image(path):
                    others.append((NOT_IMAGES, path))
                else:
                    if path in places:
                        others.append((_REPLACED, path))
                    places[path] = member.offset_data, member.size
        folders = {path.partition("/")[0] for path in places if "/" in path}
        part = choose_split(split, folders.__contains__, f"root={str(root)!r}")
        start = "" if part == "all" else f"{part}/"
        for kind, path in others:
            if path.startswith(start):
                self.left_out.add(kind, path.removeprefix(start))
        self._tar = root
        self._places = {path.removeprefix(start): place for path, place in places.items() if path.startswith(start)}
        return root / start, list(self._places)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        place = self._offsets[index], self._sizes[index]
        return read_member(self._tar, *place, self.paths[index], self.max_pixels)


def class_of(path: str) -> str:
    """The class of an image by its path: the folder that it is in; empty if it is in none.

    Example:
        >>> class_of("animals/cat/1.png"), class_of("1.png")
        ('cat', '')
    """
    return posixpath.basename(posixpath.dirname(path))


def index_of_classes(classes: Sequence[str]) -> dict[str, int]:
    """From the names of classes to their indices.

    Raises:
        UsageError: a name is empty or there twice.

    Example:
        >>> index_of_classes(["cat", "dog"])
        {'cat': 0, 'dog': 1}
    """
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise UsageError(f"classes={classes!r} is not a list of names of classes.")
    index = {name: i for i, name in enumerate(classes)}
    if len(index) < len(classes) or "" in index:
        twice = next((name for i, name in enumerate(classes) if index[name] != i), "")
        raise UsageError(f"the class {twice!r} is {'there twice' if twice else 'without a name'}; give each its own.")
    return index


def open_folder(
    split: str,
    root: str | os.PathLike[str],
    *,
    transform: Transform | None = None,
    classes: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    search_split: bool = True,
) -> ClassFolder:
    """Open a folder of class folders, or a tar of one; see ``open_dataset``."""
    path = Path(root)
    kind = ClassTar if path.suffix == ".tar" and path.is_file() else ClassFolder
    return kind(path, split if search_split else "all", classes, transform, max_pixels)
