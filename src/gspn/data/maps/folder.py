"""Images and their maps in two folders."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..._errors import UsageError
from ..._files import printable
from ..files import NOT_IMAGES, LeftOut, is_image, natural_order, walk
from ..images import MAX_PIXELS, load_image
from ..splits import TRAIN, choose_split
from .base import CLASSES_FILE, Map, MappedImages, MapTransform, checked_classes, read_classes
from .decoding import EXTENSIONS, MapRule, load_map

_NO_IMAGE = ("map without an image", "maps without images")


class MappedFolder(MappedImages):
    """Images in ``root/<split>/images`` and their maps in ``root/<split>/labels``, with the same names; see
    ``open_maps``. The folders of the split may also be inside: ``root/images/<split>``.

    Attributes:
        left_out: what is left out.
    """

    def __init__(
        self,
        split: str,
        root: str | os.PathLike[str],
        *,
        images: str = "images",
        labels: str = "labels",
        classes: Sequence[str] | None = None,
        unit: str | None = None,
        ignore: float | None = 255,
        first: int = 0,
        scale: float = 1.0,
        transform: MapTransform | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root, self.max_pixels, self.left_out = Path(root), max_pixels, LeftOut()
        named = checked_classes(classes)
        if named is None and unit is None:
            listed = self.root / CLASSES_FILE
            if not listed.is_file():
                raise UsageError(
                    f"{printable(self.root)} has no {CLASSES_FILE}; write it, with the name of a class in each line, "
                    "pass classes=[...], or, where maps hold numbers, unit=NAME."
                )
            named = read_classes(listed)
        super().__init__("folder", named, unit, transform)
        self.rule = MapRule(named, ignore, first, scale)
        self._folders = [self._find(kind, split) for kind in (images, labels)]
        paths, maps = self._walk(*self._folders)
        without = [path for path in paths if posixpath.splitext(path)[0] not in maps]
        if without:
            raise UsageError(
                f"{len(without):,} of {len(paths):,} images in {printable(self._folders[0])} have no map in "
                f"{printable(self._folders[1])} ({', '.join(sorted(EXTENSIONS))}): "
                f"{', '.join(map(printable, without[:3]))}; {self.left_out}."
            )
        if not paths:
            raise UsageError(f"{printable(self._folders[0])} holds no images; {self.left_out}.")
        self.paths = natural_order(paths)
        self.maps = [maps[posixpath.splitext(path)[0]] for path in self.paths]
        used = {posixpath.splitext(path)[0] for path in paths}
        self.left_out.add(_NO_IMAGE, *(path for stem, path in maps.items() if stem not in used))

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        """Image ``index``, RGB."""
        path = self.paths[index]
        return load_image(self._folders[0] / path, max_pixels=self.max_pixels, name=path)

    def map(self, index: int) -> Map:
        """The map of image ``index``."""
        path = self.maps[index]
        return load_map(self._folders[1] / path, self.rule, max_pixels=self.max_pixels, name=path)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of image ``index``, within the folder of images unless ``absolute``."""
        path = self.paths[index]
        return posixpath.basename(path) if basename else str(self._folders[0] / path) if absolute else path

    def _find(self, kind: str, split: str) -> Path:
        """The folder of the images or of the maps of a split."""
        if not self.root.is_dir():
            raise ValueError(f"root={str(self.root)!r} is not a folder.")
        layouts = (lambda name: self.root / name / kind, lambda name: self.root / kind / name)
        divided = False
        for layout in layouts:
            try:
                name = choose_split(split, lambda name, at=layout: at(name).is_dir(), "root")
            except ValueError:  # it has splits, and not this one
                divided = True
                continue
            if name != "all":
                return layout(name)
        if (split == "all" or (split in TRAIN and not divided)) and (self.root / kind).is_dir():
            return self.root / kind  # not divided, or everything
        raise UsageError(
            f"{printable(self.root)} has no folder {split}/{kind} and no {kind}/{split}; name the folders by "
            "images=NAME and labels=NAME, or pass another split."
        )

    def _walk(self, images: Path, labels: Path) -> tuple[list[str], dict[str, str]]:
        """The images, and the maps by their names without the ending."""
        listed: list[list[str]] = []
        for folder, fits in ((images, is_image), (labels, is_map)):
            every = walk(folder, self.left_out)
            self.left_out.add(NOT_IMAGES, *(path for path in every if not fits(path)))
            listed.append([path for path in every if fits(path)])
        stems: dict[str, str] = {}
        for folder, paths in zip((images, labels), listed, strict=True):
            stems = {}
            for path in paths:
                stem = posixpath.splitext(path)[0]
                if stem in stems:
                    raise UsageError(
                        f"{printable(folder)} has {printable(stems[stem])} and {printable(path)}; their names may not "
                        "differ in the ending alone."
                    )
                stems[stem] = path
        return listed[0], stems


def is_map(name: str) -> bool:
    """Whether the name has the extension of a map, in upper or lower case."""
    return posixpath.splitext(name)[1].lower() in EXTENSIONS
