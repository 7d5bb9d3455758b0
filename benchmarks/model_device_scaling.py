"""One SDXL image over 1 to 64 cards, by a model: nothing is measured.

    python benchmarks/model_device_scaling.py [--output CSV] [--plot PNG]

A call of the UNet with GSPN, in bfloat16, with the image split by rows as in docs/distributed.md. The layers are those
of diffusers' UNet (``gspn.bench.unet_layers``), all linear in the number of pixels. A layer takes the larger of two
times: its operations at the rate of the card, and its inputs and output at the bandwidth of its memory. Then come what
a card sends and a latency for every exchange; nothing overlaps. Strong scaling divides one image, weak scaling gives
each card as many pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Csv, print_table, write_csv
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gspn._figures import save_figure
from gspn.bench.gpu_model import CARDS
from gspn.bench.unet import GSPN, UNetSweep
from gspn.bench.unet_layers import MIXER, Layer, mixer_layers, unet_layers

CARD = CARDS[90]
MATRIX_RATE = 989e12 * 0.5  # dense bfloat16 operations a second of an H100 SXM, at half of the peak
SCAN_RATE = CARD.multiprocessors * CARD.multiply_adds * 2 * CARD.clock * 1e9 * 0.8  # float32, without tensor cores
BANDWIDTH = CARD.bandwidth * 1e9 * 0.88
CARDS_IN_ALL = (1, 2, 4, 8, 16, 32, 64)
STRONG, WEAK = 16384, 4096  # pixels of a side: of the image, and of a card's share as a square
COUNTED = 1024  # the size that is counted; the rest is proportional to it
ITEM = 2  # bytes of a number


@dataclass(frozen=True)
class Link:
    """A network of cards: bytes a second that each card sends, at 80 % of the peak, and seconds of an exchange."""

    name: str
    rate: float
    latency: float


LINKS = (
    Link("NVLink 4, 450 GB/s", 450e9 * 0.8, 10e-6),
    Link("InfiniBand NDR, 50 GB/s", 50e9 * 0.8, 30e-6),
)


@dataclass
class Work:
    """A call of the UNet at the counted size.

    Attributes:
        seconds: Of the layers on one card.
        channels: Channels times pixels of all maps that are scanned.
        proxies: The same of their proxies.
        edges: Channels times pixels of a row of all maps that a 3x3 convolution reads.
        exchanges: Number of exchanges.
    """

    seconds: float = 0.0
    channels: int = 0
    proxies: int = 0
    edges: int = 0
    exchanges: int = 0

    def add(self, layer: Layer, number: int) -> None:
        """Add a layer that is called so often."""
        meta = torch.device("meta")
        with FlopCounterMode(display=False) as counter:
            result = layer.call(layer.function, layer.rows, meta, torch.float32)()  # as the weights on meta are
        counts = counter.get_flop_counts().get("Global", {})
        scans = counts.get(torch.ops.gspn.propagate, 0)
        moved = sum(math.prod(one.shape) for one in layer.inputs)
        moved += sum(one.numel() for one in tree_leaves(result) if isinstance(one, torch.Tensor))
        operations = (sum(counts.values()) - scans) / MATRIX_RATE + scans / SCAN_RATE
        self.seconds += number * max(operations, ITEM * moved / BANDWIDTH)
        module: Any = layer.function
        shape = layer.inputs[0].shape
        if layer.kind == GSPN:
            pixels = math.prod(shape[2:])
            self.channels += number * module.mixer.dim * pixels
            self.proxies += number * module.mixer.scan.proxy_dim * pixels
            self.exchanges += 3 * number
        elif isinstance(module, nn.GroupNorm):
            self.exchanges += number
        elif getattr(getattr(module, "conv", module), "kernel_size", None) == (3, 3):
            self.edges += number * shape[1] * shape[3]
            self.exchanges += number

    def on(self, cards: int, link: Link, pixels: float) -> dict[str, float]:
        """A call for an image of so many pixels on so many cards: seconds and the bytes that each card sends."""
        times = pixels / COUNTED**2
        compute = self.seconds * times / cards
        # docs/distributed.md: x and the result to and from channels, the proxy to all; a row to both neighbours.
        sent = ITEM * times * (2 * self.channels * (cards - 1) / cards**2 + self.proxies * (cards - 1) / cards)
        sent += 2 * ITEM * self.edges * math.sqrt(times) if cards > 1 else 0
        exchange = sent / link.rate + (self.exchanges * link.latency if cards > 1 else 0)
        return {"compute_s": compute, "sent_gb": sent / 1e9, "exchange_s": exchange, "call_s": compute + exchange}


def counted() -> Work:
    """The work of SDXL's UNet with GSPN."""
    sweep = UNetSweep(arch="sdxl", dtype=torch.bfloat16)
    work = Work()
    for layer, number in unet_layers(sweep, COUNTED).items():
        mixers = [one for one in mixer_layers(layer, sweep.segment) if one.kind == GSPN] if layer.kind == MIXER else []
        for one in mixers or [layer]:
            work.add(one, number)
    return work


def main(
    output: Csv = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Plot to write.")] = None,
) -> None:
    """Print strong and weak scaling by model."""
    work, rows = counted(), []
    for scaling, side in (("strong", STRONG), ("weak", WEAK)):
        for link in LINKS:
            alone = work.on(1, link, side**2)["call_s"]
            for cards in CARDS_IN_ALL:
                pixels = side**2 * (cards if scaling == "weak" else 1)
                one = work.on(cards, link, pixels)
                efficiency = alone / one["call_s"] / (cards if scaling == "strong" else 1)
                cells = {name: f"{value:.4g}" for name, value in (*one.items(), ("efficiency", efficiency))}
                rows.append({
                    "scaling": scaling, "link": link.name, "cards": cards, "size": round(math.sqrt(pixels)), **cells,
                    "matrix_tflops": f"{MATRIX_RATE / 1e12:.4g}", "scan_tflops": f"{SCAN_RATE / 1e12:.4g}",
                    "memory_gbs": f"{BANDWIDTH / 1e9:.4g}", "link_gbs": f"{link.rate / 1e9:.4g}",
                    "latency_us": f"{link.latency * 1e6:.4g}",
                })  # fmt: skip
    shown = ("cards", "size", "compute_s", "sent_gb", "exchange_s", "call_s", "efficiency")
    for scaling, link in dict.fromkeys((row["scaling"], row["link"]) for row in rows):
        own = [row for row in rows if (row["scaling"], row["link"]) == (scaling, link)]
        print_table(f"{scaling} scaling, {link}", shown, [[row[name] for name in shown] for row in own])
    write_csv(output, rows)
    if plot is not None:
        save_figure(figure(rows), plot)


def figure(rows: list[dict[str, Any]]) -> Any:
    """Efficiency over the number of cards: strong and weak scaling side by side."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    drawn = Figure(figsize=(9.4, 4.0), layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    titles = {"strong": f"strong scaling: one image of {STRONG}²", "weak": f"weak scaling: {WEAK}² pixels a card"}
    for panel, (scaling, title) in zip(panels, titles.items(), strict=True):
        for link, colour in zip(LINKS, ("#2563a8", "#e0a458"), strict=True):
            own = [row for row in rows if (row["scaling"], row["link"]) == (scaling, link.name)]
            values = [float(row["efficiency"]) for row in own]
            panel.plot([row["cards"] for row in own], values, "-o", color=colour, label=link.name, linewidth=2)
        panel.set_xscale("log", base=2)
        panel.set_xticks(CARDS_IN_ALL, CARDS_IN_ALL)
        panel.set_ylim(0, 1.05)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
        panel.set_xlabel("cards")
        panel.grid(color="#e3e6ea")
        for spine in panel.spines.values():
            spine.set_visible(False)
    panels[0].set_ylabel("efficiency, by model")
    panels[0].legend(frameon=False, loc="lower left")
    return drawn


if __name__ == "__main__":
    typer.run(main)
