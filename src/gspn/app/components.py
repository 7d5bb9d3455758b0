"""The parts that tabs share: images to bring or to choose, how images are shown, and errors in one line."""

from __future__ import annotations

import html
import importlib.util
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .._errors import MissingExtraError, UsageError
from ..data import CorruptImageError, Emoji, MNIST5k, load_image

MAX_BYTES = 20 * 2**20
"""The limit of a file that is uploaded."""
MAX_PIXELS = 50_000_000
"""The limit of pixels of an image that is uploaded."""
SHOWN_SIDE = 512
"""The longer side of images on the page."""

EVENT: dict[str, Any] = {"concurrency_id": "computation", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of every event: the page computes one thing at a time, and no event is an API for programs."""

_EMOJI = ("owl", "watermelon", "sailboat", "maple leaf")
_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
_SEEN_SIDE = 1024


def open_upload(path: Path) -> Image.Image:
    """Open an image that somebody uploaded, as :func:`gspn.data.load_image` does, and reduce it to 1024 pixels a side.

    Raises:
        UsageError: it has more than :data:`MAX_BYTES` or :data:`MAX_PIXELS`, or cannot be decoded; no file is named.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"The image has {size:,} bytes; at most {MAX_BYTES:,} are opened. Reduce it first.")
    try:
        image = load_image(path, max_pixels=MAX_PIXELS, name="The image")
    except CorruptImageError as error:
        # The remedies after the first sentence are those of a program that opens its own files.
        reason = error.reason.partition(". ")[0].rstrip(".").replace("max_pixels=", "the limit of ")
        raise UsageError(f"The image: {reason}.") from None
    image.thumbnail((_SEEN_SIDE, _SEEN_SIDE), Image.Resampling.LANCZOS)
    return image


def enlarged(image: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """The image with a longer side of ``side`` pixels; small images keep their pixels visible.

    Example:
        >>> enlarged(Image.new("RGB", (28, 14))).size, enlarged(Image.new("RGB", (1000, 2000))).size
        ((512, 256), (256, 512))
    """
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


@cache
def examples() -> list[Image.Image]:
    """Images to begin with: emoji that no shipped classifier learnt, a digit, and scikit-learn's photographs.

    The last three are left out where the packages that they come with are not installed.
    """
    emoji = Emoji("val")
    names = [record.name for record in emoji.records]
    images = [emoji.image(names.index(name)) for name in _EMOJI]
    try:
        digits = MNIST5k("val")
        images.append(digits.image(digits.targets.index(3)))
    except MissingExtraError:
        pass
    spec = importlib.util.find_spec("sklearn")  # importing it takes seconds
    folder = Path("." if spec is None or spec.origin is None else spec.origin).parent / "datasets" / "images"
    return [*images, *(load_image(folder / name) for name in _PHOTOGRAPHS if (folder / name).is_file())]


def image_and_examples(elem_id: str) -> tuple[gr.Image, gr.Gallery]:
    """An image to bring, and examples below it."""
    limits = f"at most {MAX_BYTES // 2**20} MB and {MAX_PIXELS // 10**6} million pixels"
    upload = gr.Image(
        label="Your image", elem_id=elem_id, height=414, sources=["upload", "clipboard"],
        type="pil", format="png", buttons=[],
        placeholder=f"Drop, paste or choose an image\n{limits}",
    )  # fmt: skip
    gallery = gr.Gallery(
        label="Examples", columns=7, allow_preview=False, height="auto", object_fit="contain", buttons=[],
        format="png", interactive=False,
        elem_classes="images examples",
    )  # fmt: skip

    def thumbnails() -> list[Image.Image]:
        return [enlarged(image, 128) for image in examples()]

    gr.on(None, thumbnails, None, gallery, api_visibility="private")  # when the page is opened

    def opened(payload: Any) -> Image.Image | None:
        with errors_on_page():
            return None if payload is None else open_upload(Path(payload.path))

    # gradio's own decodes whatever Pillow knows, without limits. A subclass would write a .pyi beside this file.
    setattr(upload, "preprocess", opened)  # noqa: B010
    return upload, gallery


def on_image(
    upload: gr.Image, gallery: gr.Gallery, function: Callable[..., Any], inputs: Any, outputs: Any, results: list[Any]
) -> None:
    """Call ``function`` with an image that was uploaded or chosen, and with the values of ``inputs``.

    ``results`` are the outputs that belong to the image before, and are emptied first. Progress and errors are shown on
    the first of them.
    """
    on: dict[str, Any] = {"show_progress_on": results[0], **EVENT}

    def empty() -> list[None]:
        return [None] * len(results)

    # An image that is refused stays on the page, and nothing there may be about the one before.
    upload.upload(empty, None, results, **on).then(function, [upload, *inputs], outputs, **on)
    upload.clear(empty, None, results, **on)

    def chosen(event: gr.SelectData, *values: Any) -> Any:
        return function(examples()[event.index], *values)

    gallery.select(chosen, list(inputs), outputs, **on)


@contextmanager
def errors_on_page() -> Iterator[None]:
    """Show errors in one line on the page; a bug, and what names a place on this machine, in the terminal instead."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        text = re.sub(r"\s+", " ", str(error)).strip()
        if not isinstance(error, UsageError | MissingExtraError):
            traceback.print_exception(error)
            text = f"This failed ({type(error).__name__}); the terminal of `gspn app` has the reason."
        elif re.search(r"(^|[\s'\"(])(/|\\|[A-Za-z]:[/\\])\w", text):
            print(f"gspn app: {text}", flush=True)
            text = "This model cannot be used; the terminal of `gspn app` has the reason."
        raise gr.Error(html.escape(text), print_exception=False) from None
