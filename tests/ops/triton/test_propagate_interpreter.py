"""The Triton kernels of propagate on the CPU, through Triton's interpreter, against the specification.

In processes of their own, as test_interpreter.py says.
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
        "sizes, layouts, empty",
        "states_and_groups, large_logits, dtypes",
        "segments, through_the_operator",
        "long_rows, many_spans",
    ],
)
def test_interpreted(what: str) -> None:
    paths = [str(ROOT / "tests"), str(Path(__file__).parent)]
    call = f"propagate_interpreted.main({what.split(', ')})"
    code = f"import sys; sys.path[:0] = {paths}; import propagate_interpreted; {call}"
    run_python(code, TRITON_INTERPRET="1")
