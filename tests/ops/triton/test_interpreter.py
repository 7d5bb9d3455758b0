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


@pytest.mark.parametrize(
    "what",
    [
        "sizes, segments, empty",
        "layouts, without_gate",
        "groups_and_dtypes, through_the_operator",
        "layouts_and_shared_taps, only_what_is_needed",
        "runs_of_segments, long_channels_last_rows",
        "long_rows, taps_that_point_nowhere",
        "long_rows_in_many_lines",
    ],
)
def test_interpreted(what: str) -> None:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {paths}; import interpreted; interpreted.main({what.split(', ')})"
    run_python(code, TRITON_INTERPRET="1")
