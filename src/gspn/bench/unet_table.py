"""The time of a text-to-image UNet at sizes where no call of it fits or ends: each layer by itself, added up.

A layer whose time is linear in the number of pixels is timed whole, or as a strip of rows where the whole takes too
long. Attention between tokens is timed up to the size that time and memory allow. Beyond it, its time follows the
power of the number of tokens that is fitted to its three largest sizes.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn._errors import UsageError
from gspn._files import replaced
from gspn.diffusers.mounting import self_attention_blocks

from .accuracy_check import Accuracy
from .attention import SELF_ATTENTION, attention_backend
from .environment import Environment, free_memory
from .timing import Stopwatch
from .unet import BACKENDS, GSPN, LOCAL, NO_MIXER, SHARED, PassThrough, UNetSweep, check_sizes, mixer_accuracies
from .unet_layers import (
    COMMON,
    MIXER,
    Layer,
    OnMap,
    Spec,
    attention_core,
    built,
    empty_mixer,
    empty_unet,
    layer_modules,
    mixer_layers,
    module_name,
    unet_layers,
)

WHOLE_CALL, TOKEN_MIXER = "whole call", "token mixer"
_STRIP_MS = 200.0  # of a strip: long enough for its matrix products to run at their rate
_STRIP_ELEMENTS = (1 << 20, 1 << 24)  # of a strip's first input: the one that the time is guessed from, and the most
_SLOW_MS, _VERY_SLOW_MS = 2000.0, 15000.0  # calls that take longer have at most two samples, and one
_FITTED = 3  # sizes
_MATH_COPIES = 3  # matrices of weights that the math kernel holds at once


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """The time of one call of a layer at one size of image; a row of the CSV."""

    arch: str
    divisor: int
    """The number that divides the widths of the published UNet."""
    batch: int
    dtype: str
    clock: str
    """``wall``, or ``processor`` for the processor time."""
    size: int
    """The side of the image in pixels."""
    kind: str
    """The kind of layer, or :data:`WHOLE_CALL` for a call of the UNet to compare the sum with."""
    layer: str
    """The layer's type and configuration, or the candidate of a whole call."""
    input: str
    """The shapes of its inputs, and their memory order where it is not that of the dimensions."""
    number: int
    """The calls of such a layer in a call of the UNet."""
    ms: float
    """The median; with a strip, that of the strip divided by its share."""
    low_ms: float
    """The least sample."""
    samples: int
    """The number of samples; 0 where the time is fitted."""
    strip: float
    """The share of the rows that was timed; 1 for the whole layer."""
    exponent: float | None = None
    """Where the time is fitted, the power of the number of tokens that it follows."""
    exponent_error: float | None = None
    """The standard error of the exponent."""

    @property
    def key(self) -> tuple[object, ...]:
        """The columns that say what was timed."""
        return tuple(getattr(self, f.name) for f in fields(self)[:9])


class LayerTimes:
    """The rows of a table, in a CSV file that is replaced with each new one, so that a run can continue another.

    Args:
        path: the file; None to keep the rows in memory.
        environment: the machine, whose columns every row has.

    Raises:
        UsageError: the file is not of this kind, or was written on another machine.
    """

    def __init__(self, path: Path | None, environment: Environment) -> None:
        self.path = path
        self._shared = {name: "" if value is None else str(value) for name, value in asdict(environment).items()}
        self._columns = ["bench", *(f.name for f in fields(LayerTime)), *self._shared, "date"]
        self._cells: dict[tuple[object, ...], dict[str, str]] = {}
        self.rows: dict[tuple[object, ...], LayerTime] = {}
        if path is not None and path.exists():
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    columns, lines = reader.fieldnames, list(reader)
            except (OSError, UnicodeDecodeError, csv.Error) as error:
                raise UsageError(f"{path} cannot be read: {error}; move it, or name another file.") from None
            if columns != self._columns:
                raise UsageError(f"{path} does not have the columns of this table; move it, or name another file.")
            for cells in lines:
                self._keep(cells)

    def _keep(self, cells: dict[str, str]) -> None:
        try:
            row = read_row(cells)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self.path} has a row that cannot be read: {error}") from None
        for name in ("device", "threads"):
            if cells[name] != self._shared[name]:
                raise UsageError(
                    f"{self.path} has rows of {cells['device']} with {cells['threads']} threads, and this is "
                    f"{self._shared['device']} with {self._shared['threads']}; name another file."
                )
        self.rows[row.key], self._cells[row.key] = row, cells

    def add(self, row: LayerTime) -> LayerTime:
        """Keep a row and write the file; the row is returned with the digits of the file, for a run that continues."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        own = {name: _cell(value) for name, value in asdict(row).items()}
        self._cells[row.key] = {"bench": "unet-layers", **own, **self._shared, "date": date}
        row = self.rows[row.key] = read_row(self._cells[row.key])
        if self.path is not None:
            with replaced(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._cells.values())
        return row


def read_row(cells: Mapping[str, str]) -> LayerTime:
    """A row of the CSV.

    Raises:
        ValueError: a cell is not what its column holds.
    """
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    values = {}
    if None in cells or None in cells.values():  # as csv has them
        raise ValueError("it has fewer or more cells than there are columns")
    for f in fields(LayerTime):
        text, kind = cells[f.name], str(f.type)
        values[f.name] = None if kind.endswith("None") and not text else kinds[kind.partition(" ")[0]](text)
    row = LayerTime(**values)
    if not 0 <= row.ms < math.inf or not 0 < row.strip <= 1:
        raise ValueError(f"{row.layer!r} has {row.ms} ms for {row.strip} of its rows")
    return row


def read_rows(path: Path) -> list[LayerTime]:
    """All rows of a CSV, whatever machine wrote it."""
    with path.open(newline="", encoding="utf-8") as file:
        return [read_row(cells) for cells in csv.DictReader(file)]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


@dataclass(kw_only=True)
class LayerBench:
    """Times the layers of the UNet of a sweep.

    Args:
        sweep: the architecture, width, batch, dtype, device, attention's backend and segment.
        times: where rows go, and where those of an earlier run are.
        repeats: the samples of each layer.
        slowest_ms: the longest call of attention between tokens, and of the UNet as a whole.
        processor_time: see :class:`~gspn.bench.timing.Stopwatch`.
        progress: called with a line on what is timed next.
    """

    sweep: UNetSweep
    times: LayerTimes
    repeats: int = 3
    slowest_ms: float = 60_000.0
    processor_time: bool = False
    progress: Callable[[str], None] = lambda _line: None

    def __post_init__(self) -> None:
        # Inputs are in the caches, as far as they fit: in a whole call the layer before has just written them.
        self._clock = Stopwatch(self.sweep.device, processor_time=self.processor_time, evict=False)
        self.kernels = attention_kernels(self.sweep)

    def check(self) -> dict[str, list[Accuracy]]:
        """Compare GSPN's mixers of every width of the UNet with their float64 specification."""
        attentions = {
            block.attn1.query_dim: block.attn1 for block in self_attention_blocks(empty_unet(self.sweep)).values()
        }
        device, dtype = self.sweep.device, self.sweep.dtype
        accuracies = {}
        for name in (GSPN, SHARED, LOCAL):
            mixers = {
                dim: cast("Any", built(empty_mixer(name, attention, self.sweep.segment), device, dtype))
                for dim, attention in attentions.items()
            }
            accuracies[name] = mixer_accuracies(mixers, device, dtype)
        return accuracies

    def run(self, sizes: Sequence[int]) -> list[LayerTime]:
        """Time what the table lacks, and return its rows for these sizes: the layers, attention, and whole calls."""
        check_sizes(sizes)
        sizes = sorted(set(sizes))
        levels: dict[tuple[str, int], dict[int, tuple[Layer, int]]] = defaultdict(dict)
        for size in sizes:
            for layer, number in unet_layers(self.sweep, size).items():
                if layer.kind != MIXER:
                    self._linear(size, layer, number)
                    continue
                for one in mixer_layers(layer, self.sweep.segment):
                    self._linear(size, one, number)
                levels[layer.name, size**2 // layer.rows][size] = layer, number
        for level in levels.values():
            for kernel in self.kernels:
                self._cores(kernel, level)
        for size in sizes:
            for name in (self_attention(next(iter(self.kernels))), GSPN, NO_MIXER):
                if total(self._of([size]), name, size).ms <= self.slowest_ms:
                    self._whole(size, name)
        return self._of(sizes)

    def _of(self, sizes: Sequence[int]) -> list[LayerTime]:
        like = self._row(0, "", "", "", 0).key[:5]
        return [row for row in self.times.rows.values() if row.key[:5] == like and row.size in sizes]

    def _row(self, size: int, kind: str, layer: str, shapes: str, number: int, **values: Any) -> LayerTime:
        timed = {"ms": 0.0, "low_ms": 0.0, "samples": 0, "strip": 1.0, **values}
        return LayerTime(
            arch=self.sweep.arch, divisor=self.sweep.width, batch=self.sweep.batch,
            dtype=str(self.sweep.dtype).removeprefix("torch."), clock="processor" if self.processor_time else "wall",
            size=size, kind=kind, layer=layer, input=shapes, number=number, **timed,
        )  # fmt: skip

    def _known(self, row: LayerTime) -> LayerTime | None:
        """The row of an earlier run about the same, with the number of calls that is known now."""
        known = self.times.rows.get(row.key)
        if known is not None and row.number > known.number:
            known = self.times.add(replace(known, number=row.number))
        if known is None:
            self.progress(f"{row.size} x {row.size}: {row.kind}, {row.layer} on {row.input}")
        return known

    def _timed(self, row: LayerTime, call: Callable[[], object], strip: float = 1.0) -> LayerTime:
        first = self._clock(call)
        if first < _SLOW_MS:
            samples = [self._clock(call) for _ in range(self.repeats)]
        else:  # long enough to have warmed up by itself
            samples = [first, *([self._clock(call)] if self.repeats > 1 and first < _VERY_SLOW_MS else [])]
        ms, low = statistics.median(samples) / strip, min(samples) / strip
        return self.times.add(replace(row, ms=ms, low_ms=low, samples=len(samples), strip=strip))

    def _linear(self, size: int, layer: Layer, number: int) -> None:
        """Time a layer whole, or as a strip that takes about :data:`_STRIP_MS`."""
        row = self._row(size, layer.kind, layer.name, layer.shapes, number)
        if self._known(row) is not None:
            return
        device, dtype = self.sweep.device, self.sweep.dtype
        function = layer.built(device, dtype)
        least, most = (layer.strip(elements // layer.row_elements) for elements in _STRIP_ELEMENTS)
        ms = self._clock(layer.call(function, least, device, dtype))
        rows = max(least, min(most, layer.strip(int(least * _STRIP_MS / max(ms, 1e-3)))))
        self._timed(row, layer.call(function, rows, device, dtype), rows / layer.rows)

    def _cores(self, kernel: str, level: Mapping[int, tuple[Layer, int]]) -> None:
        """Time attention between tokens at growing sizes, and fit the sizes beyond the limits."""
        sizes, timed = list(level), dict[int, LayerTime]()
        for size in sizes:
            if self._too_much(kernel, level[size][0], timed):
                break
            timed[size] = self._core(kernel, size, *level[size])
        rest = sizes[len(timed) :]
        layer, _ = level[sizes[0]]
        for size in (sizes[0] // 2, sizes[0] // 4):
            if rest and len(timed) < _FITTED:
                smaller = replace(layer, inputs=(_tokens(layer, layer.rows * size**2 // sizes[0] ** 2),))
                timed[size] = self._core(kernel, size, smaller, 0)
        largest = sorted(timed)[-_FITTED:]
        for size in rest:
            row = self._core_row(kernel, size, *level[size])
            p, error, ms = fitted_power([(n * n, timed[n].ms) for n in largest], size * size)
            self.times.add(replace(row, ms=ms, low_ms=ms, exponent=p, exponent_error=error))

    def _core_row(self, kernel: str, size: int, layer: Layer, number: int) -> LayerTime:
        heads = cast("Any", layer.function).heads
        return self._row(size, self_attention(kernel), f"attention of {heads} heads", layer.shapes, number)

    def _core(self, kernel: str, size: int, layer: Layer, number: int) -> LayerTime:
        row = self._core_row(kernel, size, layer, number)
        known = self._known(row)
        if known is not None and known.samples:
            return known
        q, k, v = (layer.inputs[0].random(self.sweep.device, self.sweep.dtype, {}) for _ in range(3))
        return self._timed(row, core_call(q, k, v, cast("Any", layer.function).heads, self.kernels[kernel]))

    def _too_much(self, kernel: str, layer: Layer, timed: Mapping[int, LayerTime]) -> str:
        """Why attention between so many tokens is not timed; empty if it is."""
        batch, count, _ = layer.inputs[0].shape
        if kernel == "math":
            free = free_memory(self.sweep.device) or math.inf
            matrix = batch * cast("Any", layer.function).heads * count**2 * self.sweep.dtype.itemsize
            if matrix * _MATH_COPIES > free / 2:
                return "memory"
        if not timed:
            return ""
        last = timed[max(timed)]
        tokens = int(last.input.split("x")[1])
        return "time" if last.ms * (count / tokens) ** 2 > self.slowest_ms else ""

    def _whole(self, size: int, candidate: str) -> None:
        row = self._row(size, WHOLE_CALL, candidate, f"{self.sweep.batch}x3x{size}x{size}", 1)
        if self._known(row) is None:
            unet, inputs = shared_unet(self.sweep, candidate), self.sweep.inputs(size)
            backend = next(iter(self.kernels.values()))

            def call() -> object:
                with torch.no_grad(), sdpa_kernel(backend) if backend else nullcontext():
                    return unet(**inputs).sample

            self._timed(row, call)


def _tokens(layer: Layer, count: int) -> Spec:
    batch, _, dim = layer.inputs[0].shape
    return Spec((batch, count, dim), layer.inputs[0].order)


def core_call(q: Tensor, k: Tensor, v: Tensor, heads: int, backend: SDPBackend | None) -> Callable[[], object]:
    """A call of attention between tokens ``[B, N, D]`` with one of PyTorch's kernels, or that which it chooses."""

    def call() -> Tensor:
        with torch.no_grad(), sdpa_kernel(backend) if backend else nullcontext():
            return attention_core(q, k, v, heads)

    return call


def attention_kernels(sweep: UNetSweep) -> dict[str, SDPBackend | None]:
    """The kernels of self-attention to time, by name: that of the sweep, and the one that writes the whole matrix.

    Raises:
        UsageError: the sweep's kernel does not run here.
    """
    backend = BACKENDS[sweep.backend]
    q = torch.zeros(1, 64, 128, device=sweep.device, dtype=sweep.dtype)
    try:
        name = attention_backend(core_call(q, q, q, 2, backend))
    except RuntimeError as error:
        raise UsageError(f"attention's backend {sweep.backend!r} does not run here: {error}") from None
    return {name: backend} | ({} if name == "math" else {"math": SDPBackend.MATH})


def self_attention(kernel: str) -> str:
    """The candidate with self-attention in one of PyTorch's kernels.

    Example:
        >>> self_attention("flash")
        'self-attention, flash'
    """
    return f"{SELF_ATTENTION}, {kernel}"


def shared_unet(sweep: UNetSweep, candidate: str) -> UNet2DConditionModel:
    """A UNet to call as a whole, in which layers of the same configuration are one module.

    So only the distinct weights have to be in memory, 0.2 of 2.6 billion for SDXL. That has no effect on time as long
    as a layer's weights do not stay in a cache until the next layer that shares them.
    """
    unet, shared = empty_unet(sweep), dict[str, nn.Module]()
    for path, module in layer_modules(unet).items():
        mixer = path.endswith(".attn1")
        name = f"{candidate if mixer else ''} {module_name(module)}"
        if name not in shared:
            if mixer and candidate == NO_MIXER:
                shared[name] = PassThrough()
            elif mixer and candidate in (GSPN, SHARED, LOCAL):
                shared[name] = OnMap(empty_mixer(candidate, cast("Any", module), sweep.segment))
            else:
                shared[name] = module
            shared[name] = built(shared[name], sweep.device, sweep.dtype)
        unet.set_submodule(path, shared[name])
    missing = [name for name, p in unet.named_parameters() if p.is_meta]
    if missing:
        raise RuntimeError(f"{missing[0]} belongs to no layer that is timed.")
    return unet


def fitted_power(points: Sequence[tuple[float, float]], at: float) -> tuple[float, float | None, float]:
    """The power law ``time = c n^p`` through points (n, time), by least squares on the logarithms.

    Returns:
        p, its standard error (None for fewer than three points), and the time at ``at``.

    Raises:
        ValueError: there are fewer than two points.

    Example:
        >>> fitted_power([(1, 3.0), (2, 12.0), (4, 48.0)], 8)[2]
        192.0
    """
    if len(points) < 2:
        raise ValueError(f"{points=}: a power needs two sizes.")
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    slope, intercept = statistics.linear_regression(xs, ys)
    error = None
    if len(points) > 2:
        squares = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True))
        error = math.sqrt(squares / (len(points) - 2) / (len(points) - 1) / statistics.variance(xs))
    return slope, error, round(math.exp(intercept + slope * math.log(at)), 6)


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """One call of the UNet at one size, added up from its layers."""

    candidate: str
    size: int
    by_kind: Mapping[str, float]
    """Milliseconds of each kind of layer, :data:`TOKEN_MIXER` the last."""
    fitted: bool
    """Whether a part is fitted and not measured."""
    whole_ms: float | None
    """The time of the whole call, where it was measured."""

    @property
    def ms(self) -> float:
        """The sum."""
        return sum(self.by_kind.values())

    @property
    def error(self) -> float | None:
        """The sum over the whole call, less 1; None where that was not measured."""
        return None if self.whole_ms is None else self.ms / self.whole_ms - 1


def candidates(rows: Sequence[LayerTime]) -> list[str]:
    """The candidates of a table: self-attention with each kernel, GSPN's variants, and no mixer."""
    kinds = dict.fromkeys(row.kind for row in rows)
    attentions = sorted(kind for kind in kinds if kind.startswith(f"{SELF_ATTENTION}, "))
    return [*attentions, *(name for name in (GSPN, SHARED, LOCAL) if name in kinds), NO_MIXER]


def totals(rows: Sequence[LayerTime]) -> list[Total]:
    """The sums of all candidates at all sizes of a table, by size."""
    sizes = sorted({row.size for row in rows if row.kind in COMMON})
    return [total(rows, name, size) for size in sizes for name in candidates(rows)]


def fits(rows: Sequence[LayerTime]) -> list[str]:
    """The powers that attention was fitted to, in words."""
    powers = {}
    for row in rows:
        if row.exponent is not None:
            error = "" if row.exponent_error is None else f" ± {row.exponent_error:.3f}"
            powers.setdefault((row.kind, row.layer, row.input.split("x")[-1]), (row.size, f"{row.exponent:.3f}{error}"))
    return [
        f"{kind}, {layer}, {dim} channels: tokens^{power} from {size} x {size} on"
        for (kind, layer, dim), (size, power) in powers.items()
    ]


def total(rows: Sequence[LayerTime], candidate: str, size: int) -> Total:
    """The sum of a candidate's layers at one size."""
    mixer = () if candidate == NO_MIXER else (candidate,)
    if candidate.startswith(SELF_ATTENTION):
        mixer = (MIXER, candidate)
    by_kind: dict[str, float] = dict.fromkeys((*COMMON, TOKEN_MIXER), 0.0)
    fitted, whole = False, None
    for row in rows:
        if row.size != size:
            continue
        if row.kind in COMMON or row.kind in mixer:
            by_kind[TOKEN_MIXER if row.kind in mixer else row.kind] += row.number * row.ms
            fitted |= row.number > 0 and row.samples == 0
        elif row.kind == WHOLE_CALL and row.layer == candidate:
            whole = row.ms
    return Total(candidate, size, by_kind, fitted, whole)
