"""Finds and loads the compiled kernels, and gives them the threads of PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .c_structs import LineScanCall, PropagateCall

_INTERFACE_VERSION = 6

# Why the kernels refuse a call: the numbers are those of `Status` in kernels/common/workers.h.
_REFUSALS = {
    2: "a dtype that they do not know",
    3: "a direction that they do not know, or not one to four of them",
    4: "a size or stride below what is possible or beyond what memory holds",
    5: "a segment below 1",
    6: "a number of groups that does not divide the channels",
    7: "a tensor that is missing, or one where none belongs",
    8: "a number of threads below 1 or beyond 1048576",
}


def _path() -> Path:
    # An editable install keeps the sources in one folder and the built library in another; both are on __path__.
    for folder in sys.modules[__name__.rpartition(".")[0]].__path__:
        path = Path(folder) / "gspn_cpu.so"
        if path.is_file():
            return path
    if sys.platform == "win32":
        raise OSError("gspn has no compiled kernels for Windows; under WSL it has those of Linux.")
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


def _check_file(path: Path) -> None:
    """Raise OSError if the library is damaged or cut off: the system would crash."""
    digest = path.with_name(f"{path.name}.sha256")
    content = path.read_bytes()
    if digest.is_file() and hashlib.sha256(content).hexdigest() != digest.read_text("ascii", "replace").strip():
        raise OSError(f"{path} is damaged: its checksum is not the one in {digest.name}.")
    # Without a checksum: a 64-bit ELF file ends with the table whose place its header tells.
    if len(content) >= 64 and content[:6] == b"\x7fELF\x02\x01":
        (table,) = struct.unpack_from("<Q", content, 40)
        entry_size, entries = struct.unpack_from("<HH", content, 58)
        if table + entry_size * entries > len(content):
            raise OSError(f"{path} is damaged: it is shorter than its header says.")


def _open() -> ctypes.CDLL:
    path = _path()
    _check_file(path)
    try:
        library = ctypes.CDLL(str(path))
        version = library.gspn_interface_version()
        if version != _INTERFACE_VERSION:
            raise OSError(
                f"{path} has interface version {version}, not {_INTERFACE_VERSION}: it was built from other sources."
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
    except AttributeError as error:  # ctypes names the file and the symbol
        raise OSError(f"{error}: it is not the library of this version of gspn.") from error
    if name := os.environ.get("GSPN_ISA"):
        _choose(library, name, "GSPN_ISA")
    return library


@functools.cache
def _library_or_error() -> ctypes.CDLL | OSError | ValueError:
    # functools.cache keeps no exceptions, and a damaged file should be opened once.
    try:
        return _open()
    except (OSError, ValueError) as error:
        return error.with_traceback(None)


def load() -> ctypes.CDLL:
    """The loaded library, on the instruction set that the environment variable ``GSPN_ISA`` names, or else the fastest.

    The file is opened once; where that failed, every call raises the same error.

    Raises:
        OSError: it was not built, is damaged or cut off, or belongs to another version of gspn.
        ValueError: ``GSPN_ISA`` names an instruction set that does not run here.
    """
    library = _library_or_error()
    if isinstance(library, Exception):
        raise type(library)(str(library))
    return library


def run(function: Callable[..., int], call: ctypes.Structure, what: str) -> None:
    """Call an operator's entry point with PyTorch's number of threads.

    Raises:
        MemoryError: there was not enough memory.
        ValueError: the kernels refuse the call, whose numbers cannot be right.
    """
    status = function(ctypes.byref(call), torch.get_num_threads())
    if status == 1:
        raise MemoryError(f"{what} ran out of memory.")
    if status:
        raise ValueError(f"{what}: the CPU kernels were given {_REFUSALS[status]}.")


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
    """The instruction set that the kernels run with now: ``"avx512"``, ``"avx2"`` or ``"baseline"`` (on ARM, NEON)."""
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
