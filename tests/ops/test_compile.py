"""``torch.compile`` of the operators, each traced before it has ever been called, in one fresh process."""

from __future__ import annotations

import pytest

from support import run_python


@pytest.mark.slow
def test_operators_compile_before_their_first_call() -> None:
    # Every case in one process, which imports PyTorch's compilers once. A failure's traceback names its case.
    run_python("""
import torch, gspn
from torch._dynamo.testing import CompileCounterWithBackend

def same_as_uncompiled(step, *inputs):
    compiled = torch.compile(step, fullgraph=True)(*inputs)
    grads = torch.autograd.grad(compiled.sum(), inputs)
    expected = step(*inputs)
    torch.testing.assert_close(compiled, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def random(*shape):
    return torch.randn(*shape, requires_grad=True)

def scan(x, logits, lam):
    taps = gspn.stochastic_taps(logits, direction="right")
    return gspn.line_scan(x, taps, lam, direction="right", segment=3).tanh()

def propagate(*tensors):
    return gspn.propagate(*tensors, segment=3).tanh()

def compile_propagate():
    projections = random(4, 2, 3, 3), random(4, 6, 3), random(4, 6, 3), random(4, 6, 3), random(4)
    same_as_uncompiled(propagate, random(2, 6, 5, 7), random(2, 3, 5, 7), *projections)

def compile_line_scan_and_stochastic_taps():
    same_as_uncompiled(scan, random(2, 4, 6, 7), random(2, 2, 3, 6, 7), random(2, 4, 6, 7))

def compiles_once_for_every_size(step, *channels):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for height, width in [(6, 7), (9, 5), (12, 33), (8, 8)]:
        inputs = [random(2, *c, height, width) for c in channels]
        y = compiled(*inputs)
        torch.testing.assert_close(y, step(*inputs))
        y.sum().backward()
    assert counter.frame_count == 1, counter.frame_count

def all_directions(x, logits):
    return sum(
        gspn.line_scan(x, gspn.stochastic_taps(logits, direction=d), direction=d, segment=4) for d in gspn.DIRECTIONS
    )

def compile_under_autocast():
    def step(x, taps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gspn.line_scan(x, taps, direction="down")

    x, taps = torch.randn(1, 4, 5, 6), torch.rand(1, 1, 3, 5, 6) / 3
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x, taps)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, step(x, taps))

rest = [torch.randn(4, 1, 3, 2), torch.randn(4, 4, 2), torch.randn(4, 4, 2)]
compile_propagate()
compile_line_scan_and_stochastic_taps()
compiles_once_for_every_size(lambda x, p: gspn.propagate(x, p, *rest), (4,), (2,))
compiles_once_for_every_size(all_directions, (4,), (1, 3))
compile_under_autocast()
""")
