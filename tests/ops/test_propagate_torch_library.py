"""``propagate`` as PyTorch sees it: opcheck, derivatives, export, autocast, function transforms, counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gspn
from gspn.ops.unfused import compose
from propagate_cases import make_arguments
from support import CPU_IMPLS, every_pair

ALL = ",".join(gspn.DIRECTIONS)


def make_inputs(dtype: torch.dtype = torch.float64, skip: bool = True) -> tuple:
    """``x, proxy, tap_proj, lam_proj, u_proj, skip_proj, merge`` as the public function takes them."""
    (x, proxy, *projections, skip_proj), _ = make_arguments(1, 4, 3, 4, 2, 2, dtype)
    skips = torch.stack([skip_proj * (d + 1) for d in range(4)]) if skip else None
    return (x, proxy, *projections, skips, torch.linspace(0.5, 2, 4).to(dtype))


@every_pair(impl=CPU_IMPLS, layout=["contiguous", "channels_last", "sliced"], skip=[True, False])
def test_opcheck(impl, layout, skip) -> None:
    arguments, grad = make_arguments(2, 4, 3, 5, 3, 2, torch.float32, layout=layout, skip=skip)
    arguments = tuple(None if t is None else t.requires_grad_() for t in arguments)
    torch.library.opcheck(torch.ops.gspn.propagate, (*arguments, ALL, None, impl))
    # The derivative of the backward is the composition's, in other kernels.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (grad, *arguments, ALL, 2, impl)
    torch.library.opcheck(torch.ops.gspn.propagate_backward, arguments, test_utils=utilities)


@pytest.mark.slow
@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("skip", [True, False])
def test_gradcheck_and_gradgradcheck(impl, skip) -> None:
    inputs = [None if t is None else t.requires_grad_() for t in make_inputs(skip=skip)]

    def call(*tensors):
        return gspn.propagate(*tensors, segment=2, impl=impl)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_second_derivatives_where_the_proxy_is_a_function_of_x() -> None:
    x, _, *rest = make_inputs()
    weight = torch.randn(2, 4, 1, 1, dtype=torch.float64)

    def call(x, weight, impl):
        return gspn.propagate(x, torch.nn.functional.conv2d(x, weight), *rest, impl=impl).pow(2).sum()

    leaves = x.requires_grad_(), weight.requires_grad_()
    results = []
    for impl in ("cpu", "reference"):
        first = torch.autograd.grad(call(*leaves, impl), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_only_what_needs_a_gradient_gets_one(impl) -> None:
    inputs = make_inputs()
    for i, chosen in enumerate(inputs):
        tensors = [t.detach() for t in inputs]
        tensors[i] = chosen.detach().requires_grad_()
        (grad,) = torch.autograd.grad(gspn.propagate(*tensors, impl=impl).sum(), tensors[i])
        assert grad.shape == chosen.shape and grad.any()


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(impl, use_reentrant) -> None:
    inputs = [t.requires_grad_() for t in make_inputs()]

    def call(*tensors):
        return gspn.propagate(*tensors, impl=impl)

    plain = torch.autograd.grad(call(*inputs).pow(2).sum(), inputs)
    y = checkpoint(call, *inputs, use_reentrant=use_reentrant)
    y.pow(2).sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(inputs, plain, strict=True))


def test_export_with_dynamic_sizes() -> None:
    class Propagate(torch.nn.Module):
        def forward(self, x, proxy, tap_proj, lam_proj, u_proj):
            return gspn.propagate(x, proxy, tap_proj, lam_proj, u_proj, segment=3)

    frame = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    arguments, _ = make_arguments(2, 4, 5, 6, 3, 4, torch.float32)
    program = torch.export.export(Propagate(), arguments[:5], dynamic_shapes=(frame, frame, None, None, None))
    assert "gspn.propagate.default" in program.graph_module.code
    arguments, _ = make_arguments(2, 4, 9, 11, 3, 4, torch.float32)
    torch.testing.assert_close(program.module()(*arguments[:5]), Propagate()(*arguments[:5]))


def test_jit_tracing() -> None:
    inputs = make_inputs(torch.float32)
    traced = torch.jit.trace(lambda *t: gspn.propagate(*t), inputs)
    torch.testing.assert_close(traced(*inputs), gspn.propagate(*inputs))


@pytest.mark.parametrize(("autocast", "expected"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_autocast_rule(autocast, expected) -> None:
    x, proxy, *rest = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=autocast):
        y = gspn.propagate(x, proxy.bfloat16(), *rest)
        doubles = gspn.propagate(*make_inputs(torch.float64))
    assert y.dtype == expected
    assert doubles.dtype == torch.float64
    assert torch.equal(y, gspn.propagate(x.to(expected), proxy.bfloat16().to(expected), *rest))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("mapped", [(0,), (0, 1), (2,), (0, 1, 2, 3, 4, 5)])
def test_vmap(impl, mapped) -> None:
    arguments, _ = make_arguments(1, 4, 5, 6, 3, 2, torch.float64)
    in_dims = tuple(0 if i in mapped else None for i in range(6))
    tensors = [
        t if dim is None else torch.stack([t * (1 + 0.1 * k) for k in range(3)])
        for t, dim in zip(arguments, in_dims, strict=True)
    ]

    def call(*tensors):
        return torch.ops.gspn.propagate(*tensors, ALL, 4, impl)

    actual = torch.func.vmap(call, in_dims)(*tensors)
    expected = torch.stack([
        call(*(t if dim is None else t[k] for t, dim in zip(tensors, in_dims, strict=True))) for k in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_per_sample_gradients(impl) -> None:
    (x, proxy, *projections), _ = make_arguments(3, 4, 5, 6, 3, 2, torch.float64)
    projections = projections[:3]

    def loss(x, proxy, *projections):
        return gspn.propagate(x[None], proxy[None], *projections, impl=impl).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3, 4)), (0, 0, None, None, None))
    grads = each(x, proxy, *projections)
    tensors = [t.clone().requires_grad_() for t in (x, proxy, *projections)]
    expected = torch.autograd.grad(gspn.propagate(*tensors, impl=impl).pow(2).sum(), tensors)
    for i, (actual, whole) in enumerate(zip(grads, expected, strict=True)):
        torch.testing.assert_close(actual if i < 2 else actual.sum(0), whole)


def test_meta_tensors_have_shapes() -> None:
    y = gspn.propagate(*(t.to("meta") for t in make_inputs()))
    assert y.device.type == "meta"
    assert y.shape == (1, 4, 3, 4)


@pytest.mark.parametrize(("groups", "skip"), [(1, True), (4, True), (2, False)])
def test_operations_are_those_of_the_composition(groups, skip) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from gspn.ops import flop_counts as _formulas  # noqa: F401

    arguments, _ = make_arguments(2, 4, 5, 6, 3, groups, torch.float32, skip=skip)
    with FlopCounterMode(display=False) as fused:
        torch.ops.gspn.propagate(*arguments, ALL, None, "auto")
    with FlopCounterMode(display=False) as composed:
        compose(*arguments, gspn.DIRECTIONS, None, lambda *scan: torch.ops.gspn.line_scan(*scan, "auto"))
    assert fused.get_total_flops() == composed.get_total_flops()
