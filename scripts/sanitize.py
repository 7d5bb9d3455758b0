"""Sweep the CPU kernels, built with the address and undefined-behaviour sanitizers, over shapes, layouts and values.

Builds into ``build/sanitize``, then starts itself again with the sanitizer's runtime loaded first. There the memory of
tensors has guard zones around it, so a read or a write beside one ends the sweep with a report, and so does an overflow
of an integer or a pointer, a wrong alignment or a conversion out of range. Run it by ``make sanitize``.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"

SIZES = [(1, 1), (1, 5), (7, 1), (2, 2), (9, 6), (17, 35), (33, 16), (5, 19)]
# Gathered in the result's own memory, walked in tiles, walked where they are: by size and layout.
LARGE = [(100, 90), (270, 256)]
CHANNELS = [(1, 1), (3, 3), (16, 16), (16, 8), (17, 1), (40, 20), (48, 3), (24, 2)]
SEGMENTS = [None, 1, 2, 5]
LAYOUTS = ["contiguous", "channels_last", "sliced", "expanded", "transposed", "channels_last_taps_inner"]
VALUES = ["moderate", "huge logits", "largest logits", "nan", "large states"]


def build() -> None:
    """Build the library with the sanitizers."""
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}"],
        ["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())],
    ):
        subprocess.run(command, check=True)


def sweep(library_file: Path) -> Counter[str]:
    """Run every kernel; the number of calls of each."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from gspn import DIRECTIONS
    from gspn.ops.cpu import instruction_set, instruction_sets, library
    from propagate_cases import make_arguments
    from propagate_cases import run as run_propagate
    from support import DTYPES, make_inputs, scan_and_gradients

    library._path = lambda: library_file
    calls: Counter[str] = Counter()
    ways: Any = enumerate(itertools.product(instruction_sets(), DTYPES, LAYOUTS, range(1, 18)))
    for i, (isa, dtype, layout, proxy_channels) in ways:
        # Steps without a common factor, so that every two of these meet.
        shape = LARGE[i // 64 % 2] if i % 64 == 63 else SIZES[i % 8]
        channels, groups = CHANNELS[i // 3 % 8]
        segment, direction, values = SEGMENTS[i // 5 % 4], DIRECTIONS[i // 7 % 4], VALUES[i // 11 % 5]
        torch.set_num_threads((1, 3)[i // 13 % 2])
        arguments, grad = make_arguments(
            1 + i % 2, channels, *shape, proxy_channels, groups, dtype, layout=layout, seed=i, skip=i % 3 > 0,
            directions=1 + i % 4, logits=2.0,
        )  # fmt: skip
        x, taps, lam, grad_h = make_inputs(1 + i % 2, channels, *shape, groups, dtype, layout=layout)
        x_propagated, proxy, tap_proj, *gates = arguments
        most = torch.finfo(dtype).max
        if values == "huge logits":
            tap_proj = tap_proj * 300
        elif values == "largest logits":
            tap_proj = tap_proj.sign() * most
        elif values == "nan":
            tap_proj, taps = tap_proj.clone(), taps.clone()
            tap_proj.flatten()[::5] = float("nan")
            taps[..., -1, -1] = float("nan")
        elif values == "large states":
            x_propagated, x = x_propagated * (most / 2), x * (most / 2)
        directions = ",".join((DIRECTIONS * 2)[i % 4 :][: 1 + i % 4])
        with instruction_set(isa):
            run_propagate((x_propagated, proxy, tap_proj, *gates), grad, directions, segment, "cpu")  # type: ignore[arg-type]
            lam_or_none = lam if i % 3 else None
            scan_and_gradients(x, taps, lam_or_none, grad_h, direction=direction, segment=segment, impl="cpu")
        for operator in ("propagate", "line_scan"):
            calls[f"{operator} {isa}"] += 2
        if (i + 1) % 102 == 0:
            print(f"{isa} {str(dtype).removeprefix('torch.')}: {calls.total()} calls so far", flush=True)
    return calls


def main() -> None:
    """Build and sweep, or with a library's path, as :func:`main` starts this script again, sweep alone."""
    if len(sys.argv) > 1:
        calls = sweep(Path(sys.argv[1]))
        print(f"{calls.total()} calls of the kernels, forward and backward, nothing found:")
        for name, count in sorted(calls.items()):
            print(f"  {name}: {count}")
        return
    if shutil.which("cmake") is None:
        raise SystemExit("make sanitize needs cmake and GCC: pip install cmake.")
    build()
    compiler = os.environ.get("CXX", "c++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's and PyTorch's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, __file__, str(BUILD / "gspn_cpu.so")]
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
