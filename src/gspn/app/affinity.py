"""The tab *Pixel*: click a pixel, and see what it takes from every other in a layer of a classifier."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from ..analysis.drawing import COLOURS, affinity_limits, overlay
from .components import EVENT, enlarged, errors_on_page, examples, image_and_examples, on_image
from .models import Models

ALL = "all"
DIRECTIONS = {
    ALL: "all directions",
    "down": "from above",
    "up": "from below",
    "right": "from the left",
    "left": "from the right",
}
"""The choices, with the words for each direction of :data:`gspn.DIRECTIONS`: where information comes from."""

_MOST_SEEN = 448


@dataclass(frozen=True)
class Look:
    """An image as a model saw it once, with the input of every scan, so that a click does not run the model again."""

    image: Image.Image
    model: str
    scans: dict[str, tuple[Any, Tensor]]
    """The module and its input ``[1, C, H, W]``, by the module's name."""

    @property
    def layers(self) -> list[tuple[str, str]]:
        """The label and the name of each layer, in the order of the model."""
        return [(_label(name, x), name) for name, (_, x) in self.scans.items()]


@torch.no_grad()
def look(model: Any, image: Image.Image, side: int) -> Look:
    """Run a model on an image whose longer side is scaled to ``side`` pixels.

    Args:
        model: a :class:`gspn.analysis.loading.LoadedModel` with scans.
        image: in RGB.
        side: in pixels.

    Example:
        >>> from gspn.app.models import Models
        >>> seen = look(Models().classifier("gspn_pico.mnist5k"), Image.new("RGB", (40, 20)), 28)
        >>> seen.layers[0]
        ('stage 0, block 0 (14 x 7)', 'stages.0.blocks.0.mixer.gspn')
    """
    from ..analysis.scans import visit_scans

    scale = side / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pixels = _tensor(small).to(next(model.model.parameters()).device)
    scans: dict[str, tuple[Any, Tensor]] = {}
    visit_scans(model.model, model.normalize(pixels), lambda name, module, x: scans.update({name: (module, x)}))
    return Look(image, model.name, scans)


def draw(seen: Look, layer: str, direction: str, point: tuple[float, float]) -> tuple[Image.Image, str]:
    """The affinity of a point to every pixel, over the image, and its legend as HTML.

    Args:
        seen: the result of :func:`look`.
        layer: the name of one of its layers.
        direction: one of :data:`DIRECTIONS`.
        point: (x, y) as shares of the width and the height, from 0 up to 1.
    """
    from ..analysis.influence import affinity_rows

    start = time.perf_counter()
    module, x = seen.scans[layer]
    rows, columns = x.shape[-2:]
    each, together = affinity_rows(module, x, (int(point[1] * rows), int(point[0] * columns)))
    maps = {name: row.abs().mean(0) for name, row in {ALL: together, **each}.items()}  # [h, w]
    shown = enlarged(seen.image)
    pixels = overlay(_tensor(shown), maps[direction], affinity_limits(list(maps.values())))
    centre = (point[0] * shown.width, point[1] * shown.height)
    drawn = _image(_ringed(pixels, centre))
    shares = {name: maps[name].sum().item() for name in each}
    seconds = time.perf_counter() - start
    return drawn, _legend(layer, x, direction, maps[direction], shares, seconds)


def _legend(layer: str, x: Tensor, direction: str, map_: Tensor, shares: dict[str, float], seconds: float) -> str:
    """The colour scale, and the map in words."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = ", ".join(to_hex(colormaps[COLOURS](i / 8)) for i in range(9))
    total = sum(shares.values()) or 1.0
    each = ", ".join(f"<b>{shares[name] / total:.0%}</b> {DIRECTIONS[name]}" for name in shares)
    values = map_.flatten().sort(descending=True).values.cumsum(0)
    half = int((values < values[-1] / 2).sum()) + 1
    what = (
        "what it takes" if direction == ALL else f"what it takes {DIRECTIONS[direction]} (direction <i>{direction}</i>)"
    )
    return (
        f'<div class="scale"><span>takes little</span><div style="background: linear-gradient(to right, {scale})">'
        f"</div><span>takes much</span></div><p>The ring is the pixel that you clicked; the colours are {what}, on a "
        f"logarithmic scale. Half of it lies on <b>{half / len(values):.1%}</b> of the image.</p>"
        f"<p>By direction, it takes {each}.</p><p class=faint>{_label(layer, x)}, {x.shape[1]} channels. The mean "
        f"magnitude over channels, for one layer with its weights fixed. {seconds:.2f} s.</p>"
    )


def _label(layer: str, x: Tensor) -> str:
    from ..analysis.scans import position

    return f"{position(layer)} ({x.shape[3]} x {x.shape[2]})"


def _tensor(image: Image.Image) -> Tensor:
    """``[3, H, W]`` in 0 to 1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def _ringed(pixels: Tensor, centre: tuple[float, float], radius: float = 10.0) -> Tensor:
    """The image with a white ring with black rims, whose edges are smooth."""
    rows, columns = pixels.shape[1:]
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    distance = (torch.hypot(x - centre[0], y - centre[1]) - radius).abs()
    for width, colour in ((3.4, 0.0), (1.6, 1.0)):
        cover = (width + 0.5 - distance).clamp(0, 1)
        pixels = pixels * (1 - cover) + colour * cover
    return pixels


def add_tab(page: gr.Blocks, models: Models) -> None:
    """Put the tab onto the page."""
    gr.Markdown(
        "**What a pixel sees.** Click a pixel of the image, and see what it takes from every other pixel in one layer "
        "of a classifier. A GSPN layer scans the image in four directions, and the map is one row of the matrix that "
        "these scans amount to."
    )
    with gr.Row():
        with gr.Column(min_width=300):
            upload, gallery = image_and_examples("affinity-image")
        with gr.Column(min_width=300):
            map_ = gr.Image(
                label="What the pixel takes (click here, too)", type="pil", format="png", interactive=False, height=380,
                buttons=["download", "fullscreen"], elem_id="affinity-map",
            )  # fmt: skip
            direction = gr.Radio(
                [(text, name) for name, text in DIRECTIONS.items()], value=ALL, label="Direction",
                elem_id="affinity-direction",
            )  # fmt: skip
            words = gr.HTML(elem_classes="legend", elem_id="affinity-legend")
    with gr.Row():
        layer = gr.Dropdown([], label="Layer", elem_id="affinity-layer", min_width=200)
        model = gr.Dropdown(models.classifiers, label="Model", min_width=200, elem_id="affinity-model")
        side = gr.Radio([], label="The model sees the image at", info="pixels of the longer side", min_width=200)
    seen, point = gr.State(None), gr.State((0.5, 0.5))

    def new_image(
        image: Image.Image | None,
        name: str,
        size: int | None,
        old: str | None,
        direction_: str,
        where: Any = (0.5, 0.5),
    ) -> Any:
        with errors_on_page():
            if image is None:
                return [gr.skip()] * 7
            loaded = models.classifier(name)
            trained = max(loaded.input_size[1:])
            sides = [trained * factor for factor in (1, 2, 4) if factor == 1 or trained * factor <= _MOST_SEEN]
            seen_at = size if size is not None and size in sides else sides[-1]
            new = look(loaded, image, seen_at)
            chosen = old if old in new.scans else new.layers[min(1, len(new.layers) - 1)][1]
            return [
                enlarged(image), new, where, gr.Radio(choices=sides, value=seen_at),
                gr.Dropdown(choices=new.layers, value=chosen), *draw(new, chosen, direction_, where),
            ]  # fmt: skip

    def redraw(look_: Look | None, layer_: str, direction_: str, where: tuple[float, float]) -> Any:
        with errors_on_page():
            return [gr.skip()] * 2 if look_ is None else draw(look_, layer_, direction_, where)

    def clicked(look_: Look | None, layer_: str, direction_: str, event: gr.SelectData) -> Any:
        with errors_on_page():
            if look_ is None:
                return [gr.skip()] * 3
            width, height = enlarged(look_.image).size
            where = tuple(
                min(max(at + 0.5, 0.5), most - 0.5) / most
                for at, most in zip(event.index, (width, height), strict=True)
            )
            return where, *draw(look_, layer_, direction_, where)

    def again(look_: Look | None, *values: Any) -> Any:
        return new_image(None if look_ is None else look_.image, *values)

    settings = [model, side, layer, direction]
    outputs = [upload, seen, point, side, layer, map_, words]
    on_image(upload, gallery, new_image, settings, outputs, [map_, words, seen])
    page.load(lambda *values: new_image(examples()[0], *values), settings, outputs, show_progress_on=map_, **EVENT)
    for image in (upload, map_):
        image.select(clicked, [seen, layer, direction], [point, map_, words], show_progress="hidden", **EVENT)
    for choice in (layer, direction):
        choice.input(redraw, [seen, layer, direction, point], [map_, words], show_progress="hidden", **EVENT)
    for choice in (model, side):
        choice.input(again, [seen, *settings, point], outputs, show_progress="hidden", **EVENT)
