"""The pixels that a point of a photograph reaches: one ``line_scan`` in each direction, with taps from the photograph.

    python examples/spread.py --output runs/demo/spread.png

The input is an impulse on one pixel. On each line of a scan a pixel averages its three neighbours on the previous line,
here with more weight on those of its own colour: the logit of a tap is ``a - b * colour distance``. The result is the
point's column of the paper's affinity matrix, drawn as an image: a cone of 90 degrees, bent by the edges.

The fast kernels and the specification's loop both compute it. Their results are compared, and their times printed.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import gspn
from gspn._files import replaced
from gspn.bench import environment
from gspn.bench.accuracy_check import Accuracy, compare
from gspn.bench.report import plain_number
from gspn.bench.timing import Candidate, Timing, time_interleaved
from gspn.data import CorruptImageError, load_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHINA_POINT = (305, 238)  # under the temple's eaves: facade to the left and below, sky above, the lake to the right
LONGEST_SIDE = 1280
MOST_PIXELS = 100_000_000
README_BYTES = 400_000

# The logit of a tap: 0.95 of a gate for the same colour, 0.03 for colours a tenth of black-to-white apart.
SAME_COLOUR, PER_DISTANCE = 3.0, 40.0

DECADES = 20

REPEATS, MIN_TIME = 20, 0.1


# --- The photograph ---------------------------------------------------------------------------------------------------


def load_photograph(path: Path | None) -> tuple[Tensor, float]:
    """Load a file, or scikit-learn's temple, as ``[3, H, W]`` in 0 to 1, and return it with its scale.

    Raises:
        typer.BadParameter: the file is missing, damaged, not an image, or too large to be opened safely.
    """
    from PIL import Image

    if path is None:
        from sklearn.datasets import load_sample_image

        image = Image.fromarray(load_sample_image("china.jpg"))
    else:
        try:
            image = load_image(path, max_pixels=MOST_PIXELS)
        except (CorruptImageError, OSError) as error:
            raise typer.BadParameter(f"{path} cannot be read as an image: {error}", param_hint="--image") from None
    width = image.width
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1) / 255, image.width / width


def parse_point(text: str | None, photograph: Tensor, scale: float, is_default: bool) -> tuple[int, int]:
    """The point as ``(x, y)`` in pixels of the loaded photograph."""
    height, width = photograph.shape[1:]
    if text is None:
        return CHINA_POINT if is_default else (width // 2, height // 2)
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not X,Y in pixels, such as {CHINA_POINT[0]},{CHINA_POINT[1]}.", param_hint="--point"
        ) from None
    x, y = math.floor(x * scale), math.floor(y * scale)
    if not (0 <= x < width and 0 <= y < height):
        raise typer.BadParameter(
            f"{text} is outside the photograph of {round(width / scale)}x{round(height / scale)} pixels.",
            param_hint="--point",
        )
    return x, y


# --- The scans --------------------------------------------------------------------------------------------------------


def edge_aware_taps(photograph: Tensor, direction: gspn.Direction) -> Tensor:
    """Taps ``[1, 1, 3, H, W]`` with more weight on neighbours of the same colour.

    The neighbour of tap ``k`` is on the previous line, ``k - 1`` pixels across. ``roll`` moves its colour to the pixel.
    Where that wraps around, the neighbour does not exist: stochastic_taps leaves it out, or the scan does not use it.
    """
    logits = []
    for k in range(3):
        rows, columns = {"down": (1, 1 - k), "up": (-1, 1 - k), "right": (1 - k, 1), "left": (1 - k, -1)}[direction]
        neighbour = photograph.roll((rows, columns), dims=(1, 2))
        logits.append(SAME_COLOUR - PER_DISTANCE * (photograph - neighbour).norm(dim=0))
    return gspn.stochastic_taps(torch.stack(logits)[None, None], direction=direction)  # [1, 1, 3, H, W]


def impulse(photograph: Tensor, point: tuple[int, int]) -> Tensor:
    """``[1, 1, H, W]``: one at the point, zero elsewhere."""
    x = photograph.new_zeros(1, 1, *photograph.shape[1:])
    x[0, 0, point[1], point[0]] = 1
    return x


def scan_all(
    x: Tensor, taps: dict[gspn.Direction, Tensor]
) -> tuple[dict[gspn.Direction, Tensor], dict[gspn.Direction, Accuracy], dict[str, Timing]]:
    """Each direction's ``h`` and its error, and the times of the automatic choice and of the loop."""
    states, accuracy, candidates = {}, {}, []
    for direction, tap in taps.items():
        scan = partial(gspn.line_scan, direction=direction)
        states[direction] = scan(x, tap)
        exact = scan(x.double(), tap.double(), impl="reference")
        plain = scan(x, tap, impl="reference")
        accuracy[direction] = compare({"h": states[direction]}, {"h": plain}, {"h": exact})[0]
        candidates += [
            Candidate(f"auto {direction}", partial(scan, x, tap)),
            Candidate(f"loop {direction}", partial(scan, x, tap, impl="reference"), max_repeats=5),
        ]
    return states, accuracy, time_interleaved(candidates, x.device, repeats=REPEATS, min_time=MIN_TIME)


def results_table(x: Tensor, accuracy: dict[gspn.Direction, Accuracy], timings: dict[str, Timing]) -> Table:
    """The times and errors of each direction."""
    fast = next(name for name, reason in gspn.available_impls(x, op="line_scan").items() if reason is None)
    height, width = x.shape[2:]
    table = Table(
        title=f"line_scan of one {width}x{height} map, float32, {environment.device_name(x.device)}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("direction")
    for heading in (f"{fast}, ms", "loop, ms", "speed-up", "max error", "accepted"):
        table.add_column(heading, justify="right")
    for direction, figure in accuracy.items():
        auto, loop = timings[f"auto {direction}"].p50, timings[f"loop {direction}"].p50
        table.add_row(
            direction,
            plain_number(auto),
            plain_number(loop),
            f"{loop / auto:.0f}x",
            f"{figure.error:.1e}",
            f"{figure.bound:.1e}",
            style=None if figure.ok else "red",
        )
    table.caption = "error: against the loop in float64; accepted: twice the error of the float32 loop, or 4 roundings"
    table.caption_justify = "left"
    return table


# --- The image ------------------------------------------------------------------------------------------------------


def draw(photograph: Tensor, point: tuple[int, int], states: dict[gspn.Direction, Tensor], output: Path) -> None:
    """Draw the photograph, the result of each direction, and their sum as one image about 1800 pixels wide."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, NullLocator

    ink, muted = "#1f2430", "#5b6270"
    colours, norm = colormaps["inferno"], LogNorm(10.0**-DECADES, 1)
    height, width = photograph.shape[1:]
    grey = photograph.mean(0, keepdim=True).expand(3, -1, -1)
    dimmed = 0.42 * (0.75 * grey + 0.25 * photograph)

    def overlaid(h: Tensor) -> Tensor:
        level = (1 + h.double().clamp_min(1e-300).log10() / DECADES).clamp(0, 1)  # [H, W], 0 to 1 on the log scale
        colour = torch.from_numpy(colours(level.numpy())[..., :3]).permute(2, 0, 1)
        # Never opaque, because the photograph explains the shape.
        opacity = torch.where(level > 0, 0.35 + 0.5 * level, 0)
        return dimmed * (1 - opacity) + colour * opacity

    total = sum(states.values(), start=torch.zeros_like(states["down"]))
    panels = [
        ("the photograph and a point", photograph),
        *((direction, overlaid(states[direction][0, 0])) for direction in gspn.DIRECTIONS),
        ("all four, summed", overlaid(total[0, 0])),
    ]
    figure = Figure(
        figsize=(11.25, 2 * 3.36 * min(height / width, 3) + 1.5),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06, wspace=0, hspace=0),
    )
    axes = figure.subplots(2, 3)
    for axis, (title, image) in zip(axes.flat, panels, strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="lanczos")
        axis.set_title(title, loc="left", fontsize=11.5, color=ink, fontweight="bold", pad=4)
        axis.set_axis_off()
        axis.plot(*point, "o", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=3)
        axis.plot(*point, "o", markersize=9, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.6)
        if title in gspn.DIRECTIONS:
            draw_cone(axis, point, title, width, height)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=axes, location="right", aspect=42, shrink=0.9, pad=0.012, fraction=0.03
    )
    bar.ax.yaxis.set_major_locator(FixedLocator([10.0**-d for d in range(0, DECADES + 1, 5)]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=muted)
    bar.set_label("share of the point in each pixel, log scale", fontsize=9.5, color=muted)
    figure.suptitle(
        "What one point of a photograph reaches", x=0.0044, ha="left", fontsize=16, color=ink, fontweight="bold"
    )
    figure.supxlabel(
        "On every line of a scan a pixel averages three neighbours of the line before, here mostly those of its own "
        "colour: edges bend the cone.\nDashed: the 90\N{DEGREE SIGN} cone that one scan reaches. "
        f"Below $10^{{-{DECADES}}}$ nothing is drawn.",
        x=0.0044,
        ha="left",
        fontsize=9.5,
        color=muted,
    )
    with replaced(output) as part:
        figure.savefig(part, dpi=160, facecolor="white", format="png")


def draw_cone(axis: Axes, point: tuple[int, int], direction: str, width: int, height: int) -> None:
    """Draw the two edges of the cone that a scan can reach from the point, up to the frame."""
    along = {"down": (0, 1), "up": (0, -1), "right": (1, 0), "left": (-1, 0)}[direction]
    for side in (-1, 1):
        step = (along[0] or side, along[1] or side)
        room = [
            (limit - 1 - start if move > 0 else start)
            for start, move, limit in zip(point, step, (width, height), strict=True)
        ]
        reach = min(room)
        axis.plot(
            [point[0], point[0] + reach * step[0]],
            [point[1], point[1] + reach * step[1]],
            color="white",
            alpha=0.55,
            linewidth=0.9,
            linestyle=(0, (5, 4)),
        )


def write_readme_copy(image: Path, copy: Path) -> None:
    """Write a copy of at most 400 kB with 256 colours, as wide as that allows."""
    from PIL import Image

    with Image.open(image) as file:
        full = file.convert("RGB")
    with replaced(copy) as part:
        for width in range(min(1300, full.width), 400, -100):
            small = full.resize((width, round(full.height * width / full.width)), Image.Resampling.LANCZOS)
            reduced = small.quantize(palette=small.quantize(256, kmeans=2))
            # Pillow looks up the nearest colour coarsely and turns white into light grey, which is corrected here.
            entries = reduced.getpalette() or []
            brightest = max(range(len(entries) // 3), key=lambda i: sum(entries[3 * i : 3 * i + 3]))
            entries[3 * brightest : 3 * brightest + 3] = 255, 255, 255
            reduced.putpalette(entries)
            reduced.paste(brightest, mask=small.convert("L").point([0] * 255 + [255]))
            reduced.save(part, format="png", optimize=True)
            if part.stat().st_size <= README_BYTES:
                return


# --- The command ------------------------------------------------------------------------------------------------------


def main(
    output: Annotated[Path, typer.Option(dir_okay=False, help="PNG to write.")] = Path("runs/demo/spread.png"),
    image: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A photograph of your own. Default: scikit-learn's temple.")
    ] = None,
    point: Annotated[
        str | None, typer.Option(metavar="X,Y", help="The point, in pixels. Default: under the eaves, or the centre.")
    ] = None,
    readme: Annotated[Path | None, typer.Option(dir_okay=False, help="A copy of at most 400 kB to write too.")] = None,
) -> None:
    """Draw what one point of a photograph reaches with a line scan in each direction."""
    console = Console()
    photograph, scale = load_photograph(image)
    where = parse_point(point, photograph, scale, image is None)
    x = impulse(photograph, where)
    taps: dict[gspn.Direction, Tensor] = {d: edge_aware_taps(photograph, d) for d in gspn.DIRECTIONS}
    states, accuracy, timings = scan_all(x, taps)
    console.print(results_table(x, accuracy, timings))
    if not all(figure.ok for figure in accuracy.values()):
        Console(stderr=True).print("[bold red]error:[/] the result differs from the specification; no image is drawn.")
        raise typer.Exit(1)
    draw(photograph, where, states, output)
    console.print(f"[dim]wrote[/] {escape(str(output))}", highlight=False, soft_wrap=True)
    if readme is not None:
        write_readme_copy(output, readme)
        console.print(f"[dim]wrote[/] {escape(str(readme))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
