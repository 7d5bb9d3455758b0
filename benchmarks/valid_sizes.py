"""Images of several sizes in a padded batch: with their sizes, and without a mask as if all were as large as the map.

    python benchmarks/valid_sizes.py [--threads 2] [--output CSV]

Three calls take turns: the padded batch without sizes, with the sizes of 40 different images, and with sizes that are
all those of the map, where nothing is saved and the masks cost the most that they can.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import typer
from common import Csv, print_table, write_csv

import gspn
import gspn.models
from gspn.bench.timing import Candidate, time_interleaved

Call = Callable[[torch.Tensor | None], object]


def sizes_of(count: int, side: int) -> torch.Tensor:
    """Heights and widths from half of the map's to all of it; one image has those of the map."""
    sizes = torch.randint(side // 2, side + 1, (count, 2), generator=torch.Generator().manual_seed(0))
    sizes[0] = side
    return sizes


def both_ways(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Call:
    """The call and its gradients to all inputs."""
    leaves = [one.requires_grad_() for one in inputs]

    def run(sizes: torch.Tensor | None) -> object:
        y = call(*leaves, valid_size=sizes)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def scans(count: int, channels: int, side: int) -> dict[str, Call]:
    """The operators over a batch of maps, forward and in training."""
    x, lam = torch.randn(2, count, channels, side, side)
    taps = gspn.stochastic_taps(torch.randn(count, channels, 3, side, side), direction="left")
    proxy, taps_of_proxy = torch.randn(count, 8, side, side), torch.randn(4, channels, 3, 8)
    gates = [torch.randn(4, channels, 8) for _ in range(2)]

    def line_scan(*tensors: torch.Tensor, valid_size: torch.Tensor | None = None) -> torch.Tensor:
        return gspn.line_scan(*tensors, direction="left", valid_size=valid_size)

    scan, whole = [x, taps, lam], [x, proxy, taps_of_proxy, *gates]
    return {
        "line_scan, forward": lambda sizes: line_scan(*(t.detach() for t in scan), valid_size=sizes),
        "line_scan, training": both_ways(line_scan, scan),
        "propagate, forward": lambda sizes: gspn.propagate(*(t.detach() for t in whole), valid_size=sizes),
        "propagate, training": both_ways(gspn.propagate, whole),
    }


def main(threads: int = 2, repeats: int = 15, output: Csv = None) -> None:
    """Print the time of each call without sizes, and the ratio of that with sizes to it."""
    torch.set_num_threads(threads)
    calls = {name: (call, 56) for name, call in scans(40, 32, 56).items()}
    model = timm.create_model("gspn_pico").eval()
    images = torch.randn(40, 3, 96, 96)

    @torch.inference_mode()
    def classify(sizes: torch.Tensor | None) -> object:
        return model(images, valid_size=sizes)

    calls["gspn_pico, 96 x 96, inference"] = (classify, 96)
    rows = []
    for name, (call, side) in calls.items():
        sizes, full = sizes_of(40, side), torch.full((40, 2), side)
        candidates = [
            Candidate("padded", lambda call=call: call(None)),
            Candidate("sizes", lambda call=call, sizes=sizes: call(sizes)),
            Candidate("full", lambda call=call, full=full: call(full)),
        ]
        timings = time_interleaved(candidates, torch.device("cpu"), repeats=repeats)
        padded, own, whole = (timings[one].p50 for one in ("padded", "sizes", "full"))
        pixels = float(sizes.prod(1).sum()) / (len(sizes) * side * side)
        rows.append(
            {
                "call": name, "padded ms": round(padded, 2), "40 sizes": round(own / padded, 3),
                "all as large as the map": round(whole / padded, 3), "pixels": round(pixels, 3),
            }
        )  # fmt: skip
    print_table(f"40 images in a batch, float32, {threads} threads", list(rows[0]), (row.values() for row in rows))
    write_csv(output, rows)


if __name__ == "__main__":
    typer.run(main)
