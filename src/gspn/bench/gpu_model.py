"""The cost of a launch on a card that need not be here: occupancy, executed instructions, a predicted time.

The prediction is the largest of three times, at the clock of :class:`Card`:

- **issue**: all instructions of a multiprocessor's share of the programs, at 80 % of its four issue slots; or its
  multiply-adds, special functions or matrix products at the full rate of their units;
- **latency**: as many rounds of programs as do not fit side by side, each of which takes, one after the other, its
  instructions (1.6 cycles each, more where a program has so many warps that they queue), 28 cycles a barrier, and the
  latency that is left of a load after the instructions between it and its use: 700 cycles from memory, 250 in loops
  inside the loop over the lines, where loads hit a cache;
- **bytes**: every tensor once, at 88 % of the memory's bandwidth.

No time is predicted for the host, so that of small images is too low.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .sass import Loop

if TYPE_CHECKING:
    from gspn.ops.triton.launch import Launch

_LATENCY, _CACHED_LATENCY = 700, 250
_CYCLES_AN_INSTRUCTION, _CYCLES_A_BARRIER = 1.6, 28
_ISSUE_RATE = 0.8 * 4
_MEMORY_RATE = 0.88
_PRODUCTS_AN_INSTRUCTION = 16 * 8 * 8  # of TF32 numbers, or twice as many of half their bits in as many cycles


@dataclass(frozen=True)
class Card:
    """A card, and what its compute capability allows."""

    name: str
    multiprocessors: int
    clock: float
    """GHz"""
    bandwidth: float
    """GB a second"""
    shared_memory: int
    """Bytes that a program may use; each takes 1 KB more."""
    most_warps: int = 64
    most_programs: int = 32
    multiply_adds: int = 128
    """Float32 multiply-adds a cycle and multiprocessor; special functions are 16."""
    tf32: int = 128
    """Those of TF32 by tensor cores and instructions of a warp."""

    @property
    def tensor_cores(self) -> bool:
        """Whether these are fast enough for maps: see :data:`gspn.ops.triton.launch.TENSOR_CORES`."""
        return self.tf32 >= 4 * self.multiply_adds


CARDS: Mapping[int, Card] = {
    80: Card("A100 80GB", 108, 1.41, 2039, 163 << 10, multiply_adds=64, tf32=512),
    86: Card("RTX 3090", 82, 1.695, 936, 99 << 10, 48, 16),
    90: Card("H100 SXM", 132, 1.755, 3350, 227 << 10, tf32=640),
    100: Card("B200", 148, 1.85, 8000, 227 << 10, tf32=512),
    120: Card("RTX 5090", 170, 2.41, 1792, 99 << 10, 48, 24),
}
"""By compute capability. Limits are those of the CUDA programming guide, clocks what a loaded card sustains.
By instructions of a warp, the tensor cores of an H100 are assumed to reach 62 % of their full rate, and those of a B200
an A100's."""


def programs_side_by_side(card: Card, registers: int, warps: int, shared_memory: int) -> int:
    """How many programs fit on a multiprocessor at once; 0 if none does.

    Args:
        card: the card.
        registers: those of a thread.
        warps: those of a program.
        shared_memory: bytes of a program, without the 1 KB that the system takes.

    Example:
        >>> programs_side_by_side(CARDS[90], registers=163, warps=4, shared_memory=7168)
        3
    """
    if shared_memory > card.shared_memory or warps > card.most_warps:
        return 0
    # A warp's registers come in units of 256, and its multiprocessor's quarter has 16384.
    warps_by_registers = 4 * (16384 // (math.ceil(max(registers, 1) * 32 / 256) * 256))
    by_shared_memory = (card.shared_memory + 1024) // (math.ceil((shared_memory + 1024) / 128) * 128)
    return min(warps_by_registers // warps, by_shared_memory, card.most_warps // warps, card.most_programs)


@dataclass(frozen=True)
class Repeat:
    """A loop over run-time sizes: how often it runs on average, and those inside it, in order."""

    trips: float
    inside: tuple[Repeat, ...] = ()


@dataclass(frozen=True)
class Work:
    """The work of a launch, as its plan says."""

    kind: str
    """The name of the kernel in the documentation."""
    pixels: int
    """Elements of the image, which are of use."""
    steps: float
    """Lines, or tiles, that a program takes one after the other."""
    slots: int
    """Elements that a program computes in a step, of use or not."""
    loops: tuple[Repeat, ...]


def _scan(kind: str, image: str) -> Callable[[Launch], Work]:
    """Work of a kernel that takes lines in rounds of tiles; ``image`` is an argument that has one element a pixel."""

    def work(launch: Launch) -> Work:
        plan = launch.plan
        c: Any = plan.constants
        fast, align, halo, block = c["FAST"], c["ALIGN"], c["HALO"], c["LINES"]
        cross, lines, run = (
            (plan.integers[name] or 0) * (align if fast == axis else 1)
            for name, axis in (("n_cross", 1), ("n_lines", 2), ("n_run", 2))
        )
        # A block of channels and positions, or lanes with a few positions each.
        rows, row = 1, 0
        if "LANES" in c:
            row = c["LANES"] * c["PIXELS"]
        elif "TILES" in c:
            rows, row = 8 * c["WARPS"], 8 * c["TILES"]
        else:
            rows, row = c["BLOCK_C"], c["BLOCK_N"]
        tiles = halo // block if halo else 1
        visits = math.ceil(cross / (row - 2 * halo)) * tiles if halo else tiles
        runs = range(0, lines, run)
        rounds = sum(math.ceil(min(run, lines - start) / (tiles * block)) for start in runs) / len(runs)
        loops = (Repeat(rounds, (Repeat(visits),) if halo else ()),)
        slots = max(rows * row, 32 * plan.num_warps)
        directions = plan.grid[1] if len(plan.grid) > 1 else 1
        return Work(_kind(kind, launch), directions * _elements(launch, image), rounds * visits * block, slots, loops)

    return work


def _kind(kind: str, launch: Launch) -> str:
    """The kind of a scan of ``propagate``: with an output gate, the states alone, or the adjoint."""
    c = launch.plan.constants
    if "ADJOINT" not in c:
        return kind
    gated = c.get("GATED", launch.tensors.get("p_out_gate") is not None)
    return "adjoint" if c["ADJOINT"] else kind if gated else "states"


def _gradients(launch: Launch) -> Work:
    """Work of a kernel that takes tiles of all pixels for blocks of channels, one direction after the other."""
    i: Any = launch.plan.integers
    programs, spans, _ = launch.plan.grid
    tile = 16
    blocks, tiles = math.ceil(i["n_channels"] / tile) / spans, i["n_tiles"] / programs
    times = blocks * i["n_directions"]
    kind = "gradients of taps" if launch.plan.constants["OF_TAPS"] else "gradients of gates"
    # The taps' launch has no image among its tensors.
    pixels = i["n_directions"] * i["n_channels"] * i["n_rows"] * i["n_columns"] * i["n_tiles"] // i["n_image_tiles"]
    return Work(kind, pixels, times * tiles, tile * tile, (Repeat(times, (Repeat(tiles),)),))


def _factors(launch: Launch) -> Work:
    """Work of a kernel that takes 16 channels of a projection, which is small."""
    channels = 8 * math.ceil(launch.plan.constants["S"] / 8)
    return Work("factors", _elements(launch, "p_lam"), 1, 16 * channels, ())


def _pack(launch: Launch) -> Work:
    """Work of a kernel that copies the proxy, once, without a loop."""
    c: Any = launch.plan.constants
    return Work("pack", _elements(launch, "p_proxy"), 1, 4 * c["BLOCK"], ())


def _sum(launch: Launch) -> Work:
    """Work of a kernel that adds up directions, without a loop."""
    return Work("sum", _elements(launch, "p_out"), 1, launch.plan.constants["BLOCK"], ())


def _elements(launch: Launch, name: str) -> int:
    tensor = launch.tensors[name]
    return 0 if tensor is None else tensor.numel()


WORK: Mapping[str, Callable[[Launch], Work]] = {
    "scan_kernel": _scan("forward", "p_in"),
    "warp_scan_kernel": _scan("forward", "p_in"),
    "factors_kernel": _factors,
    "gradients_kernel": _gradients,
    "pack_kernel": _pack,
    "sum_kernel": _sum,
    "forward_kernel": _scan("line_scan", "p_x"),
    "backward_kernel": _scan("line_scan_backward", "p_grad"),
}
"""The work of the launches of each kernel, by its name."""


@dataclass
class Executed:
    """The instructions that one warp executes."""

    once: Counter[str] = field(default_factory=Counter)
    """Instructions by class outside of all loops."""
    repeated: Counter[str] = field(default_factory=Counter)
    """In loops."""
    exposed: float = 0
    """Cycles of latency that no instruction of the program hides."""
    global_bytes: float = 0
    """Bytes that a thread's accesses of global memory ask for in loops, predicated ones included."""
    note: str = ""
    """The things that are not known."""


def execute(kernel: Loop, loops: Sequence[Repeat]) -> Executed:
    """Count the instructions of a warp where the loops that are not constant run as often as ``loops`` says."""
    total = Executed(once=kernel.own())

    def visit(inside: Sequence[Loop], known: Sequence[Repeat], times: float, within: bool) -> None:
        unknown = [loop for loop in inside if loop.trips is None]
        passed_on = () if unknown else tuple(known)  # to constant loops around the others
        if len(unknown) != len(known) and not (passed_on and any(loop.loops for loop in inside)):
            total.note = f"{len(unknown)} loops where {len(known)} were expected"
        waiting = iter(known)
        for loop in inside:
            repeat = Repeat(loop.trips, passed_on) if loop.trips is not None else next(waiting, Repeat(1))
            runs = times * repeat.trips
            for kind, count in loop.own().items():
                total.repeated[kind] += count * runs  # type: ignore[assignment]
            ahead = min((d for d in loop.distances()[:2] if d is not None), default=None)
            if ahead is not None:
                latency = _CACHED_LATENCY if within else _LATENCY
                total.exposed += runs * max(latency - _CYCLES_AN_INSTRUCTION * ahead, 0)
            total.global_bytes += runs * sum(
                one.bytes for one in loop.body if not isinstance(one, Loop) and one.kind == "global"
            )
            visit(loop.loops, repeat.inside, runs, within or loop.trips is None)

    visit(kernel.loops, loops, 1, False)
    return total


_BOUNDS = ("issue", "multiply_adds", "special_functions", "matrix_products", "latency", "bytes")


@dataclass(frozen=True)
class Prediction:
    """Milliseconds; see the module."""

    issue: float
    multiply_adds: float
    """Those executed, at the full rate of their units."""
    special_functions: float
    matrix_products: float
    latency: float
    bytes: float

    @property
    def total(self) -> float:
        """The largest."""
        return max(getattr(self, name) for name in _BOUNDS)

    @property
    def bound(self) -> str:
        """The name of the longest."""
        return max(_BOUNDS, key=lambda name: getattr(self, name))


def predict(card: Card, executed: Executed, programs: int, warps: int, side_by_side: int, moved: int) -> Prediction:
    """The time of a launch of so many programs on a card, which moves so many bytes."""
    classes = executed.once + executed.repeated
    instructions, cycle = sum(classes.values()), 1e-6 / card.clock
    share = math.ceil(programs / card.multiprocessors) * warps
    # A program's warps queue for the four schedulers where each of these has several.
    one_by_one = max(_CYCLES_AN_INSTRUCTION, warps / _ISSUE_RATE) * instructions
    program = one_by_one + _CYCLES_A_BARRIER * classes["barrier"] + executed.exposed
    rounds = math.ceil(programs / (card.multiprocessors * max(side_by_side, 1)))
    return Prediction(
        issue=share * instructions / _ISSUE_RATE * cycle,
        multiply_adds=share * classes["fma"] * 32 / card.multiply_adds * cycle,
        special_functions=share * classes["mufu"] * 2 * cycle,
        matrix_products=share * classes["matrix"] * _PRODUCTS_AN_INSTRUCTION / card.tf32 * cycle,
        latency=rounds * program * cycle,
        bytes=moved / (card.bandwidth * _MEMORY_RATE) * 1e-6,
    )
