"""Print the largest error of the CPU kernels by compiler and processor, and plain PyTorch's beside it, as a table.

Builds with Clang, and for 64-bit ARM with qemu-user to run it, where these are installed: see tests/other_builds.py.
An error is the largest difference from float64, over the largest magnitude that was summed, in units of the dtype's
rounding (its eps): two of them are always allowed, and otherwise twice plain PyTorch's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import other_builds
from gspn.ops.cpu import instruction_sets
from propagate_cases import ALL, in_doubles, magnitudes, make_arguments, run
from support import DTYPES, make_inputs, scan_and_gradients

Results = dict[str, Tensor]


def line_scan(dtype: torch.dtype) -> tuple[Callable[[str], Results], Results, Results]:
    """The function that computes the results, the exact ones, and their magnitudes."""
    tensors = make_inputs(2, 40, 33, 35, 40, dtype)
    doubles = [t.double() for t in tensors]
    h = scan_and_gradients(*tensors, direction="down", segment=None, impl="reference")["h"]

    def compute(impl: str) -> Results:
        return scan_and_gradients(*tensors, h=h, direction="down", segment=None, impl=impl)

    exact = scan_and_gradients(*doubles, h=h.double(), direction="down", segment=None, impl="reference")
    return (
        compute,
        exact,
        scan_and_gradients(*[t.abs() for t in doubles], direction="down", segment=None, impl="reference"),
    )


def propagate(dtype: torch.dtype) -> tuple[Callable[[str], Results], Results, Results]:
    """The same for ``propagate``."""
    arguments, grad = make_arguments(2, 40, 33, 35, 8, 40, dtype)
    exact = run(in_doubles(arguments), grad.double(), ALL, None, "reference")
    return lambda impl: run(arguments, grad, ALL, None, impl), exact, magnitudes(arguments, grad, ALL, None)


def main() -> None:
    """Print the table."""
    cases = {(op.__name__, dtype): op(dtype) for op in (line_scan, propagate) for dtype in DTYPES}
    columns = {"plain PyTorch": {case: compute("reference") for case, (compute, *_) in cases.items()}}
    columns[f"GCC, {instruction_sets()[0]}"] = {case: compute("cpu") for case, (compute, *_) in cases.items()}
    for name, title in (("clang", "Clang"), ("aarch64", "GCC, aarch64 (NEON)")):
        if reason := other_builds.why_not(name):
            print(f"Left out: {title}, {reason}.", file=sys.stderr)
            continue
        with other_builds.in_place(other_builds.open_build(name)):
            columns[title] = {case: compute("cpu") for case, (compute, *_) in cases.items()}
    print(f"| operator | dtype | result | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for (operator, dtype), (_, exact, magnitude) in cases.items():
        first, *gradients = exact
        for label, names in ((f"`{first}`", [first]), ("worst gradient", gradients)):
            errors = [
                max(
                    ((results[operator, dtype][name].double() - exact[name]).abs().max() / magnitude[name].max()).item()
                    for name in names
                )
                / torch.finfo(dtype).eps
                for results in columns.values()
            ]
            print(f"| `{operator}` | {str(dtype)[6:]} | {label} | {' | '.join(f'{error:.2g}' for error in errors)} |")


if __name__ == "__main__":
    main()
