"""Derivatives of higher order and in forward mode, through every transform of PyTorch that asks for them.

Each is compared with the same transform of plain PyTorch: the specification's loop, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gspn
from gspn.ops import reference
from gspn.ops.unfused import compose
from propagate_cases import make_arguments
from support import CPU_IMPLS, every_pair, make_inputs, run_python

Function = Callable[..., Tensor]


def _dual(f: Function, primals: tuple, tangents: tuple) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, primals, tangents))).tangent


def _dual_then_backward(f: Function, primals: tuple, tangents: tuple) -> Any:
    leaves = [t.clone().requires_grad_() for t in primals]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, leaves, tangents))).tangent
        return torch.autograd.grad(tangent.sum(), leaves)


def _backward_of_a_dual_gradient(f: Function, primals: tuple, tangents: tuple) -> Any:
    leaves = [t.clone().requires_grad_() for t in primals]
    y = f(*leaves)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, leaves, forward_ad.make_dual(y.detach(), y.detach().sin()))
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def _checkpointed(f: Function, primals: tuple, tangents: tuple) -> Any:
    leaves = [t.clone().requires_grad_() for t in primals]
    try:
        with forward_ad.dual_level():
            one = forward_ad.make_dual(torch.ones(1, requires_grad=True), torch.ones(1))
            checkpoint(torch.sin, one, use_reentrant=False)
    except NotImplementedError:
        pytest.skip("torch.utils.checkpoint of this version of PyTorch has no forward mode, of no operator")

    def saved(*inputs: Tensor) -> Tensor:
        return checkpoint(f, *inputs, use_reentrant=False)

    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(saved(*map(forward_ad.make_dual, leaves, tangents)))
        return [y.tangent, *torch.autograd.grad(y.primal.sum(), leaves)]


def _gradient_inside_a_checkpoint(f: Function, primals: tuple, tangents: tuple) -> Any:
    leaves = [t.clone().requires_grad_() for t in primals]

    def penalty(*inputs: Tensor) -> Tensor:
        first = torch.autograd.grad(f(*inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.stack([g.pow(2).sum() for g in first]).sum()

    return torch.autograd.grad(checkpoint(penalty, *leaves, use_reentrant=False), leaves)


def _loss(f: Function) -> Function:
    return lambda *inputs: f(*inputs).pow(3).sum()


def _all(count: int) -> tuple[int, ...]:
    return tuple(range(count))


TRANSFORMS: dict[str, Callable[[Function, tuple, tuple], Any]] = {
    "dual numbers": _dual,
    "backward of a dual number": _dual_then_backward,
    "dual number as a gradient": _backward_of_a_dual_gradient,
    "checkpoint of a dual number": _checkpointed,
    "gradient inside a checkpoint": _gradient_inside_a_checkpoint,
    "jvp": jvp,
    "linearize": lambda f, p, t: linearize(f, *p)[1](*t),
    "jacfwd": lambda f, p, t: jacfwd(f, _all(len(p)))(*p),
    "jacrev": lambda f, p, t: jacrev(f, _all(len(p)))(*p),
    "hessian": lambda f, p, t: hessian(_loss(f))(*p),
    "jacrev of jacrev": lambda f, p, t: jacrev(jacrev(_loss(f), 1), 0)(*p),
    "jacfwd of jacfwd": lambda f, p, t: jacfwd(jacfwd(_loss(f), 1), 0)(*p),
    "grad of grad": lambda f, p, t: grad(lambda *q: grad(_loss(f), 1)(*q).sin().sum(), _all(len(p)))(*p),
    "grad of jvp": lambda f, p, t: grad(lambda *q: jvp(f, q, t)[1].sin().sum(), _all(len(p)))(*p),
    "jvp of grad": lambda f, p, t: jvp(grad(_loss(f), _all(len(p))), p, t),
    "jvp of jvp": lambda f, p, t: jvp(lambda *q: jvp(f, q, t)[1], p, t),
    "jvp of vjp": lambda f, p, t: jvp(lambda *q: vjp(f, *q)[1](p[0])[1], p, t),
    "grad of grad of grad": lambda f, p, t: grad(
        lambda a: grad(lambda b: grad(lambda c: _loss(f)(c, *p[1:]))(b).sin().sum())(a).sin().sum()
    )(p[0]),
    "vmap of jvp": lambda f, p, t: vmap(lambda *t: jvp(f, p, t)[1])(*(torch.stack([a, a.cos()]) for a in t)),
    "jvp of vmap": lambda f, p, t: jvp(
        lambda *q: vmap(f)(*(torch.stack([a, a.cos()]) for a in q)), p, t
    ),
    "vmap of grad of grad": lambda f, p, t: vmap(
        lambda *q: grad(lambda a: grad(_loss(f))(a, *q[1:]).sin().sum())(q[0])
    )(*(torch.stack([a, a.cos()]) for a in p)),
}  # fmt: skip


def _line_scan(impl: str | None) -> tuple[Function, tuple]:
    x, taps, lam, _ = make_inputs(1, 2, 3, 2, 1, torch.float64)
    if impl is None:
        return lambda x, taps, lam: reference.line_scan(x, taps, lam, "left", 2), (x, taps, lam)
    return lambda x, taps, lam: gspn.line_scan(x, taps, lam, direction="left", segment=2, impl=impl), (x, taps, lam)


def _line_scan_without_lam(impl: str | None) -> tuple[Function, tuple]:
    f, (x, taps, _) = _line_scan(impl)
    return lambda x, taps: f(x, taps, None), (x, taps)


def _propagate(impl: str | None) -> tuple[Function, tuple]:
    (*tensors, skip), _ = make_arguments(1, 2, 2, 3, 1, 1, torch.float64, directions=2)
    skips = torch.stack([skip, skip.sin()])
    if impl is None:
        return lambda *t: compose(*t[:5], t[5].sum(0), ("up", "right"), None, reference.line_scan), (*tensors, skips)
    return lambda *t: gspn.propagate(*t, directions=("up", "right"), impl=impl), (*tensors, skips)


def _propagate_without_skip(impl: str | None) -> tuple[Function, tuple]:
    tensors = _propagate(impl)[1][:5]
    if impl is None:
        return lambda *t: compose(*t, None, ("up", "right"), None, reference.line_scan), tensors
    return lambda *t: gspn.propagate(*t, directions=("up", "right"), impl=impl), tensors


@every_pair(
    transform=list(TRANSFORMS),
    case=[_line_scan, _line_scan_without_lam, _propagate, _propagate_without_skip],
    impl=CPU_IMPLS,
)
def test_every_transform_of_every_operator(transform, case, impl) -> None:
    if transform == "backward of a dual number" and "propagate" in case.__name__:
        pytest.skip("PyTorch raises: softmax has no derivative of a tangent here")
    results = []
    for name in (impl, None):
        f, primals = case(name)
        results.append(TRANSFORMS[transform](f, primals, tuple(t.sin() for t in primals)))
    actual, expected = (torch.utils._pytree.tree_leaves(result) for result in results)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_differentiate(shape, impl) -> None:
    batch, channels, height, width = shape
    (*tensors, skip), _ = make_arguments(batch, channels, height, width, 2, 1, torch.float64)
    x, taps, lam, _ = make_inputs(2, 2, 3, 2, 1, torch.float64)
    scanned = x.new_zeros(shape), taps.new_zeros(batch, 1, 3, height, width), lam.new_zeros(shape)
    calls: list[tuple[Function, tuple]] = [
        (lambda *t: gspn.line_scan(*t, direction="up", impl=impl), scanned),
        (lambda *t: gspn.propagate(*t, impl=impl), (*tensors, torch.stack([skip] * 4))),
    ]
    for f, primals in calls:
        assert jvp(f, primals, primals)[1].shape == shape
        for t, first in zip(primals, grad(_loss(f), _all(len(primals)))(*primals), strict=True):
            assert first.shape == t.shape
            assert not first.any()
        second = grad(lambda t, f=f, rest=primals[1:]: grad(_loss(f))(t, *rest).sum())(primals[0])
        assert second.shape == shape


@pytest.mark.parametrize("case", [_line_scan, _propagate])
def test_vmap_over_no_entries(case) -> None:
    f, primals = case("cpu")  # PyTorch's convolution, in the specification, refuses
    for mapped in ([True] * len(primals), [i == 0 for i in range(len(primals))], [i > 1 for i in range(len(primals))]):
        inputs = [t.new_empty(*t.shape[:1], 0, *t.shape[1:]) if m else t for m, t in zip(mapped, primals, strict=True)]
        in_dims = tuple(1 if m else None for m in mapped)
        y = vmap(f, in_dims)(*inputs)
        assert y.shape == (0, *f(*primals).shape)
        dx, dtaps = vmap(grad(_loss(f), (0, 1)), in_dims)(*inputs)
        assert dx.shape == (0, *primals[0].shape)
        assert dtaps.shape == (0, *primals[1].shape)


@pytest.mark.parametrize(
    ("make", "impl"), [("module", "reference"), ("mixer", "cpu"), ("official", "reference"), ("model", "cpu")]
)
def test_modules_and_models(make, impl) -> None:
    from gspn.models import GSPN
    from gspn.nn import GSPN2d, GSPNMixer

    torch.manual_seed(0)
    module = {
        "module": lambda: GSPN2d(2, proxy_dim=2, groups=1, segment=2, impl=impl),
        "official": lambda: GSPN2d(2, proxy_dim=2, alignment="official", impl=impl),
        "mixer": lambda: GSPNMixer(2, proxy_dim=2, groups=1, impl=impl),
        "model": lambda: GSPN(
            num_classes=3, in_chans=2, dims=(4, 8), depths=(1, 1), stem_stride=2, scan=dict(proxy_dim=2, impl=impl)
        ),
    }[make]().double().eval().requires_grad_(False)  # fmt: skip
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    v = torch.randn_like(x)

    def f(x: Tensor) -> Tensor:
        return module(x).sin()

    _, tangent = jvp(f, (x,), (v,))
    step = 1e-5
    torch.testing.assert_close(tangent, (f(x + step * v) - f(x - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(_dual(f, (x,), (v,)), tangent)
    torch.testing.assert_close(linearize(f, x)[1](v), tangent)

    def slope(x: Tensor) -> Tensor:
        return grad(lambda x: f(x).square().sum())(x)

    _, product = jvp(slope, (x,), (v,))  # of the Hessian and v, forward over reverse
    _, pull = vjp(slope, x)  # and reverse over reverse
    torch.testing.assert_close(product, pull(v)[0])
    torch.testing.assert_close(product, (slope(x + step * v) - slope(x - step * v)) / (2 * step), rtol=1e-5, atol=1e-6)


def test_the_registered_operators_raise_rather_than_drop_a_tangent() -> None:
    x, taps, lam, _ = make_inputs(1, 2, 3, 2, 1, torch.float64)
    (*tensors, skip), _ = make_arguments(1, 2, 2, 3, 1, 1, torch.float64, directions=1)
    calls = {
        "line_scan": lambda x: torch.ops.gspn.line_scan(x, taps, lam, "down", None, "auto"),
        "line_scan_backward": lambda x: torch.ops.gspn.line_scan_backward(
            x, x, x, taps, lam, "down", None, "auto", True, True
        )[0],
        "propagate": lambda y: torch.ops.gspn.propagate(y, *tensors[1:], skip, "down", None, "auto"),
        "propagate_backward": lambda y: torch.ops.gspn.propagate_backward(
            y, y, *tensors[1:], skip, "down", None, "auto"
        )[0],
        "line_scan, traced": torch.jit.trace(lambda x: gspn.line_scan(x, taps, lam, direction="down"), x),
    }
    for name, call in calls.items():
        primal = tensors[0] if "propagate" in name else x
        for transform in (jvp, _dual, lambda f, p, t: grad(lambda x: f(x).sum())(*p)):
            with pytest.raises((NotImplementedError, RuntimeError), match=r"call gspn\.(line_scan|propagate)"):
                transform(call, (primal,), (primal.sin(),))
        with forward_ad.dual_level():  # nothing to drop
            assert torch.equal(call(primal), call(primal.clone()))


@pytest.mark.slow
def test_compiled_derivatives_are_right_or_raise() -> None:
    run_python("""
import torch, gspn
from torch.autograd import forward_ad
from torch.func import grad, jvp

x, taps, v = torch.randn(1, 2, 3, 4), torch.rand(1, 1, 3, 3, 4) / 3, torch.randn(1, 2, 3, 4)
p, t, g = torch.randn(1, 2, 3, 4), torch.randn(4, 1, 3, 2), torch.randn(4, 2, 2)

def dual(f):
    def call(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    return call

for f in (lambda x: gspn.line_scan(x, taps, direction="down"), lambda x: gspn.propagate(x, p, t, g, g)):
    compiled = torch.compile(f, backend="aot_eager")
    for transform in (lambda f: lambda x: jvp(f, (x,), (v,))[1], lambda f: grad(lambda x: f(x).sum()), dual):
        expected = transform(f)(x)
        for call in (
            torch.compile(transform(f), backend="aot_eager"),
            torch.compile(transform(f), backend="aot_eager", fullgraph=True),
            transform(compiled),
        ):
            try:
                actual = call(x)
            except Exception as error:
                print(type(error).__name__)
            else:
                torch.testing.assert_close(actual, expected)
                print("right")
            torch.compiler.reset()
""")
