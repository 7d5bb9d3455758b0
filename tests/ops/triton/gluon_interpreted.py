"""Runs Gluon kernels on the CPU: Triton's interpreter does not.

A kernel's own Python runs with its language replaced by the one below, program after program. A value carries which
thread holds each of its elements, as its layout says, and what the hardware does with a thread's registers is done with
those: a layout conversion that would move anything, operands in different threads, a shuffle or a matrix product of the
wrong lanes fail or give wrong numbers. Memory is that of the tensors: an access elsewhere fails, and so do a second
store to a place and a load of what the same launch has stored. A masked load gives NaN where nothing is said.

PTX instructions are as inexact as they are allowed to be. Tensor cores cut their factors to TF32, add products that
they have cut to one bit more than float32 has, and cut the sum.
"""

from __future__ import annotations

import functools
import itertools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NUMPY = {
    torch.float32: np.float32, torch.bfloat16: np.float32, torch.float16: np.float32,
    torch.int32: np.int32, torch.int64: np.int64, torch.bool: np.bool_,
}  # fmt: skip
EVERYONE = -1
"""The owner of an element that every thread holds."""


# --- Layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockedLayout:
    size_per_thread: Sequence[int]
    threads_per_warp: Sequence[int]
    warps_per_cta: Sequence[int]
    order: Sequence[int]

    @property
    def tile(self) -> list[int]:
        return [math.prod(n) for n in zip(self.size_per_thread, self.threads_per_warp, self.warps_per_cta, strict=True)]

    def owners(self, shape: Sequence[int]) -> np.ndarray:
        """The thread that holds each element."""
        assert all(n >= least for n, least in zip(shape, self.tile, strict=True)), f"{shape=} is replicated by {self}"
        i = [n // size for n, size in zip(np.indices(shape), self.size_per_thread, strict=True)]
        thread, scale = np.zeros(shape, int), 1
        for counts in (self.threads_per_warp, self.warps_per_cta):
            for axis in self.order:
                thread += i[axis] % counts[axis] * scale
                i[axis] = i[axis] // counts[axis]
                scale *= counts[axis]
        return thread


@dataclass(frozen=True)
class SliceLayout:
    dim: int
    parent: Any

    @property
    def tile(self) -> list[int]:
        return [n for axis, n in enumerate(self.parent.tile) if axis != self.dim]

    def owners(self, shape: Sequence[int]) -> np.ndarray:
        whole = list(shape)
        whole.insert(self.dim, self.parent.tile[self.dim])
        owners = self.parent.owners(whole)
        first = owners.take(0, self.dim)
        if (owners == np.expand_dims(first, self.dim)).all():
            return first
        return np.full(shape, EVERYONE)


class OwnersLayout:
    """A layout that was inferred."""

    def __init__(self, owners: np.ndarray) -> None:
        self._owners = owners

    def owners(self, shape: Sequence[int]) -> np.ndarray:
        assert self._owners.shape == tuple(shape)
        return self._owners


def _common(*owners: np.ndarray) -> np.ndarray:
    """The owners of the results of an operation of operands with these owners."""
    result = functools.reduce(np.maximum, np.broadcast_arrays(*owners))
    assert all(((one == EVERYONE) | (one == result)).all() for one in owners), "operands in different threads"
    return result


# --- Values -----------------------------------------------------------------------------------------------------------


class Value:
    """A tensor in registers, a scalar if it has no axes. Half types are held as float32."""

    def __init__(self, data: Any, dtype: torch.dtype, owners: np.ndarray | None = None) -> None:
        self.data, self.dtype = np.asarray(data, NUMPY[dtype]), dtype
        self.owners = np.full(self.data.shape, EVERYONE) if owners is None else owners
        assert self.owners.shape == self.data.shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=OwnersLayout(self.owners))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        if bitcast:
            return Value(self.data.view(NUMPY[dtype]), dtype, self.owners)
        data = self.data.astype(NUMPY[dtype])
        if dtype in (torch.bfloat16, torch.float16):
            data = torch.from_numpy(np.array(data)).to(dtype).float().numpy()
        return Value(data, dtype, self.owners)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def _value(one: Any, like: torch.dtype) -> Value:
    return one if isinstance(one, Value) else Value(one, torch.float32 if isinstance(one, float) else like)


def _elementwise(function: Callable[..., Any], *operands: Any, dtype: torch.dtype | None = None) -> Value:
    like = next((one.dtype for one in operands if isinstance(one, Value)), torch.int32)
    values = [_value(one, like) for one in operands]
    common = functools.reduce(torch.promote_types, (one.dtype for one in values))
    with np.errstate(all="ignore"):
        data = function(*(one.data.astype(NUMPY[common]) for one in values))
    return Value(data, dtype or common, _common(*(one.owners for one in values)))


def _operator(function: Callable[..., Any], comparison: bool = False) -> Any:
    def method(self: Value, other: Any) -> Value:
        return _elementwise(function, self, other, dtype=torch.bool if comparison else None)

    return method


for _name, _function in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "mod": np.remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", _operator(_function))
    setattr(Value, f"__r{_name}__", _operator(lambda a, b, f=_function: f(b, a)))
for _name, _function in {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", _operator(_function, comparison=True))


# --- Memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """The storage of a tensor, and where in it its elements are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.untyped_storage().size() // tensor.element_size()
        self.dtype, self.first = tensor.dtype, tensor.storage_offset()
        self.flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (size,))  # type: ignore[call-overload]
        exists = torch.zeros(size, dtype=torch.bool)
        exists.as_strided(tensor.shape, tensor.stride(), self.first).fill_(True)
        self.exists = exists.numpy()


class Pointer(Value):
    """Addresses of elements of one tensor."""

    def __init__(self, memory: Memory, stored: dict[int, np.ndarray], offsets: Value) -> None:
        super().__init__(offsets.data, torch.int64, offsets.owners)
        self.memory, self.stored = memory, stored
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)  # type: ignore[assignment]

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.stored, Value(self.data, torch.int64, self.owners) + other)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in the storage that are accessed, and which of the elements are."""
        mask = Value(True, torch.bool) if mask is None else mask
        owners = _common(self.owners, mask.owners)
        m = np.broadcast_to(mask.data, owners.shape)
        at = np.broadcast_to(self.data, owners.shape)[m] + self.memory.first
        assert ((at >= 0) & (at < self.memory.exists.size)).all(), "an address outside of the tensor's memory"
        assert self.memory.exists[at].all(), "an address between the tensor's elements"
        return at, m, owners

    @property
    def written(self) -> np.ndarray:
        return self.stored.setdefault(self.memory.flat.data_ptr(), np.zeros(self.memory.exists.size, bool))


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Value:
    at, m, owners = pointer.places(mask)
    assert not pointer.written[at].any(), "a load of what this launch has stored"
    numbers = pointer.memory.flat[torch.from_numpy(at)]
    missing = (float("nan") if numbers.is_floating_point() else 1 << 30) if other is None else other
    data = np.full(m.shape, missing, NUMPY[pointer.memory.dtype])
    data[m] = (numbers.float() if numbers.is_floating_point() else numbers).numpy()
    return Value(data, pointer.memory.dtype, owners)


def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
    at, m, owners = pointer.places(mask)
    _common(owners, value.owners)
    assert value.dtype == pointer.memory.dtype
    assert not pointer.written[at].any(), "a second store to a place"
    assert np.unique(at).size == at.size, "two stores to a place"
    pointer.written[at] = True
    pointer.memory.flat[torch.from_numpy(at)] = torch.from_numpy(value.data[m]).to(value.dtype)


# --- PTX --------------------------------------------------------------------------------------------------------------


def _rough(exact: np.ndarray, argument: np.ndarray, relative: float) -> np.ndarray:
    """A result that is wrong by a part of it, up or down as the argument's last bit says, and never subnormal."""
    sign = np.where(argument.view(np.int32) & 1, 1.0, -1.0)
    rough = (exact * (1 + sign * relative)).astype(np.float32)
    return np.where(np.abs(rough) < np.finfo(np.float32).tiny, np.float32(0), rough)


def _flushed(b: np.ndarray) -> np.ndarray:
    return np.where(np.abs(b) < np.finfo(np.float32).tiny, np.float32(0), b)


def _exp2(b: np.ndarray) -> np.ndarray:
    return _rough(np.exp2(_flushed(b).astype(np.float64)), b, 2.0**-22)


def _inverse(b: np.ndarray) -> np.ndarray:
    return _rough(1 / _flushed(b).astype(np.float64), b, 2.0**-23)


def _shuffle(b: np.ndarray, lane: np.ndarray) -> np.ndarray:
    """``[warps, 32]`` each."""
    assert ((lane >= 0) & (lane < 32)).all()
    return np.take_along_axis(b, lane, 1)


def _tf32(b: np.ndarray) -> np.ndarray:
    return (b.view(np.int32) & -8192).view(np.float32).astype(np.float64)


def _cut(b: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(b), np.trunc(b / unit) * unit, b)


def _matrix_product(*registers: np.ndarray) -> list[np.ndarray]:
    """``mma.m16n8k8`` of TF32 numbers: four registers, six of the factors and four of the sum, ``[warps, 32]`` each."""
    lane = np.arange(32)
    group, four = lane // 4, lane % 4
    warps = registers[0].shape[0]
    a, b, c = np.zeros((warps, 16, 8)), np.zeros((warps, 8, 8)), np.zeros((warps, 16, 8))
    for i in range(4):
        a[:, group + i % 2 * 8, four + i // 2 * 4] = _tf32(registers[i])
        c[:, group + i // 2 * 8, 2 * four + i % 2] = registers[6 + i]
    for i in range(2):
        b[:, four + 4 * i, group] = _tf32(registers[4 + i])
    terms = np.concatenate([a[:, :, :, None] * b[:, None, :, :], c[:, :, None, :]], 2)
    largest = np.abs(np.where(np.isfinite(terms), terms, 0)).max(2)
    unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-300))) - 24)
    total = _cut(terms, unit[:, :, None, :]).sum(2)
    total = _cut(total, np.exp2(np.floor(np.log2(np.maximum(np.abs(total), 1e-300))) - 23)).astype(np.float32)
    return [total[:, group + i // 2 * 8, 2 * four + i % 2] for i in range(4)]


PTX: dict[str, Callable[..., Any]] = {
    "ex2.approx.ftz.f32 $0, $1;": _exp2,
    "rcp.approx.ftz.f32 $0, $1;": _inverse,
    "shfl.sync.idx.b32 $0, $1, $2, 31, -1;": _shuffle,
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};": (
        _matrix_product
    ),
}
"""The effect of instructions on a thread's registers, ``[warps, 32]``."""


def inline_asm_elementwise(
    asm: str, constraints: str, args: Sequence[Value], dtype: Any, is_pure: bool, pack: int
) -> Any:  # fmt: skip
    assert is_pure == ("sync" not in asm), "whether lanes have to execute it together"
    assert pack == 1
    outputs, inputs = asm.count("$"), len(args)
    assert len(constraints.split(",")) == outputs, "a constraint for each operand"
    owners = functools.reduce(np.maximum, (one.owners for one in args))
    order = owners.argsort(axis=None)
    assert (owners.flat[order] == np.arange(owners.size)).all(), "one element for each thread"
    registers = []
    for one in args:
        _common(one.owners, owners)
        registers.append(np.broadcast_to(one.data, owners.shape).flat[order].reshape(-1, 32))
    with np.errstate(all="ignore"):
        results = PTX[asm](*registers)
    single = not isinstance(dtype, tuple)
    values = []
    for result in [results] if single else results:
        data = np.empty(owners.shape, result.dtype)
        data.flat[order] = result.flat
        values.append(Value(data, torch.float32, owners))
    assert len(values) == outputs - inputs
    return values[0] if single else tuple(values)


# --- The language -----------------------------------------------------------------------------------------------------


def arange(start: int, end: int, layout: Any) -> Value:
    assert (end - start) & (end - start - 1) == 0, "a power of two"
    return Value(np.arange(start, end), torch.int32, layout.owners([end - start]))


def full(shape: Sequence[int], value: float, dtype: torch.dtype, layout: Any) -> Value:
    return Value(np.full(shape, value), dtype, layout.owners(shape))


def convert_layout(value: Value, layout: Any, assert_trivial: bool) -> Value:
    assert assert_trivial
    _common(value.owners, layout.owners(value.shape))
    assert (value.owners == layout.owners(value.shape)).all(), "a conversion that moves elements between threads"
    return value


def _both(function: Callable[[np.ndarray], np.ndarray], value: Value) -> Value:
    """A rearrangement of the elements, and of who owns them."""
    return Value(function(value.data), value.dtype, function(value.owners))


def join(a: Value, b: Value) -> Value:
    return Value(np.stack([a.data, b.data], -1), a.dtype, np.stack([a.owners, b.owners], -1))


def _least(value: Value, axis: int) -> Value:
    return Value(value.data.min(axis), value.dtype)


def _static_assert(condition: bool) -> None:
    assert condition


def _minimum(a: Any, b: Any, propagate_nan: bool = False) -> Value:
    return _elementwise(np.minimum if propagate_nan else np.fmin, a, b)


def _language(i_program: Sequence[int]) -> types.SimpleNamespace:
    """Gluon's and Triton's language for one program."""
    return types.SimpleNamespace(
        float32=torch.float32, int32=torch.int32, int64=torch.int64, constexpr=int,
        PropagateNan=types.SimpleNamespace(ALL=True), static_range=range, static_assert=_static_assert,
        BlockedLayout=BlockedLayout, SliceLayout=SliceLayout,
        arange=arange, full=full, load=load, store=store, convert_layout=convert_layout, join=join,
        inline_asm_elementwise=inline_asm_elementwise, min=_least, minimum=_minimum,
        maximum=lambda a, b: _elementwise(np.fmax, a, b), abs=lambda a: _elementwise(np.abs, a),
        where=lambda m, a, b: _where(m, a, b),
        cast=lambda a, dtype: Value(a, dtype), cdiv=lambda a, b: (a + (b - 1)) // b,
        program_id=lambda axis: Value(i_program[axis], torch.int32),
        expand_dims=lambda a, axis: _both(lambda data: np.expand_dims(data, axis), a),
        reshape=lambda a, shape: _both(lambda data: data.reshape(shape), a),
        split=lambda a: tuple(_both(lambda data, i=i: data[..., i], a) for i in range(2)),
    )  # fmt: skip


def _where(m: Any, a: Any, b: Any) -> Value:
    like = next((one.dtype for one in (a, b) if isinstance(one, Value)), None)
    values = [_value(one, torch.int32 if like is None else like) for one in (a, b)]
    dtype = torch.promote_types(values[0].dtype, values[1].dtype)
    condition = _value(m, torch.bool)
    data = np.where(condition.data, *(one.data for one in values))
    return Value(data, dtype, _common(condition.owners, *(one.owners for one in values)))


class _Language:
    """The language of whichever program is running."""

    current: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(_Language.current, name)


def _translated(function: Callable[..., Any], known: dict[Any, Any]) -> Callable[..., Any]:
    """A kernel's Python with the language replaced in it and in all that it calls."""
    if function in known:
        return known[function]
    namespace: dict[str, Any] = {}
    known[function] = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    for name, one in function.__globals__.items():
        if isinstance(one, types.ModuleType) and one.__name__.startswith("triton."):
            namespace[name] = _Language()
        elif name in function.__code__.co_names and hasattr(one, "fn"):
            namespace[name] = _translated(one.fn, known)
        else:
            namespace[name] = one
    return known[function]


class Interpreted:
    """A Gluon kernel that is called as Triton calls it, on tensors of the CPU."""

    def __init__(self, kernel: Any) -> None:
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names
        self._run = _translated(kernel.fn, {})
        self._constants = {one.name for one in kernel.params if one.is_constexpr}

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(**named: Any) -> None:
            assert named.pop("num_warps") == named["WARPS"]
            named.pop("enable_fp_fusion")
            stored: dict[int, np.ndarray] = {}
            arguments = {}
            for name, one in named.items():
                if isinstance(one, torch.Tensor):
                    arguments[name] = Pointer(Memory(one), stored, Value(0, torch.int64))
                elif name in self._constants or one is None:
                    arguments[name] = one
                else:
                    arguments[name] = Value(one, torch.int32 if abs(one) < 2**31 else torch.int64)
            for i_program in itertools.product(*map(range, grid)):
                _Language.current = _language(i_program)
                self._run(**arguments)

        return launch
