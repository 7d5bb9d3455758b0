"""The jobs of ``scripts/gpu_check.py``, step by step; docs/gpu.md has the table of steps.

Each kernel is checked and timed by the launches that a call of the operator makes. In the interpreter, tiny shapes go
the same way: its calls are timed by the processor's clock, streams follow each other and a graph is the call itself.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspn.ops.directions import DIRECTIONS

from .accuracy_check import compare
from .environment import describe
from .gpu_cases import DTYPES, Case
from .gpu_check import Context, NotHereError, Row, WrongResultError
from .gpu_counts import code_key, moved
from .gpu_model import WORK
from .propagate import PROPAGATE, PropagateSweep
from .timing import Candidate, copies, peak_memory, time_interleaved

if TYPE_CHECKING:
    from gspn.ops.triton.launch import Launch

_CHECKED_ELEMENTS = 1 << 24
_RUNS = 20

# --- Calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A case with tensors."""

    case: Case
    grad: Tensor
    tensors: tuple[Tensor, ...]
    """Those of the operator, in its order."""
    h: Tensor
    """The states that the backward of ``line_scan`` reads."""

    @classmethod
    def of(cls, case: Case, device: torch.device, seed: int = 0) -> Call:
        """Random tensors, with taps that are stable."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype, b, c, n, s = DTYPES[case.dtype], case.batch, case.channels, case.size, case.states
        layout = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            t = torch.empty(shape, dtype=dtype, device=device)
            t = t.contiguous(memory_format=layout) if t.dim() == 4 and shape[-2:] == (n, n) else t
            return t.normal_(generator=generator)

        x, grad = normal(b, c, n, n, dtype=dtype), normal(b, c, n, n, dtype=dtype)
        if case.op == "line_scan":
            taps = torch.rand(b, case.groups, 3, n, n, dtype=dtype, device=device, generator=generator) / 3
            return cls(
                case, grad, (x, taps, normal(b, c, n, n, dtype=dtype).sigmoid_()), normal(b, c, n, n, dtype=dtype)
            )
        gates = [normal(4, c, s) / s**0.5 for _ in range(3)]
        tensors = (x, normal(b, s, n, n, dtype=dtype), normal(4, case.groups, 3, s), *gates[:2], gates[2].sum(0))
        return cls(case, grad, tensors, x)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call of changed tensors."""
        return Call(self.case, change(self.grad), tuple(map(change, self.tensors)), change(self.h))

    @property
    def all_tensors(self) -> tuple[Tensor, ...]:
        """The gradient, the states and the operator's."""
        return (self.grad, self.h, *self.tensors)

    def results(self, backend: str) -> dict[str, Tensor]:
        """The results of the call by ``"triton"`` or the ``"reference"``, by name."""
        module: Any = importlib.import_module(f"gspn.ops.{backend}.{self.case.op}")
        if self.case.op == "line_scan":
            if self.case.mode == "forward":
                return {"h": module.line_scan(*self.tensors, self.case.direction, None)}
            gradients = module.line_scan_backward(
                self.grad, self.h, *self.tensors, self.case.direction, None, True, True
            )
            return dict(zip(("dx", "dtaps", "dlam"), gradients, strict=True))
        if self.case.mode == "forward":
            return {"y": module.propagate(*self.tensors, DIRECTIONS, None)}
        names = ("dx", "dproxy", "dtap_proj", "dlam_proj", "du_proj", "dskip_proj")
        return dict(zip(names, module.propagate_backward(self.grad, *self.tensors, DIRECTIONS, None), strict=True))

    def launches(self) -> list[Launch]:
        """The launches of the call, which has been made without them."""
        from gspn.ops.triton.launch import recorded

        with recorded() as launches:
            self.results("triton")
        return launches


class Poisoned(TorchDispatchMode):
    """Within it new memory is full of NaN: an element that no program writes shows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if re.match(r"aten::(new_)?empty", func._schema.name) and result.is_floating_point():
            result.fill_(float("nan"))
        return result


def kind_of(launch: Launch) -> str:
    """The kind of a launch, as gpu_model names it."""
    name = launch.kernel.__name__
    return WORK[name](launch).kind if name in WORK else name


@dataclass(frozen=True)
class Place:
    """One launch of a case: the one with this number among those of its kind."""

    case: Case
    kind: str
    number: int = 0

    @property
    def name(self) -> str:
        """Its parts."""
        return f"{self.case.name} {self.kind} {self.number}"

    def of(self, launches: Sequence[Launch]) -> Launch:
        """It among the launches of a call of the case."""
        return [one for one in launches if kind_of(one) == self.kind][self.number]


def _kernels(launches: Sequence[Launch]) -> set[Any]:
    """The kernels of launches: the same for launches that differ in sizes alone."""
    return {
        (
            one.kernel.__name__, one.plan.num_warps, tuple(sorted(one.plan.constants.items())),
            frozenset(name for name, value in (one.plan.integers | one.tensors).items() if value is None),  # type: ignore[operator]
        )
        for one in launches
    }  # fmt: skip


def _require_compiled(context: Context, launches: Sequence[Launch]) -> None:
    """Leave a case out whose kernels would be compiled while others wait."""
    if context.compiled is not None:
        keys = {code_key(one, context.arch) for one in launches}
        if missing := len(keys - context.compiled):
            raise NotHereError(f"{missing} of {len(keys)} kernels were not compiled in time")


# --- 0: the machine ---------------------------------------------------------------------------------------------------


def machine(context: Context) -> None:
    """Versions, and how fast the machine copies and multiplies."""
    context.attempt("", "environment", lambda: {"note": json.dumps(asdict(describe(context.device)))})
    context.attempt("", "driver", _driver)
    size = 1 << 20 if context.rehearsal else 2 << 30

    def copy() -> Row:
        ways = copies(size, context.device)
        times = _timed(context, *(one.call for one in ways.candidates), min_time=0.05)
        best, name = min((row["ms"], one.name) for row, one in zip(times, ways.candidates, strict=True))
        return {"ms": best, "note": name, "bytes": ways.traffic, "gbs": ways.traffic / best * 1e-6}

    context.attempt("", "copy", copy)
    side = 64 if context.rehearsal else 4096

    def product(dtype: torch.dtype) -> Row:
        a = torch.randn(side, side, device=context.device).to(dtype)
        (row,) = _timed(context, lambda: a @ a, min_time=0.05)
        return {**row, "tflops": 2 * side**3 / row["ms"] * 1e-9}

    for dtype in (torch.float32, torch.bfloat16):
        context.attempt("", f"matrix product of {side}, {dtype}", functools.partial(product, dtype))


def _driver() -> Row:
    fields = "driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu,mig.mode.current"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise NotHereError(f"nvidia-smi: {error}") from None
    return {"note": f"{fields}: {done.stdout.strip()}"}


# --- 2: right at the plans that are timed -----------------------------------------------------------------------------


def smaller(case: Case) -> Case:
    """A call of fewer elements, with a batch of two and channels in sixteens where there are as many."""
    case = replace(case, batch=min(case.batch, 2))
    while case.elements > _CHECKED_ELEMENTS and case.channels > 16:
        case = replace(case, channels=max(case.channels // 32 * 16, 16))
    return case


def check(context: Context, case: Case) -> None:
    """Compare the results of the kernels that a case is timed with to float64, and the states and adjoints of scans."""
    from gspn.ops.triton.launch import planned

    full, _ = case.call(context.card, context.limits)
    _require_compiled(context, full)
    call = Call.of(smaller(case), context.device)
    with planned((case.batch, case.channels)), torch.backends.cudnn.flags(allow_tf32=False):
        if case.op == "line_scan":
            call = replace(call, h=replace(call, case=replace(call.case, mode="forward")).results("reference")["h"])
        with Poisoned():
            launches = call.launches()
            results = call.results("triton")
        plain, exact = call.results("reference"), call.changed(torch.Tensor.double).results("reference")
        context.attempt(case.name, "the kernels that are timed", lambda: _same_kernels(launches, full))
        for name in results:
            _compare(context, case, name, results[name], plain[name], exact[name])
        if case.op == "propagate" and case.mode == "backward":
            _check_states(context, case, call, launches)


def _compare(context: Context, case: Case, name: str, result: Tensor, plain: Tensor, exact: Tensor) -> None:
    (one,) = compare({name: result}, {name: plain}, {name: exact})
    row = {"error": one.error, "plain_error": one.plain_error, "bound": one.bound}

    def measure() -> Row:
        if result.shape != plain.shape or result.dtype != plain.dtype or not one.ok:
            raise WrongResultError(f"{tuple(result.shape)} {result.dtype}: off by {one.error:.3g}")
        return {}

    context.attempt(case.name, name, measure, **row)


def _same_kernels(launches: Sequence[Launch], full: Sequence[Launch]) -> Row:
    others = _kernels(launches) ^ _kernels(full)
    if others:
        raise WrongResultError(f"{len(others)} kernels of the small call and of the timed one differ")
    return {}


def _check_states(context: Context, case: Case, call: Call, launches: Sequence[Launch]) -> None:
    """Run the launches one by one, and compare the states and adjoints that scans leave."""
    seen = dict.fromkeys(("states", "adjoint"), 0)
    for launch in launches:
        launch.run()
        kind, out = kind_of(launch), launch.tensors.get("p_out")
        if kind in seen and out is not None:
            # A launch scans one direction, or all of them side by side.
            for states in out if out.dim() == 5 else (out,):
                d = seen[kind]
                seen[kind] += 1
                plain = _state(call, kind, d)
                exact = _state(call.changed(torch.Tensor.double), kind, d)
                _compare(context, case, f"{kind} {DIRECTIONS[d]}", states, plain.to(states.dtype), exact)


def _state(call: Call, kind: str, d: int) -> Tensor:
    """The states of direction ``d``, or the adjoint ones, by the specification."""
    from gspn.ops import stochastic_taps
    from gspn.ops.reference.line_scan import line_scan, line_scan_backward
    from gspn.ops.unfused import project, project_taps

    x, proxy, tap_proj, lam_proj, u_proj, _ = call.tensors
    taps = stochastic_taps(project_taps(proxy, tap_proj[d].to(x.dtype)), direction=DIRECTIONS[d])
    if kind == "states":
        return line_scan(x, taps, project(proxy, lam_proj[d].to(x.dtype)), DIRECTIONS[d], None)
    source = call.grad * project(proxy, u_proj[d].to(x.dtype))
    return line_scan_backward(source, source, None, taps, None, DIRECTIONS[d], None, False, False)[0]


# --- 3: always the same -----------------------------------------------------------------------------------------------


def repeat(context: Context, case: Case) -> None:
    """The same bits in many runs, on two streams, from a graph; and views that are not aligned."""
    from gspn.ops.triton.launch import planned

    small = smaller(case)
    calls = [Call.of(small, context.device, seed) for seed in (0, 1)]
    with planned((case.batch, case.channels)):
        _require_compiled(context, case.call(context.card, context.limits)[0])
        expected = [call.results("triton") for call in calls]

        def again() -> Row:
            for _ in range(2 if context.rehearsal else _RUNS):
                _same_bits(calls[0].results("triton"), expected[0])
            return {}

        def on_two_streams() -> Row:
            streams = [_stream(context.device) for _ in calls]
            for _ in range(2 if context.rehearsal else 5):
                results = []
                for call, stream in zip(calls, streams, strict=True):
                    with stream():
                        results.append(call.results("triton"))
                _synchronize(context.device)
                for result, right in zip(results, expected, strict=True):
                    _same_bits(result, right)
            return {}

        def from_a_graph() -> Row:
            held = calls[0].changed(torch.clone)
            replay, results = captured(lambda: held.results("triton"), context.device)
            for old, new in zip(held.all_tensors, calls[1].all_tensors, strict=True):
                old.copy_(new)
            replay()
            _same_bits(results, expected[1])
            return {}

        def unaligned() -> Row:
            view = calls[0].changed(_unaligned)
            results = view.results("triton")
            plain, exact = (call.results("reference") for call in (view, view.changed(torch.Tensor.double)))
            for one in compare(results, plain, exact):
                if not one.ok:
                    raise WrongResultError(f"{one.name} is off by {one.error:.3g}, {one.bound:.3g} is accepted")
            return {}

        context.attempt(case.name, f"the same bits in {_RUNS} runs", again)
        context.attempt(case.name, "two streams", on_two_streams)
        context.attempt(case.name, "CUDA graph, other values", from_a_graph)
        if case.mode == "forward" and case.layout == "nchw":  # such kernels are compiled here: four are enough
            with torch.backends.cudnn.flags(allow_tf32=False):
                context.attempt(case.name, "views that are not aligned", unaligned)


def _same_bits(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, right in expected.items():
        if not torch.equal(results[name], right):
            count = int((results[name] != right).sum())
            raise WrongResultError(f"{name} differs in {count} of {right.numel()} elements")


def _stream(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return functools.partial(torch.cuda.stream, stream)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], dict[str, Any]], device: torch.device) -> tuple[Callable[[], object], dict[str, Any]]:
    """The replay of a call from a CUDA graph, and the results by name, which are then those of the replay."""
    if device.type != "cuda":
        results = call()
        return lambda: results.update(call()), results
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def _unaligned(t: Tensor) -> Tensor:
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room.as_strided(t.size(), t.stride(), 1).copy_(t)


# --- 5, 6: every launch by itself -------------------------------------------------------------------------------------


def _timed(context: Context, *calls: Callable[[], object], min_time: float = 0.02) -> list[Row]:
    """The medians of calls that take turns."""
    if context.rehearsal:
        begin = time.perf_counter()
        for call in calls:
            call()
        return [{"ms": (time.perf_counter() - begin) / len(calls) * 1e3, "samples": 1} for _ in calls]
    candidates = [Candidate(str(i), call) for i, call in enumerate(calls)]
    timings = time_interleaved(candidates, context.device, repeats=5, min_time=min_time)
    return [{"ms": timings[one.name].p50, "samples": len(timings[one.name].samples_ms)} for one in candidates]


def _described(launch: Launch) -> Row:
    return {
        "kernel": kind_of(launch), "warps": launch.plan.num_warps, "grid": "x".join(map(str, launch.plan.grid)),
        "plan": " ".join(f"{name}={value}" for name, value in launch.plan.constants.items()), "bytes": moved(launch),
    }  # fmt: skip


def _beside_floors(context: Context, ms: float, moved: float, fma_ms: float | None, mufu_ms: float | None) -> Row:
    """A time, and what of it a copy of the same bytes, the multiply-adds or the special functions would take."""
    copy = context.copy_gbs
    bytes_ms = None if copy is None else moved / copy * 1e-6
    floors = [one for one in (bytes_ms, fma_ms, mufu_ms) if one is not None]
    return {
        "ms": ms, "bytes": moved, "gbs": moved / ms * 1e-6, "of_copy": None if bytes_ms is None else bytes_ms / ms,
        "bytes_ms": bytes_ms, "fma_ms": fma_ms, "mufu_ms": mufu_ms, "of_floor": max(floors, default=0) / ms,
    }  # fmt: skip


def time_launches(context: Context, case: Case) -> None:
    """Time each launch of a case by itself, and their sum, beside the floors."""
    note = context.refuse_if_wrong(case.name)
    _require_compiled(context, case.call(context.card, context.limits)[0])
    times: list[float] = []
    launches = Call.of(case, context.device).launches()
    for i, launch in enumerate(launches):

        def measure(launch: Launch = launch) -> Row:
            (row,) = _timed(context, launch.run)
            times.append(row["ms"])
            floors = case.launch_floors(launch, context.card)
            return {**row, **_beside_floors(context, row["ms"], moved(launch), *floors)}

        context.attempt(case.name, str(i), measure, note=note, **_described(launch))
    if len(times) == len(launches):
        total = _beside_floors(context, sum(times), sum(map(moved, launches)), *case.floors(context.card))
        context.attempt(case.name, "all launches", lambda: total)


# --- 7: other plans ---------------------------------------------------------------------------------------------------

Choice = tuple[tuple[str, int], ...]


def choices(context: Context, place: Place) -> list[tuple[Choice, Launch]]:
    """Plans of a launch that differ from the rules' own, those with the fewest idle lanes first, and their launches."""
    if place.case.op == "line_scan":
        some = [(("stages", stages), ("num_warps", warps)) for stages in (2, 3, 4, 6) for warps in (2, 4, 8)]
    else:
        some = [(("warps", warps),) for warps in (1, 2, 4)]
        some += [
            (("lanes", lanes), ("group", group), ("pixels", pixels))
            for lanes in (32, 64, 128, 256) for group in sorted({32, lanes}) for pixels in range(1, 9)
        ]  # fmt: skip
    plans: dict[Any, tuple[float, Choice, Launch]] = {}
    for choice in some:
        try:
            launch = place.of(place.case.call(context.card, context.limits._replace(choice=choice))[0])
        except ValueError:  # a row does not fit, or the card's tensor cores are not for maps
            continue
        work = WORK[launch.kernel.__name__](launch)
        busy = work.pixels / (math.prod(launch.plan.grid) * work.steps * work.slots)
        plans.setdefault(next(iter(_kernels([launch]))), (busy, choice, launch))
    best = sorted(plans.values(), key=lambda one: -one[0])
    return [(choice, launch) for busy, choice, launch in best if busy > 0.7 * best[0][0]][
        : 2 if context.rehearsal else 12
    ]


def sweep(context: Context, place: Place) -> None:
    """Time a launch with the rules' plan and with others, whose results must be the same."""
    from gspn.ops.triton.launch import planned

    call = Call.of(place.case, context.device)

    def measure() -> tuple[Row, Tensor, str]:
        launches = call.launches()
        launch = place.of(launches)
        _require_compiled(context, [launch])
        for earlier in launches:  # which write what it reads
            if earlier is launch:
                break
            earlier.run()
        out = next(t for name in ("p_out", "p_h") if (t := launch.tensors.get(name)) is not None)
        out.zero_()
        launch.run()
        result = out.clone()
        return {**_timed(context, launch.run)[0], **_described(launch)}, result, launch.kernel.__name__

    own: list[tuple[Row, Tensor, str]] = []

    def by_rules() -> Row:
        own.append(measure())
        return {**own[0][0], "ratio": 1.0}

    context.attempt(place.name, "as planned", by_rules)
    for choice, _ in choices(context, place):

        def otherwise(choice: Choice = choice) -> Row:
            with planned(None, **dict(choice)):
                row, result, kernel = measure()
            if own:
                right, eps = own[0][1], torch.finfo(own[0][1].dtype).eps
                error = (result - right).abs().max().item()
                # Another kernel may be off as much as this one, to the other side.
                if not error <= (4 if kernel == own[0][2] else 8) * eps * right.abs().max().item():
                    raise WrongResultError(f"differs from the planned launch by {error:.3g}")
                row["ratio"] = row["ms"] / own[0][0]["ms"]
            return row

        context.attempt(place.name, " ".join(f"{name}={value}" for name, value in choice), otherwise)


# --- 9: the operator --------------------------------------------------------------------------------------------------


def cases_of(bench: PropagateSweep, size: int) -> list[Case]:
    """The calls of a benchmark of the operator: a training step is a forward and a backward."""
    forward = Case("propagate", bench.batch, bench.channels, size, states=bench.proxy_dim)
    return [forward, replace(forward, mode="backward")] if bench.mode == "train" else [forward]


def operator(context: Context, bench: PropagateSweep, size: int) -> None:
    """Time the operator eagerly and from a graph, its unfused form and attention, each beside the operator."""
    for case in cases_of(bench, size):
        context.refuse_if_wrong(case.name)
    name = f"B{bench.batch} C{bench.channels} {size}x{size} {bench.dtype} {bench.mode}".replace("torch.", "")
    base = bench.calls([PROPAGATE], size)[PROPAGATE]

    def beside(candidate: str) -> Row:
        if candidate == PROPAGATE:
            call: Callable[[], object] = base
        elif candidate == "propagate, CUDA graph":
            call, _ = captured(lambda: {"": base()}, context.device)
        else:
            call = bench.calls([candidate], size)[candidate]
        peak = peak_memory(call, context.device)
        of_base, row = _timed(context, base, call, min_time=0.1)
        return {**row, "ratio": row["ms"] / of_base["ms"], "peak_mb": None if peak is None else peak / 1e6}

    for candidate in (PROPAGATE, "propagate, CUDA graph", *bench.candidates[1:]):
        context.attempt(name, candidate, functools.partial(beside, candidate))


# --- 10: a model ------------------------------------------------------------------------------------------------------


def model(context: Context, name: str, size: int, batch: int, mode: str) -> None:
    """Images a second and peak memory of a model of timm."""

    def measure() -> Row:
        try:
            import timm  # noqa: F401
        except ImportError:
            raise NotHereError("timm is not installed") from None
        from .models import ModelsProblem, measure_models

        problem = ModelsProblem(batch, torch.bfloat16, context.device, mode)
        (result,) = measure_models(problem, [name], [size], repeats=1 if context.rehearsal else 10, min_time=0)
        if result.timing is None:
            raise torch.OutOfMemoryError(result.skipped)
        row = result.row()
        return {
            "ms": row["p50_ms"], "samples": row["samples"], "peak_mb": row["peak_memory_mb"],
            "note": f"{row['images_per_second']} images a second",
        }  # fmt: skip

    context.attempt(f"{name} {size}x{size} B{batch} bfloat16", mode, measure)


class _ModelLaunches(TorchDispatchMode):
    """Records the launches of every call of ``propagate`` on the meta device, where the operator itself makes none."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._limits = context.limits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from gspn.ops.triton import propagate
        from gspn.ops.triton.launch import recorded

        name = func._schema.name.removeprefix("gspn::")
        if name in ("propagate", "propagate_backward"):
            *tensors, directions, segment, _ = args
            with recorded() as launches:
                getattr(propagate, name)(*tensors, tuple(directions.split(",")), segment, limits=self._limits)
            self.launches += launches
        return func(*args, **(kwargs or {}))


def model_launches(context: Context, name: str, size: int, batch: int) -> list[Launch]:
    """The launches of a training step of a model of timm in bfloat16; none where timm is not installed."""
    try:
        from .models import ModelsProblem
    except ImportError:
        return []
    problem = ModelsProblem(batch, torch.bfloat16, torch.device("meta"), "train")
    with _ModelLaunches(context) as recorder:
        problem.call(problem.model(name, size), problem.images(size))()
    return recorder.launches
