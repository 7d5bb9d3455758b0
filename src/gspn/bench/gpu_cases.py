"""The calls whose kernels :mod:`.gpu_counts` counts, and the launches that they make on a card."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspn.ops.directions import DIRECTIONS

from .gpu_model import WORK, Card

if TYPE_CHECKING:
    from gspn.ops.triton.launch import Launch
    from gspn.ops.triton.planner import Limits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A call of ``propagate`` in four directions with the skip, or of ``line_scan`` in one, or of its backward."""

    op: str
    batch: int
    channels: int
    size: int
    dtype: str = "fp32"
    layout: str = "nchw"
    taps: str = "per-channel"
    states: int = 8
    mode: str = "forward"
    direction: str = "all"

    @property
    def name(self) -> str:
        """Its parts, joined by slashes."""
        shape = f"b{self.batch}c{self.channels}/{self.size}"
        last = f"s{self.states}" if self.op == "propagate" else self.direction
        return f"{self.op}/{shape}/{self.dtype}/{self.layout}/{self.taps}/{last}/{self.mode}"

    @property
    def groups(self) -> int:
        """Sets of taps."""
        return 1 if self.taps == "shared" else self.channels

    @property
    def elements(self) -> int:
        """Those of the image."""
        return self.batch * self.channels * self.size**2

    def call(self, card: Card, limits: Limits | None = None) -> tuple[list[Launch], int]:
        """The launches of Triton kernels that the call makes on a card, in order, and the number of all others.

        ``limits`` are those of the card, unless given.
        """
        from gspn.ops.triton import line_scan, propagate
        from gspn.ops.triton.launch import recorded
        from gspn.ops.triton.planner import Limits

        limits, backward = limits or Limits(card.shared_memory, tensor_cores=card.tensor_cores), self.mode == "backward"
        x, proxy = self._image(self.channels), self._image(max(self.states, 1))
        batch, c, n = self.batch, self.channels, self.size
        with recorded() as launches, OtherLaunches() as others:
            if self.op == "line_scan":
                taps = torch.empty(batch, self.groups, 3, n, n, dtype=x.dtype, device="meta")
                if backward:
                    line_scan.line_scan_backward(x, x, x, taps, x, self.direction, None, True, True, limits=limits)
                else:
                    line_scan.line_scan(x, taps, x, self.direction, None, limits=limits)
            else:
                gate = torch.empty(4, c, self.states, device="meta")
                taps = torch.empty(4, self.groups, 3, self.states, device="meta")
                arguments = (x, proxy, taps, gate, gate, gate[0], DIRECTIONS, None)
                if backward:
                    propagate.propagate_backward(x, *arguments, limits=limits)
                else:
                    propagate.propagate(*arguments, limits=limits)
        return launches, others.count

    def _image(self, channels: int) -> Tensor:
        image = torch.empty(self.batch, channels, self.size, self.size, dtype=DTYPES[self.dtype], device="meta")
        return image.to(memory_format=torch.channels_last) if self.layout == "channels_last" else image

    def floors(self, card: Card) -> tuple[float, float] | tuple[None, None]:
        """Milliseconds that the multiply-adds and the special functions of the formula take at full rate.

        A direction takes for an element ``3 S`` multiply-adds for its taps, ``2 S`` for its gates and 4 for the scan,
        three exponentials and a division; taps count once for each group. The backward takes the scan, the adjoint
        scan, and ``16 S + 27`` for the gradients.
        """
        if self.op != "propagate":
            return None, None
        s, taps = self.states, self.groups / self.channels
        scan = (3 * taps + 2) * s + 4
        if self.mode == "forward":
            return self._milliseconds(card, 4 * scan + s + 1, 16 * taps)
        return self._milliseconds(card, 4 * (2 * scan + 16 * s + 27) + 2 * (s + 1), 32 * taps)

    def launch_floors(self, launch: Launch, card: Card) -> tuple[float, float] | tuple[None, None]:
        """The same for one launch of the call; None for kinds of launches that the formula does not have."""
        if launch.kernel.__name__ not in WORK:
            return None, None
        work = WORK[launch.kernel.__name__](launch)
        s, taps = self.states, self.groups / self.channels
        skip = s + 1 if launch.tensors.get("p_skip") is not None else 0
        counts = {
            "forward": ((3 * taps + 2) * s + 4 + skip, 4 * taps),
            "states": ((3 * taps + 1) * s + 4, 4 * taps),
            "adjoint": ((3 * taps + 1) * s + 4, 4 * taps),
            "gradients of gates": (5 * s + 4, 0.0),
            "gradients of taps": (9 * s + 23, 4 * taps),
        }
        if work.kind not in counts:
            return None, None
        directions = work.pixels / self.elements
        return self._milliseconds(card, *(directions * count for count in counts[work.kind]))

    def _milliseconds(self, card: Card, multiply_adds: float, special: float) -> tuple[float, float]:
        """Of so many operations for each element."""
        cycles = self.elements / card.multiprocessors / card.clock * 1e-6
        return multiply_adds * cycles / card.multiply_adds, special * cycles / 16


class OtherLaunches(TorchDispatchMode):
    """Counts the operations of PyTorch that run a kernel: all but those that allocate or give a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        allocates = re.search(r"aten::(new_)?empty", func._schema.name)
        self.count += not (views or allocates)
        return func(*args, **(kwargs or {}))


# B, C and the height of the image: a large batch of patches, stages of a backbone, a diffusion model.
LARGE = ((32, 1152, 74), (32, 1152, 147), (64, 96, 56), (1, 640, 512), (1, 640, 1024))
SMALL = ((64, 192, 28), (64, 384, 14), (64, 768, 7))
LAYOUTS, MODES = ("nchw", "channels_last"), ("forward", "backward")


def all_cases() -> list[Case]:
    """Every combination of shapes, layouts, dtypes, taps, proxies and passes; and line_scan in four directions."""
    propagate = [
        Case("propagate", *shape, dtype, layout, taps, states, mode)
        for shape, dtype, layout, taps, states, mode in itertools.product(
            LARGE + SMALL, DTYPES, LAYOUTS, ("per-channel", "shared"), (2, 8, 16), MODES
        )
    ]
    return propagate + [
        Case("line_scan", *shape, dtype, layout, taps, 0, mode, direction)
        for shape, dtype, layout, taps, mode, direction in itertools.product(
            (*LARGE, (16, 8, 1024)), DTYPES, LAYOUTS, ("per-channel", "shared"), MODES, DIRECTIONS
        )
    ]


def default_cases() -> list[Case]:
    """A few dozen: every shape and layout in float32, and at some shapes what else is on the list of all."""
    shapes = [
        Case("propagate", *shape, "fp32", layout, mode=mode)
        for shape, layout, mode in itertools.product(LARGE + SMALL[:2], LAYOUTS, MODES)
    ]
    patches, stage, wide = (Case("propagate", *shape) for shape in (LARGE[0], LARGE[2], LARGE[4]))
    others = [
        *(
            replace(one, dtype="bf16", layout=layout)
            for one, layout in itertools.product((patches, stage, wide), LAYOUTS)
        ),
        replace(patches, dtype="fp16"),
        replace(patches, dtype="bf16", mode="backward"),
        *(replace(one, taps="shared", layout=layout) for one, layout in itertools.product((patches, wide), LAYOUTS)),
        replace(patches, taps="shared", mode="backward"),
        *(replace(patches, states=states, mode=mode) for states, mode in itertools.product((2, 16), MODES)),
    ]
    scan = Case("line_scan", 16, 8, 1024, direction="down")
    scans = [
        *(replace(scan, direction=direction, mode=mode) for direction, mode in itertools.product(DIRECTIONS, MODES)),
        *(replace(scan, direction="left", dtype="bf16", mode=mode) for mode in MODES),
        *(replace(scan, batch=64, channels=96, size=56, layout="channels_last", mode=mode) for mode in MODES),
        replace(scan, batch=1, channels=640, size=512, taps="shared"),
    ]
    return shapes + others + scans
