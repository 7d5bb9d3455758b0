"""The Triton kernels on the CPU, through Triton's interpreter, against the specification.

Triton decides when it is imported whether it interprets. So each test runs in a process of its own, which has
TRITON_INTERPRET=1 set whatever this one has.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from support import ROOT, run_python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Lists of about the same time, for the workers of pytest-xdist.
LINE_SCAN = [
    "combinations, through_the_operator, only_what_is_needed, empty",
    "runs_of_segments, long_rows, long_rows_in_many_lines, taps_that_point_nowhere",
]
PROPAGATE = [
    "combinations, empty, few_programs, rows_and_lanes, approximate_instructions",
    "runs_of_segments, large_logits, large_states, infinite_logits, long_rows, many_spans, through_the_operator",
]


VALID_SIZE = [
    "line_scans, long_line_scans, sizes_through_the_operator",
    "propagates",
    "long_propagates, wild_sizes",
    "forty_sizes",
]
# In our interpreter of Gluon, which Triton's calls.
WARP_SCAN = [
    "rows_of_all_lengths, gradients",
    "all_directions, segments, large_logits, infinite_logits, broken_kernels",
]
CASES = {
    "interpreted": LINE_SCAN,
    "propagate_interpreted": PROPAGATE,
    "valid_size_interpreted": VALID_SIZE,
    "warp_scan_interpreted": WARP_SCAN,
}


@pytest.mark.parametrize(
    ("module", "functions"), [(module, names) for module, lists in CASES.items() for names in lists]
)
def test_interpreted(module: str, functions: str) -> None:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    imports = f"import interpreted; from {module} import {functions}"
    run_python(f"import sys; sys.path[:0] = {paths}; {imports}; interpreted.run([{functions}])", TRITON_INTERPRET="1")
