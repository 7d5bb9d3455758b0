"""A library that is not the right one is a reason, and a call that cannot be right is refused."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gspn.ops.cpu import c_structs, library, line_scan, propagate, why_not
from propagate_cases import make_arguments
from support import make_inputs, run_python

KINDS = [
    "text", "empty", "zeros", "cut 0.001", "cut 0.3", "cut 0.9", "cut 0.9999", "another version", "missing symbols",
    "foreign", "half of it zeros", "a byte changed",
]  # fmt: skip

CHECK = """
import sys, warnings, torch, gspn
from pathlib import Path
from gspn.ops import implementations
from gspn.ops.cpu import library
x, taps = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 3, 2, 1)
version = library._INTERFACE_VERSION
for path in {paths}:
    library._path = lambda: Path(path)
    library._INTERFACE_VERSION = version + ("another version" in path)
    library._library_or_error.cache_clear()
    implementations._auto_choice.clear()
    reason = gspn.available_impls(x, op="line_scan")["cpu"]
    assert reason and path in reason and reason.endswith("."), (path, reason)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert gspn.line_scan(x, taps, direction="down").flatten().tolist() == [1, 2]
    assert len(caught) == 1 and reason in str(caught[0].message), (path, caught)
    try:
        gspn.line_scan(x, taps, direction="down", impl="cpu")
    except ImportError as error:
        assert reason in str(error), (path, error)
    else:
        raise AssertionError(path)
    print(reason)
"""


def damaged(kind: str, path: Path) -> None:
    real = library._path().read_bytes()
    if kind == "text":
        path.write_text("not a library")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind.startswith("cut"):
        path.write_bytes(real[: int(len(real) * float(kind.split()[1]))])
    elif kind == "zeros":
        path.write_bytes(bytes(len(real)))
    elif kind in ("half of it zeros", "a byte changed"):
        # Nothing but a checksum tells: the install writes one.
        path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(real).hexdigest() + "\n")
        content = bytearray(real)
        half = len(real) // 2
        if kind == "a byte changed":
            content[half] ^= 1
        else:
            content[half:] = bytes(len(real) - half)
        path.write_bytes(content)
    elif kind == "another version":
        path.write_bytes(real)
    elif kind == "missing symbols":
        path.write_bytes(real.replace(b"gspn_propagate_backward", b"gspn_propagate_backwarx"))
    else:  # a library of something else
        shutil.copy(torch._C.__file__, path)


def test_a_damaged_library_is_a_reason(tmp_path) -> None:
    paths = [str(tmp_path / f"{kind}.so") for kind in KINDS]
    for kind, path in zip(KINDS, paths, strict=True):
        damaged(kind, Path(path))
    # In a process of its own, which loading a damaged library may end.
    done = run_python(CHECK.format(paths=paths))
    assert len(done.stdout.splitlines()) == len(KINDS)


def test_the_file_is_opened_once(monkeypatch, tmp_path) -> None:
    (tmp_path / "gspn_cpu.so").write_text("not a library")
    opened = []
    monkeypatch.setattr(library, "_path", lambda: opened.append(1) or tmp_path / "gspn_cpu.so")
    library._library_or_error.cache_clear()
    try:
        reasons = {why_not(torch.device("cpu"), torch.float32, "propagate") for _ in range(3)}
    finally:
        library._library_or_error.cache_clear()
    assert len(reasons) == len(opened) == 1


@pytest.mark.parametrize(("platform", "remedy"), [("linux", "--no-binary gspn gspn"), ("win32", "under WSL")])
def test_without_a_library_the_reason_is_that_of_the_platform(monkeypatch, platform, remedy) -> None:
    monkeypatch.setattr("gspn.ops.cpu.__path__", [])
    monkeypatch.setattr("sys.platform", platform)
    library._library_or_error.cache_clear()
    try:
        reason = why_not(torch.device("cpu"), torch.float32, "propagate")
    finally:
        library._library_or_error.cache_clear()
    assert "no compiled kernels" in reason
    assert remedy in reason
    assert ("compiler" in reason) == (platform == "linux")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the memory of the process is read from /proc")
def test_a_thread_that_ends_gives_its_scratch_back() -> None:
    run_python(
        """
import sys, threading, torch
from pathlib import Path
sys.path.insert(0, "tests")
from propagate_cases import ALL, make_arguments
arguments, _ = make_arguments(1, 8, 250, 256, 2, 1, torch.float32)
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def work():
    torch.ops.gspn.propagate(*arguments, ALL, None, "cpu")
sizes = []
for _ in range(40):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sizes.append(resident())
grown = (sizes[-1] - sizes[4]) / 2**20
assert grown < 35, f"{grown:.0f} MiB more after 35 threads"
print(grown)
"""
    )


# --- Calls ------------------------------------------------------------------------------------------------------------

INTEGERS = (0, -1, -(2**63), 2**62, 2**63 - 1)


def calls(monkeypatch) -> list[tuple[Any, Any, list[Any]]]:
    """A right call of each entry point, its function, and what must stay alive."""
    caught: list[tuple[Any, Any]] = []
    x, taps, lam, grad = make_inputs(1, 4, 3, 5, 2, torch.float32)
    arguments, grad_y = make_arguments(1, 4, 3, 5, 2, 2, torch.float32)

    def catch(function, call, what) -> None:
        caught.append((call, function))
        library.run(function, call, what)

    for module in (line_scan, propagate):
        monkeypatch.setattr(module, "run", catch)
    # Everything is kept: a call that is changed in one number and accepted must find its memory.
    keep: list[Any] = [x, taps, lam, grad, arguments, grad_y]

    def kept(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_keep(*args: Any, **kwargs: Any) -> torch.Tensor:
            keep.append(allocate(*args, **kwargs))
            return keep[-1]

        return allocate_and_keep

    monkeypatch.setattr(torch, "empty", kept(torch.empty))
    monkeypatch.setattr(torch, "empty_like", kept(torch.empty_like))
    h = line_scan.line_scan(x, taps, lam, "down", None)
    line_scan.line_scan_backward(grad, h, x, taps, lam, "left", 2, True, True)
    directions = ("down", "left", "up", "right")
    propagate.propagate(*arguments, directions, None)
    propagate.propagate_backward(grad_y, *arguments, directions, 2)
    assert len(caught) == 4
    return [(call, function, keep) for call, function in caught]


def test_wrong_numbers_are_refused(monkeypatch) -> None:
    refused = 0
    for call, function, _keep in calls(monkeypatch):
        for (name, kind), value in itertools.product(call._fields_, INTEGERS):
            if kind not in (ctypes.c_int64, ctypes.c_int32) or name in ("reverse", "proxy_row"):
                continue
            if name == "segment" and value > 2**60:
                value = 2**63 - 1
            number = max(min(value, 2**31 - 1), -(2**31)) if kind is ctypes.c_int32 else value
            if name == "dtype" and number == 0:
                continue  # float32
            right = getattr(call, name)
            setattr(call, name, number)
            with pytest.raises(ValueError, match="the CPU kernels were given"):
                library.run(function, call, "it")
            setattr(call, name, right)
            refused += 1
        library.run(function, call, "it")
    assert refused > 100


def test_wrong_directions_groups_threads_and_pointers_are_refused(monkeypatch) -> None:
    for call, function, _keep in calls(monkeypatch):
        call.groups = 3
        with pytest.raises(ValueError, match="groups"):
            library.run(function, call, "it")
        call.groups = 2
        for threads in (0, -1, 2**62):
            assert function(ctypes.byref(call), threads) == 8
        assert function(None, 1) == 7
        if hasattr(call, "directions"):
            for code in (-1, 4, 2**31 - 1):
                right, call.directions[1] = call.directions[1], code
                with pytest.raises(ValueError, match="direction"):
                    library.run(function, call, "it")
                call.directions[1] = right
            call.proxy_row = call.width * call.proxy_channels - 1
            with pytest.raises(ValueError, match="size"):
                library.run(function, call, "it")
            call.proxy_row += 1
        for name, kind in call._fields_:
            if kind is c_structs.Image:
                image = getattr(call, name)
                right, image.row = image.row, 2**62
                if image.data:
                    with pytest.raises(ValueError, match="size"):
                        library.run(function, call, "it")
                image.row = right
            needed = name in ("x", "h", "grad", "dx", "y") and kind is c_structs.Image and getattr(call, name).data
            if needed:
                image = getattr(call, name)
                right, image.data = image.data, None
                with pytest.raises(ValueError, match="missing"):
                    library.run(function, call, "it")
                image.data = right
            elif kind is ctypes.c_void_p and getattr(call, name):
                right = getattr(call, name)
                setattr(call, name, None)
                if name != "skip_proj" or call.dproxy:  # a forward may be without it
                    with pytest.raises(ValueError, match="missing"):
                        library.run(function, call, "it")
                setattr(call, name, right)
