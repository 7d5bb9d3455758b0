"""Finds and loads the compiled kernels."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def load() -> ctypes.CDLL:
    raise OSError("this install of gspn has no compiled kernels (no C++ compiler when it was built).")
