"""Calls of the operators with memory that must not be touched beside every tensor, and calls that must be refused."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from propagate_cases import in_doubles, magnitudes, make_arguments
from propagate_cases import run as run_propagate
from support import DTYPES, LAYOUTS, assert_as_exact_as_pytorch, make_inputs, scan_and_gradients

from .runner import Input, Target

_NO_ACCESS = 0  # PROT_NONE
_NAMES = {str(dtype): dtype for dtype in DTYPES}
_LAYOUTS = [*LAYOUTS, "expanded_channels"]


class GuardedMemory:
    """Copies of tensors, of any strides, that end or begin beside a page that cannot be read or written."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._areas: list[tuple[int, int]] = []

    def copy(self, tensor: Tensor, *, at_end: bool) -> Tensor:
        """The values of ``tensor``, with its strides, in memory of its own."""
        if tensor.numel() == 0:
            return tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        page, size = mmap.PAGESIZE, span * tensor.element_size()
        inner = -(-size // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        area = self._libc.mmap(None, inner + 2 * page, _NO_ACCESS, flags, -1, 0)
        self._areas.append((area, inner + 2 * page))
        if self._libc.mprotect(area + page, inner, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
        start = area + page + (inner - size if at_end else 0)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=tensor.dtype)
        flat.copy_(torch.as_strided(tensor, (span,), (1,)))
        return torch.as_strided(flat, tensor.shape, tensor.stride())

    def free(self) -> None:
        """Give everything back; no copy may be used any more."""
        for area in self._areas:
            self._libc.munmap(*area)
        self._areas.clear()


@contextlib.contextmanager
def guarded(made: Input, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """The tensors in guarded memory, within the block."""
    memory = GuardedMemory()
    copies = [None if t is None else memory.copy(t, at_end=bool(made["ends"] >> i & 1)) for i, t in enumerate(tensors)]
    try:
        yield copies
    finally:
        copies.clear()
        memory.free()


def _make_call(rng: Random) -> Input:
    groups = rng.choice((1, 1, 2, 3, 5, 16))
    per_group = rng.choice((1, 2, 3, 8, 33)) if groups < 5 else rng.choice((1, 2, 3))
    return {
        "batch": rng.choice((0, 1, 1, 2, 3)), "channels": groups * per_group, "groups": groups,
        "height": rng.randint(1, 40), "width": rng.randint(1, 40), "states": rng.choice((1, 2, 3, 5, 8, 16, 17)),
        "dtype": str(rng.choice(DTYPES)), "layout": rng.choice(_LAYOUTS), "other_layout": rng.choice(_LAYOUTS),
        "directions": ",".join(rng.sample(gspn.DIRECTIONS, rng.randint(1, 4))), "lam": rng.random() < 0.7,
        "segment": rng.choice((None, None, 1, 2, 3, rng.randint(1, 45), 10**9)), "skip": rng.random() < 0.7,
        "seed": rng.randrange(2**16), "ends": rng.randrange(256), "logits": rng.choice((0.1, 2.0, 20.0)),
    }  # fmt: skip


def _scan_inputs(made: Input) -> tuple[Tensor, ...]:
    sizes = (made[name] for name in ("batch", "channels", "height", "width", "groups"))
    x, taps, lam, _ = make_inputs(*sizes, _NAMES[made["dtype"]], layout=made["layout"], seed=made["seed"])
    sizes = (made[name] for name in ("batch", "channels", "height", "width", "groups"))
    other = make_inputs(*sizes, _NAMES[made["dtype"]], layout=made["other_layout"], seed=made["seed"] + 1)
    return x, other[1] if made["skip"] else taps, lam, other[3]


def _check_line_scan(made: Input) -> None:
    """The kernels in guarded memory against the specification; the public function has the bits of the operator."""
    direction, segment = made["directions"].partition(",")[0], made["segment"]
    tensors = [t if made["lam"] or i != 2 else None for i, t in enumerate(_scan_inputs(made))]

    def results(tensors: list[Any], h: Tensor | None, impl: str) -> dict[str, Tensor]:
        return scan_and_gradients(*tensors, h=h, direction=direction, segment=segment, impl=impl)

    plain = results(tensors, None, "reference")
    doubles = [None if t is None else t.double() for t in tensors]
    exact = results(doubles, plain["h"].double(), "reference")
    magnitude = results([None if t is None else t.abs() for t in doubles], None, "reference")
    x, taps, lam, _ = tensors
    # The layout that is promised: that of what it is the result or the gradient of.
    like = {"h": x, "dx": x, "dtaps": taps, "dlam": lam}
    plain = {name: torch.empty_like(like[name]).copy_(value) for name, value in plain.items()}
    with guarded(made, *tensors, plain["h"]) as copies:
        state = copies.pop()
        for isa in reversed(instruction_sets()):  # the one that is used comes last
            with instruction_set(isa):
                actual = results(copies, state, "cpu")
            _compare(made, isa, actual, plain, exact, magnitude)
        leaves = [t.requires_grad_() for t in copies[:3] if t is not None]
        h = gspn.line_scan(*leaves, direction=direction, segment=segment, impl="cpu")
        assert torch.equal(h, actual["h"])
        for gradient, name in zip(torch.autograd.grad(h, leaves, copies[3]), ("dx", "dtaps", "dlam"), strict=False):
            assert gradient.shape == like[name].shape and bool(gradient.isfinite().all())
        del leaves, h, state, actual, gradient


def _compare(made: Input, isa: str, actual: dict, plain: dict, exact: dict, magnitude: dict) -> None:
    # In float64 plain PyTorch is what the result is compared with, and its own roundings are not seen. Equal channels
    # are rounded alike, and the roundings of their sums add up.
    factor = 8 if made["dtype"] == "torch.float64" or made["layout"] == "expanded_channels" else 1
    for name, one in plain.items():
        if one.numel():  # the strides of nothing mean nothing
            assert_as_exact_as_pytorch(actual[name], one, exact[name], factor * magnitude[name], f"{isa} {name}")


def _propagate_inputs(made: Input) -> tuple[Any, Tensor]:
    return make_arguments(
        made["batch"], made["channels"], made["height"], made["width"], made["states"], made["groups"],
        _NAMES[made["dtype"]], directions=made["directions"].count(",") + 1, skip=made["skip"], layout=made["layout"],
        proxy_layout=made["other_layout"], seed=made["seed"], logits=made["logits"],
    )  # fmt: skip


def _check_propagate(made: Input) -> None:
    directions, segment = made["directions"], made["segment"]
    arguments, grad = _propagate_inputs(made)
    plain = run_propagate(arguments, grad, directions, segment, "reference")
    exact = run_propagate(in_doubles(arguments), grad.double(), directions, segment, "reference")
    magnitude = magnitudes(arguments, grad, directions, segment)
    with guarded(made, *arguments, grad) as (*copies, other):
        for isa in instruction_sets():
            with instruction_set(isa):
                actual = run_propagate(tuple(copies), other, directions, segment, "cpu")
            _compare(made, isa, actual, plain, exact, magnitude)
        del copies, other


_REFUSED = (TypeError, ValueError, NotImplementedError)


def _make_wrong(rng: Random) -> Input:
    return _make_call(rng) | {
        "height": rng.randint(1, 9), "width": rng.randint(1, 9), "op": rng.choice(("line_scan", "propagate")),
        "wrong": rng.choice(("shape", "shape", "dtype", "segment", "direction", "impl", "axes", "object", "device")),
        "which": rng.randrange(6), "amount": rng.choice((-1, 0, 1, 7)), "axis": rng.randrange(5),
    }  # fmt: skip


def _wrong_tensor(made: Input, tensor: Tensor) -> Any:
    wrong, axis = made["wrong"], made["axis"] % tensor.dim()
    if wrong == "shape":
        shape = list(tensor.shape)
        shape[axis] = max(shape[axis] + made["amount"], 0) if made["amount"] else 0
        return torch.zeros(shape, dtype=tensor.dtype)
    if wrong == "dtype":
        others = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float32, torch.float64)
        return tensor.to(others[made["seed"] % len(others)])
    if wrong == "axes":
        return tensor[None] if made["amount"] > 0 else tensor.select(axis, 0) if tensor.shape[axis] else tensor[None]
    if wrong == "device":
        return tensor.to("meta")
    return (None, 1.0, "x", [1.0], object())[made["seed"] % 5] if wrong == "object" else tensor


def _check_wrong(made: Input) -> None:
    """The public function refuses, or has the result of the specification; the registered operators do not crash."""
    segment = (0, -1, 1.5, True, "1", 2**70)[made["seed"] % 6] if made["wrong"] == "segment" else made["segment"]
    directions = ("", "sideways", "down,down", "down,", "Down")[made["seed"] % 5]
    directions = directions if made["wrong"] == "direction" else made["directions"]
    impl = ("", "gpu", ["cpu"], None, "CPU")[made["seed"] % 5] if made["wrong"] == "impl" else "cpu"
    if made["op"] == "line_scan":
        tensors: list[Any] = list(_scan_inputs(made)[:3])
        tensors = tensors if made["lam"] else tensors[:2]
    else:
        arguments, _ = _propagate_inputs(made)
        tensors = [t for t in arguments if t is not None]
    which = made["which"] % len(tensors)
    tensors[which] = _wrong_tensor(made, tensors[which])

    def call(impl: Any) -> Any:
        if made["op"] == "line_scan":
            direction: Any = directions.partition(",")[0] if made["wrong"] != "direction" else directions
            return gspn.line_scan(*tensors, direction=direction, segment=segment, impl=impl)
        # The function's own skip has an axis of directions.
        own = [
            *tensors[:5],
            *(t[None].expand(len(directions.split(",")), *t.shape) for t in tensors[5:] if isinstance(t, Tensor)),
        ]
        return gspn.propagate(*own, directions=directions.split(","), segment=segment, impl=impl)

    with contextlib.suppress(*_REFUSED):
        result = call(impl)
        expected = call("reference")
        if result.device.type == "cpu":
            torch.testing.assert_close(result, expected, equal_nan=True, rtol=0.05, atol=0.05)
    # Any error, but an error: a wrong call must not read or write what is not its own.
    padded = [*tensors, *[None] * ((3 if made["op"] == "line_scan" else 6) - len(tensors))]
    with contextlib.suppress(Exception):
        getattr(torch.ops.gspn, made["op"])(*padded, directions, segment, impl)


TARGETS = [
    Target("line_scan", _make_call, _check_line_scan, 40),
    Target("propagate", _make_call, _check_propagate, 15),
    Target("wrong-calls", _make_wrong, _check_wrong, 150),
]
