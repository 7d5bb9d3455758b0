"""``line_scan`` as PyTorch sees it: opcheck, export, autocast, vmap, function transforms."""

from __future__ import annotations

import pytest
import torch

import gspn
from support import CPU_IMPLS, every_pair, make_inputs


@every_pair(impl=CPU_IMPLS, layout=["contiguous", "channels_last", "sliced"], with_lam=[True, False], segment=[None, 2])
def test_opcheck_forward(impl, layout, with_lam, segment) -> None:
    x, taps, lam, _ = (t.requires_grad_() for t in make_inputs(2, 4, 3, 5, 2, torch.float32, layout=layout))
    torch.library.opcheck(torch.ops.gspn.line_scan, (x, taps, lam if with_lam else None, "left", segment, impl))


@every_pair(impl=CPU_IMPLS, need_taps=[True, False], need_lam=[True, False])
def test_opcheck_backward(impl, need_taps, need_lam) -> None:
    x, taps, lam, grad = (t.requires_grad_() for t in make_inputs(2, 4, 3, 5, 2, torch.float32))
    h = gspn.line_scan(x, taps, lam, direction="up").detach().requires_grad_()
    args = (grad, h, x if need_lam else None, taps, lam, "up", None, impl, need_taps, need_lam)
    torch.library.opcheck(torch.ops.gspn.line_scan_backward, args)


def test_export_with_dynamic_sizes() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x, taps, lam):
            return gspn.line_scan(x, taps, lam, direction="down", segment=3)

    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    frame = {2: height, 3: width}
    program = torch.export.export(
        Scan(), make_inputs(2, 4, 5, 6, 4, torch.float32)[:3], dynamic_shapes=(frame, {3: height, 4: width}, frame)
    )
    assert "gspn.line_scan.default" in program.graph_module.code
    other = make_inputs(2, 4, 9, 11, 4, torch.float32)[:3]
    torch.testing.assert_close(program.module()(*other), Scan()(*other))


def test_fx_traces_the_bare_operator() -> None:
    def scan(x, taps):
        return torch.ops.gspn.line_scan(x, taps, None, "down", None, "auto")

    traced = torch.fx.symbolic_trace(scan)
    x, taps, *_ = make_inputs(1, 2, 3, 4, 1, torch.float32)
    assert torch.equal(traced(x, taps), scan(x, taps))


@pytest.mark.parametrize(("autocast", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_autocast_rule(autocast, expected) -> None:
    # bfloat16 as matrix products do; float16, which a long scan overflows, computes in float32 as cumsum does.
    x, taps, lam, _ = make_inputs(1, 4, 5, 6, 2, torch.float32)
    with torch.autocast("cpu", dtype=autocast):
        h = gspn.line_scan(x, taps.bfloat16(), lam, direction="down")
        doubles = gspn.line_scan(x.double(), taps.double(), direction="down")
    assert h.dtype == expected
    assert doubles.dtype == torch.float64
    plain = gspn.line_scan(*(t.to(expected) for t in (x, taps.bfloat16(), lam)), direction="down")
    assert torch.equal(h, plain)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (2, 3, 4), (None, 0, 0)])
def test_vmap(impl, in_dims) -> None:
    tensors = list(make_inputs(1, 4, 5, 6, 2, torch.float64)[:3])
    for i, dim in enumerate(in_dims):
        if dim is not None:
            tensors[i] = torch.stack([tensors[i] * (1 + 0.1 * k) for k in range(3)], dim=dim)

    def scan(x, taps, lam):
        return gspn.line_scan(x, taps, lam, direction="left", segment=4, impl=impl)

    actual = torch.func.vmap(scan, in_dims)(*tensors)
    expected = torch.stack([
        scan(*(t if dim is None else t.select(dim, k) for t, dim in zip(tensors, in_dims, strict=True)))
        for k in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_per_sample_gradients(impl) -> None:
    x, taps, lam, _ = make_inputs(3, 4, 5, 6, 2, torch.float64)

    def loss(x, taps, lam):
        return gspn.line_scan(x[None], taps[None], lam[None], direction="up", impl=impl).pow(2).sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(x, taps, lam)
    tensors = [t.clone().requires_grad_() for t in (x, taps, lam)]
    total = gspn.line_scan(*tensors, direction="up").pow(2).sum()
    for actual, expected in zip(grads, torch.autograd.grad(total, tensors), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_hessian(impl) -> None:
    x, taps, lam, _ = make_inputs(1, 1, 3, 2, 1, torch.float64)

    def loss(x, taps):
        return gspn.line_scan(x, taps, lam, direction="right", impl=impl).pow(3).sum()

    for row, other in zip(
        torch.func.jacrev(torch.func.jacrev(loss, argnums=(0, 1)), argnums=(0, 1))(x, taps),
        torch.autograd.functional.hessian(loss, (x, taps)), strict=True,
    ):  # fmt: skip
        for actual, expected in zip(row, other, strict=True):
            torch.testing.assert_close(actual, expected)


def test_meta_tensors_have_shapes() -> None:
    x, taps = torch.empty(2, 4, 5, 6, device="meta"), torch.empty(2, 1, 3, 5, 6, device="meta")
    h = gspn.line_scan(x, taps, direction="down")
    assert h.device.type == "meta"
    assert h.shape == x.shape
