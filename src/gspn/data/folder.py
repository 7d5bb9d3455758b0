"""Images in class folders, or in a tar of them."""

from __future__ import annotations

import os
import posixpath
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from .._errors import UsageError
from .._files import open_regular, printable
from .base import LabelledImages, Transform
from .files import (
    HIDDEN,
    LOOSE,
    NOT_IMAGES,
    LeftOut,
    image_files,
    is_hidden,
    is_image,
    natural_order,
)
from .images import EXTENSIONS, MAX_PIXELS, load_image
from .splits import split_folder
from .tars import members, read_member

_NO_FILE = ("link or device", "links and devices")
_REPLACED = ("file that a later one of its name replaces", "files that later ones of their names replace")


class _ClassFolders(LabelledImages):
    """Images by their paths. The folder that an image is in is its class, whatever is above it.

    Both images and classes are in :func:`~gspn.data.files.natural_order`. Images beside the class folders are left
    out. Where there is no class folder there are no classes: every target is 0.

    Attributes:
        left_out: what is left out.
    """

    def __init__(
        self,
        root: Path,
        paths: Iterable[str],
        left_out: LeftOut,
        classes: Sequence[str] | None,
        transform: Transform | None,
        max_pixels: int,
    ) -> None:
        self.root, self.left_out, self.max_pixels = root, left_out, max_pixels
        every = natural_order(paths)
        if not every:
            raise UsageError(
                f"{printable(root)} holds no image in a folder of its class "
                f"({', '.join(sorted(EXTENSIONS))}); {left_out}."
            )
        self.paths = [path for path in every if "/" in path] or every
        if len(self.paths) < len(every):
            left_out.add(LOOSE, *(path for path in every if "/" not in path))
        own = natural_order({class_of(path) for path in self.paths} - {""})
        index = index_of_classes(own if classes is None else classes)
        super().__init__("folder", list(index), transform)
        if classes and not own:
            raise UsageError(
                f"{printable(root)} has images and no class folders; put them in a folder for each class. {left_out}."
            )
        unknown = [name for name in own if name not in index]
        if unknown:
            raise UsageError(f"{printable(root)} has classes that are not in classes={self.classes}: {unknown[:10]}.")
        self.targets = array("q", (index.get(class_of(path), 0) for path in self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def target(self, index: int) -> int:
        """The class of image ``index``; 0 where there are no classes."""
        return self.targets[index]

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, within the folder or tar unless ``absolute``."""
        path = self.paths[index]
        return posixpath.basename(path) if basename else str(self.root / path) if absolute else path

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), self.targets[index]


class ClassFolder(_ClassFolders):
    """The images below a folder of class folders; see ``open_dataset``."""

    def __init__(
        self,
        root: Path,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(root, *image_files(root), classes, transform, max_pixels)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        path = self.paths[index]
        return load_image(self.root / path, max_pixels=self.max_pixels, name=path)


class ClassTar(_ClassFolders):
    """The images in an uncompressed tar of class folders; see ``open_dataset``. Of two equal paths the last counts."""

    def __init__(
        self,
        root: Path,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        left_out, places = LeftOut(), dict[str, tuple[int, int]]()
        with open_regular(root) as file:
            for member in members(file, root):
                path = posixpath.normpath(member.name).lstrip("/")
                if any(is_hidden(part) and part != ".." for part in path.split("/")):
                    left_out.add(HIDDEN, path)
                elif member.isdir():
                    continue
                elif not member.isreg() or member.sparse is not None:
                    left_out.add(_NO_FILE, path)
                elif not is_image(path):
                    left_out.add(NOT_IMAGES, path)
                else:
                    if path in places:
                        left_out.add(_REPLACED, path)
                    places[path] = member.offset_data, member.size
        super().__init__(root, places, left_out, classes, transform, max_pixels)
        # Arrays, because each worker that reads a list of numbers gets its own copy of it.
        self._offsets = array("q", (places[path][0] for path in self.paths))
        self._sizes = array("q", (places[path][1] for path in self.paths))

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB, before the transform."""
        place = self._offsets[index], self._sizes[index]
        return read_member(self.root, *place, self.paths[index], self.max_pixels)


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
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
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
) -> LabelledImages:
    """Open a folder of class folders, or a tar of one; see ``open_dataset``."""
    path = Path(root)
    if path.suffix == ".tar" and path.is_file():
        return ClassTar(path, classes, transform, max_pixels)
    return ClassFolder(split_folder(path, split if search_split else "all"), classes, transform, max_pixels)
