"""Arrays in ``.npz`` files that a person or another program wrote."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..._errors import UsageError, require
from ..._files import open_regular, printable

# What zip and numpy raise for a damaged file: BadZipFile and zlib.error are not OSError or ValueError, another
# compression is NotImplementedError, and a password is RuntimeError. numpy reads the header of an array as Python.
_DAMAGED = (
    EOFError, NotImplementedError, OSError, RuntimeError, SyntaxError, ValueError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def read_npz(path: Path, *names: str) -> list[NDArray | None]:
    """Arrays of an ``.npz`` file by name; None for those that it does not have.

    Nothing is unpickled, and no memory is taken for what an array claims to be, but the file does not hold.

    Raises:
        UsageError: the file is damaged, or an array does not fit into the free memory.
        OSError: it cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return [_array(archive, name) for name in names]
        except UsageError as error:
            raise UsageError(f"{printable(path)}: {error}") from None
        except _DAMAGED as error:
            raise UsageError(f"{printable(path)} cannot be read as an .npz: {error}.") from None


def _array(archive: zipfile.ZipFile, name: str) -> NDArray | None:
    if f"{name}.npy" not in archive.namelist():
        return None
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    needed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise UsageError(f"{name} holds Python objects, which could run code; save numbers.")
    if min(shape, default=0) < 0 or needed > info.file_size or info.file_size > 1100 * info.compress_size + 1100:
        raise UsageError(f"{name} is damaged: it claims to be {dtype} {list(shape)}, which the file does not hold.")
    free = require("psutil").virtual_memory().available
    if needed > free:
        raise UsageError(f"{name} takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; use a part of it.")
    with archive.open(info) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
