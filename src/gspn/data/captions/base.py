"""``CaptionedImages``: the interface of all data sets with captions."""

from __future__ import annotations

from ..base import LabelledImages, Transform
from .parsing import CaptionTexts

IMAGE_COLUMN, TEXT_COLUMN = "image", "text"
"""The default names of the columns of images and captions."""


class CaptionedImages(LabelledImages):
    """A map-style data set of images and their captions.

    ``dataset[i]`` is ``(image, i)``: an RGB PIL image, or the result of ``transform``, and its own index, by which
    ``captions`` are looked up. So ``SkipCorrupt``, ``DeterministicAugmentation`` and ``collate`` apply as to any data
    set. Where another image replaces a corrupt one, the index is that of the replacement. ``classes`` is empty.

    Subclasses append the captions of each image to ``texts``.
    """

    def __init__(self, name: str, transform: Transform | None = None) -> None:
        super().__init__(name, [], transform)
        self.texts = CaptionTexts()

    def __len__(self) -> int:
        return len(self.texts)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of image ``index``, one or more alternatives, without decoding it."""
        return self.texts[self._position(index)]

    def target(self, index: int) -> int:
        """The index of the image itself, never negative."""
        return self._position(index)

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self)} images with captions>"
