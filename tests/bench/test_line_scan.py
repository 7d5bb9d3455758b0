"""The benchmark of line_scan: the bytes that count, the problem that is checked, the results."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import gspn
from gspn.bench import line_scan
from gspn.bench.line_scan import Problem, check, measure

CPU = torch.device("cpu")


def problem(**changes) -> Problem:
    return Problem(
        **{
            "batch": 1,
            "channels": 4,
            "groups": 4,
            "height": 6,
            "width": 5,
            "dtype": torch.float32,
            "direction": "down",
            "segment": None,
            "memory_format": torch.contiguous_format,
            "device": CPU,
            **changes,
        }
    )


def test_bytes_are_six_and_twelve_tensors_with_per_channel_taps():
    one = problem()
    tensor = 4 * 6 * 5 * 4
    assert one.traffic("forward") == 6 * tensor
    assert one.traffic("backward") == 12 * tensor
    shared = problem(groups=1, dtype=torch.bfloat16)
    assert shared.traffic("forward") == (3 * 4 + 3) * 6 * 5 * 2
    assert shared.traffic("backward") == (6 * 4 + 2 * 3) * 6 * 5 * 2


@pytest.mark.parametrize(
    ("memory_format", "groups"),
    [(torch.contiguous_format, 4), (torch.channels_last, 1), (torch.channels_last, 2)],
)
def test_tensors_have_the_layout_asked_for(memory_format, groups):
    tensors = problem(groups=groups, memory_format=memory_format, dtype=torch.bfloat16).tensors()
    for tensor in (tensors.x, tensors.lam, tensors.grad):
        assert tensor.shape == (1, 4, 6, 5)
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=memory_format)
    assert tensors.taps.shape == (1, groups, 3, 6, 5)
    assert tensors.taps.flatten(1, 2).is_contiguous(memory_format=memory_format)
    assert torch.allclose(tensors.taps.float().sum(2), torch.tensor(1.0), atol=0.01)


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
@pytest.mark.parametrize(
    "size",
    [
        {"batch": 16, "channels": 8, "groups": 8, "height": 512, "width": 512},
        {"batch": 1, "channels": 640, "groups": 1, "height": 64, "width": 64, "segment": 4},
        {"batch": 4, "channels": 144, "groups": 12, "height": 1024, "width": 16, "segment": 400},
        {"batch": 2, "channels": 2, "groups": 2, "height": 1, "width": 1},
        {"batch": 2, "channels": 2, "groups": 1, "height": 16384, "width": 16384, "segment": 100},
    ],
)
def test_the_checked_problem_is_small_odd_and_of_the_same_kind(direction, size):
    full = problem(direction=direction, **size)
    small = full.reduced()
    assert small.height % 2
    assert small.width % 2
    assert small.height != small.width
    assert small.elements <= line_scan._CHECK_ELEMENTS
    assert small.channels % small.groups == 0
    for name in ("dtype", "direction", "memory_format", "device"):
        assert getattr(small, name) == getattr(full, name)
    assert (small.groups == 1) == (full.groups == 1)
    assert (small.channels == small.groups) == (full.channels == full.groups)
    if small.segment is not None and full.segments > 1:
        assert small.lines == (small.height if direction in ("down", "up") else small.width)
        assert small.segments > 2
        assert small.lines % small.segment


@pytest.mark.parametrize("direction", gspn.DIRECTIONS)
def test_implementations_that_run_here_pass_the_check(direction):
    one = problem(direction=direction, groups=2, segment=4, memory_format=torch.channels_last, height=33, width=20)
    impls = [name for name, reason in gspn.available_impls(torch.empty(0), op="line_scan").items() if reason is None]
    for name, accuracies in check(one, impls).items():
        assert [one.name for one in accuracies] == ["h", "dx", "dtaps", "dlam"]
        assert all(one.ok for one in accuracies), (name, accuracies)


def test_forward_alone_is_checked_without_gradients():
    (accuracies,) = check(problem(dtype=torch.float16), ["reference"], ["forward"]).values()
    assert [one.name for one in accuracies] == ["h"]


def test_a_result_for_each_mode_direction_and_implementation():
    steps = []
    made = measure(problem(), ["down", "left"], [], repeats=2, min_time=0.0, progress=lambda *at: steps.append(at))
    assert [(r.mode, r.details["direction"], r.name) for r in made] == [
        ("forward", "down", "reference"),
        ("forward", "left", "reference"),
        ("backward", "down", "reference"),
        ("backward", "left", "reference"),
    ]
    for r in made:
        assert r.timing is not None and r.timing.p50 > 0 and r.ratio == 1
        gbs = r.details["bytes"] / r.timing.p50 / 1e6
        assert r.details["gbs"] == pytest.approx(gbs)
        assert r.details["fraction_of_copy"] == pytest.approx(gbs / r.details["copy_gbs"])
    assert steps[-1][0] == steps[-1][1] == 4 * 2 + 2 * 2  # four calls and two kinds of copy


def test_without_baselines_nothing_is_compared_with_the_loop():
    made = measure(problem(), ["up"], ["reference"], ["forward"], baselines=False, repeats=1, min_time=0.0)
    assert len(made) == 1
    made = measure(problem(), ["up"], [], baselines=False, repeats=1, min_time=0.0)
    assert made == []


def test_one_launch_a_line_is_for_cuda():
    assert "CUDA" in (line_scan.why_no_line_per_launch(problem()) or "")
    half = problem(device=torch.device("cuda"), dtype=torch.float16)
    assert "float32" in (line_scan.why_no_line_per_launch(half) or "")


def test_one_launch_a_line_computes_the_scan():
    pytest.importorskip("triton")
    # Triton decides at import whether it interprets, so this needs a process of its own.
    program = """
        import torch, gspn
        from gspn.bench.kernel_per_line_baseline import LinePerLaunch
        for direction, segment, groups in (("up", 3, 1), ("right", None, 2)):
            x, lam = torch.randn(1, 4, 4, 3), torch.randn(1, 4, 3, 4).permute(0, 3, 1, 2)
            taps = gspn.stochastic_taps(torch.randn(1, groups, 3, 4, 3), direction=direction)
            h = LinePerLaunch(x, taps, lam, direction, segment)()
            expected = gspn.line_scan(x, taps, lam, direction=direction, segment=segment, impl="reference")
            torch.testing.assert_close(h, expected)
        """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
