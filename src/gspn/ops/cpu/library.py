"""Finds and loads the compiled kernels, and gives them the threads of PyTorch."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch

from .c_structs import LineScanCall, PropagateCall

_INTERFACE_VERSION = 2


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
    """The loaded library.

    Raises:
        OSError: it was not built, cannot be loaded, or belongs to another version of gspn.
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
    library.gspn_isa.restype = ctypes.c_char_p
    _share_threads(library)
    return library


def isa() -> str:
    """The instruction set the kernels run with: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""
    return load().gspn_isa().decode()
