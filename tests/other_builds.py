"""The CPU kernels of another compiler, or of another processor under an emulator, in place of the installed ones."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from gspn.ops.cpu import c_structs, library
from support import ROOT

CLANG = next(filter(shutil.which, ("clang++", *(f"clang++-{version}" for version in range(22, 12, -1)))), None)
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), None)
_TOOLCHAIN = ROOT / "cmake" / "aarch64-linux-gnu.cmake"


def why_not(name: str) -> str | None:
    """The reason why ``"clang"`` or ``"aarch64"`` cannot be built and run here, or None."""
    if name == "clang":
        tools = {"cmake": shutil.which("cmake"), "clang++": CLANG}
    else:
        tools = {"cmake": shutil.which("cmake"), CROSS: shutil.which(CROSS), "qemu-aarch64 (qemu-user)": EMULATOR}
    missing = [tool for tool, path in tools.items() if path is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _build(folder: Path, *options: str) -> Path:
    # A folder that stays: of a second run only what has changed is compiled. Another worker may build, too.
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
            ["cmake", "--build", str(folder), "--target", "gspn_cpu", "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "gspn_cpu.so"


class ServedLibrary:
    """A library that another process has loaded: calls, and the memory they point to, go through pipes."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._names = self._process.stdout.readline().split()  # pyright: ignore[reportOptionalMemberAccess]
        assert self._names, "the process that serves the kernels did not start"
        for function in ("line_scan", "line_scan_backward", "propagate", "propagate_backward"):
            setattr(self, f"gspn_{function}", functools.partial(self._call, f"gspn_{function}"))

    def gspn_instruction_set(self, index: int) -> bytes | None:
        return self._names[index] if index < len(self._names) else None

    def gspn_chosen_instruction_set(self) -> bytes:
        return self._names[0]

    def gspn_choose_instruction_set(self, name: bytes) -> int:
        return name != self._names[0]

    def gspn_expect_first_touch(self, data: int, size: int) -> None:
        """A hint to the system: nothing to do."""

    def _call(self, function: str, reference: Any, threads: int) -> int:
        call = reference._obj
        regions = list(_regions(call))
        message = struct.pack("<32sqqq", function.encode(), threads, ctypes.sizeof(call), len(regions)) + bytes(call)
        for place, data, size in regions:
            message += struct.pack("<qq", place, size) + ctypes.string_at(data, size)
        self._process.stdin.write(message)  # pyright: ignore[reportOptionalMemberAccess]
        self._process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
        (status,) = struct.unpack("<q", self._read(8))
        for _, data, size in regions:
            ctypes.memmove(data, self._read(size), size)
        return status

    def _read(self, size: int) -> bytes:
        content = self._process.stdout.read(size)  # pyright: ignore[reportOptionalMemberAccess]
        assert len(content) == size, f"the process that serves the kernels ended with {self._process.wait()}"
        return content

    def close(self) -> None:
        self._process.communicate()


def _regions(call: Any) -> Iterator[tuple[int, int, int]]:
    """For each pointer of a call that is not null: its place in the struct, its value, and the bytes that it spans."""
    size = (4, 8, 2, 2)[call.dtype]
    state = max(size, 4)
    if isinstance(call, c_structs.LineScanCall):
        frame, elements = (call.lines, call.cross), {}
    else:
        frame, directions = (call.height, call.width), call.direction_count
        proxy = call.batch * call.height * call.proxy_row
        gates = directions * call.channels * call.proxy_channels
        elements = {
            "proxy": proxy, "tap_proj": directions * call.groups * 3 * call.proxy_channels, "lam_proj": gates,
            "u_proj": gates, "skip_proj": call.channels * call.proxy_channels,
        }  # fmt: skip
    for name, kind in call._fields_:
        field, place = getattr(call, name), getattr(type(call), name).offset
        if kind in (c_structs.Image, c_structs.Taps):
            image, channels, taps = field, call.channels, 0
            if kind is c_structs.Taps:
                image, channels, taps = field.image, call.groups, 2 * field.tap
            axes = zip(
                (call.batch, channels, *frame), (image.batch, image.channel, image.row, image.column), strict=True
            )
            span = (1 + taps + sum((count - 1) * stride for count, stride in axes)) * size
            field = image.data
        elif kind is ctypes.c_void_p:
            if name == "sizes":  # int64, two for each image
                span = 2 * call.batch * 8
            else:
                span = elements[name if name in elements else name.removeprefix("d")] * state
        else:
            continue
        if field:
            yield place, field, span


def open_build(name: str) -> Any:
    """Build ``"clang"`` or ``"aarch64"`` into ``build/``, and load it."""
    if name == "clang":
        # One instruction set, for AVX2 where this processor has it, and with -O1: a third of the time to compile.
        flags = "-O1 -mavx2 -mfma -mf16c" if "avx2" in library._names(library.load()) else "-O1"
        path = _build(
            ROOT / "build" / "clang", f"-DCMAKE_CXX_COMPILER={CLANG}", f"-DCMAKE_CXX_FLAGS={flags}",
            "-DCMAKE_BUILD_TYPE=None", "-DGSPN_FOR_X86_64=OFF",
        )  # fmt: skip
        with mock.patch.object(library, "_path", return_value=path):
            return library._open()
    path = _build(ROOT / "build" / "aarch64", f"-DCMAKE_TOOLCHAIN_FILE={_TOOLCHAIN}")
    server = path.with_name("serve_kernels")
    source = ROOT / "tests" / "ops" / "cpu" / "serve_kernels.cpp"
    subprocess.run(
        [CROSS, "-std=c++17", "-O1", "-static-libstdc++", "-static-libgcc", source, "-o", server, "-ldl"], check=True
    )
    return ServedLibrary([str(EMULATOR), "-L", "/usr/aarch64-linux-gnu", str(server), str(path)])


@contextlib.contextmanager
def in_place(other: Any) -> Iterator[None]:
    """``impl="cpu"`` runs the kernels of ``other`` inside a ``with`` block."""
    with mock.patch.object(library, "_library_or_error", return_value=other):
        yield
