"""Finds and loads the compiled kernels, and gives them the threads of PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .c_structs import LineScanCall, PropagateCall

_INTERFACE_VERSION = 3


def _path() -> Path:
    # An editable install keeps the sources in one folder and the built library in another; both are on __path__.
    for folder in sys.modules[__name__.rpartition(".")[0]].__path__:
        path = Path(folder) / "gspn_cpu.so"
        if path.is_file():
            return path
    raise OSError("this install of gspn has no compiled kernels: there was no C++ compiler when it was built.")


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on the OpenMP threads that PyTorch keeps.

    A runtime of our own would keep a second team of threads, and after each parallel region a team's idle threads spin
    on the cores that the other team needs. Asking libtorch_cpu for the symbol finds the runtime it was linked with,
    wherever that is; where there is none (macOS, a PyTorch without OpenMP) the kernels start threads for the call and
    join them.
    """
    name = "libtorch_cpu.so"
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name), mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        region = torch_cpu.GOMP_parallel
    except (AttributeError, OSError):
        return
    library.gspn_use_parallel_region.argtypes = [ctypes.c_void_p]
    library.gspn_use_parallel_region.restype = None
    library.gspn_use_parallel_region(ctypes.cast(region, ctypes.c_void_p))


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library, on the instruction set that the environment variable ``GSPN_ISA`` names, or else the fastest.

    Raises:
        OSError: it was not built, cannot be loaded, or belongs to another version of gspn.
        ValueError: ``GSPN_ISA`` names an instruction set that does not run here.
    """
    library = ctypes.CDLL(str(_path()))
    found = library.gspn_interface_version()
    if found != _INTERFACE_VERSION:
        raise OSError(
            f"{_path()} has interface version {found}, not {_INTERFACE_VERSION}: it was built from other sources."
        )
    for function, call in (
        (library.gspn_line_scan, LineScanCall),
        (library.gspn_line_scan_backward, LineScanCall),
        (library.gspn_propagate, PropagateCall),
        (library.gspn_propagate_backward, PropagateCall),
    ):
        function.argtypes = [ctypes.POINTER(call), ctypes.c_int64]
        function.restype = ctypes.c_int32
    library.gspn_expect_first_touch.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.gspn_expect_first_touch.restype = None
    library.gspn_instruction_set.argtypes = [ctypes.c_int64]
    library.gspn_instruction_set.restype = ctypes.c_char_p
    library.gspn_chosen_instruction_set.restype = ctypes.c_char_p
    library.gspn_choose_instruction_set.argtypes = [ctypes.c_char_p]
    _share_threads(library)
    if name := os.environ.get("GSPN_ISA"):
        _choose(library, name, "GSPN_ISA")
    return library


def _names(library: ctypes.CDLL) -> tuple[str, ...]:
    names: list[str] = []
    while name := library.gspn_instruction_set(len(names)):
        names.append(name.decode())
    return tuple(names)


def _choose(library: ctypes.CDLL, name: str, argument: str) -> None:
    if library.gspn_choose_instruction_set(name.encode()):
        names = ", ".join(_names(library))
        raise ValueError(
            f"{argument}={name!r} is not an instruction set of these kernels and this CPU; use one of {names}."
        )


def isa() -> str:
    """The instruction set that the kernels run with now: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""
    return load().gspn_chosen_instruction_set().decode()


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this library has and this CPU runs, the fastest first.

    Raises:
        OSError: the library was not built or cannot be loaded.

    Example:
        >>> import gspn.ops.cpu
        >>> gspn.ops.cpu.instruction_sets()[-1]
        'baseline'
    """
    return _names(load())


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the CPU kernels with the instruction set ``name`` inside a ``with`` block, for tests and measurements.

    The choice holds for the whole process. A call that another thread has begun finishes with the instruction set that
    it began with. The environment variable ``GSPN_ISA`` sets what holds outside any block.

    Args:
        name: one of :func:`instruction_sets`.

    Raises:
        ValueError: ``name`` is not one of :func:`instruction_sets`.
        OSError: the library was not built or cannot be loaded.

    Example:
        >>> import torch, gspn.ops.cpu
        >>> x, taps = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 3, 2, 1)
        >>> with gspn.ops.cpu.instruction_set("baseline"):
        ...     gspn.line_scan(x, taps, direction="down", impl="cpu").flatten()
        tensor([1., 2.])
    """
    library = load()
    before = isa()
    _choose(library, name, "name")
    try:
        yield
    finally:
        _choose(library, before, "name")
