"""The registered operators check every argument themselves, in each of their entries, whatever Python did before."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import gspn
from propagate_cases import make_arguments
from support import make_inputs

OPS = torch.ops.gspn
X, TAPS, LAM, GRAD = make_inputs(2, 4, 5, 6, 2, torch.float32)
ARGUMENTS, _ = make_arguments(2, 4, 5, 6, 3, 2, torch.float32)
PROJECTED = dict(zip(("x", "proxy", "tap_proj", "lam_proj", "u_proj", "skip_proj"), ARGUMENTS, strict=True))
NEEDED = {"need_taps": True, "need_lam": True}

CALLS: dict[str, dict] = {
    "line_scan": dict(x=X, taps=TAPS, lam=LAM, direction="down", segment=None),
    "line_scan_backward": dict(grad=GRAD, h=X, x=X, taps=TAPS, lam=LAM, direction="down", segment=None),
    "propagate": PROJECTED | dict(directions="down,up,right,left", segment=None),
    "propagate_backward": dict(grad=GRAD) | PROJECTED | dict(directions="down,up,right,left", segment=None),
}


def _freed(t: Tensor, size: int) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(size)
    return t


def _sliced_and_shrunk(t: Tensor) -> Tensor:
    big = t.repeat_interleave(2, dim=-1)
    view = big[..., ::2]
    big.untyped_storage().resize_(t.nbytes)
    return view


def _shifted_and_shrunk(t: Tensor) -> Tensor:
    view = torch.cat([t.flatten(), t.flatten()])[1 : t.numel() + 1].view(t.shape)
    view.untyped_storage().resize_(t.nbytes)
    return view


WRONG = {
    **{f"axis {axis} one longer": (lambda t, axis=axis: _longer(t, axis)) for axis in range(5)},
    **{f"axis {axis} one shorter": (lambda t, axis=axis: _shorter(t, axis)) for axis in range(5)},
    "an axis less": lambda t: t[0],
    "an axis more": lambda t: t[None],
    "no axes": lambda t: t.sum(),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
    "complex64": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "freed": lambda t: _freed(t, 0),
    "shrunk": lambda t: _freed(t, t.nbytes - 4),
    "sliced and shrunk": _sliced_and_shrunk,
    "shifted and shrunk": _shifted_and_shrunk,
}


def _longer(t: Tensor, axis: int) -> Tensor | None:
    return torch.cat([t, t.narrow(axis, 0, 1)], axis) if axis < t.dim() else None


def _shorter(t: Tensor, axis: int) -> Tensor | None:
    return t.narrow(axis, 1, t.shape[axis] - 1) if axis < t.dim() else None


def _call(name: str, changed: dict, impl: str = "cpu", overload: bool = False):
    op = getattr(OPS, name)
    arguments = [*(CALLS[name] | changed).values(), impl]
    if name == "line_scan_backward":
        arguments += NEEDED.values()
    return (op.default if overload else op)(*arguments)


TENSORS = [(name, key) for name, call in CALLS.items() for key, value in call.items() if isinstance(value, Tensor)]


@pytest.mark.parametrize(("name", "key"), TENSORS)
def test_every_tensor_wrong_in_every_way(name, key) -> None:
    for number, (what, make) in enumerate(WRONG.items()):
        tensor = make(CALLS[name][key])
        if tensor is None:
            continue
        if key in ("taps", "tap_proj") and what in ("axis 1 one shorter",):
            continue  # one group: taps shared by all channels
        for impl in ("cpu", "reference"):
            with pytest.raises((ValueError, TypeError)) as raised:
                _call(name, {key: tensor}, impl, overload=number % 2 == 0)
            assert raised.type in (ValueError, TypeError), f"{what}: {raised.value!r}"


@pytest.mark.parametrize("name", CALLS)
def test_everything_else_wrong(name) -> None:
    key = "direction" if "line_scan" in name else "directions"
    for changed in ({"segment": 0}, {"segment": -1}, {key: ""}, {key: "north"}, {key: "down,north"}):
        with pytest.raises(ValueError, match=str(next(iter(changed)))):
            _call(name, changed)
    for directions in ("down,down", "down", "down,up,right,left,down"):
        if key == "directions":
            with pytest.raises(ValueError, match=r"each once|must be"):
                _call(name, {key: directions})
    with pytest.raises(ValueError, match="impl='cuda'"):
        _call(name, {}, "cuda")
    # Arguments of other types are PyTorch's to refuse.
    for changed in ({"segment": 1.5}, {"segment": 2**70}, {key: None}, {"x": [1.0]}):
        with pytest.raises((RuntimeError, TypeError)):
            _call(name, changed)


@pytest.mark.parametrize("missing", ["x", "lam"])
def test_a_gradient_that_is_needed_needs_its_tensors(missing) -> None:
    with pytest.raises(ValueError, match=f"need_lam=True but {missing} is None"):
        _call("line_scan_backward", {missing: None})


@pytest.mark.parametrize("name", CALLS)
def test_shapes_without_data_are_checked_too(name) -> None:
    tensors = {key: t.to("meta") for key, t in CALLS[name].items() if isinstance(t, Tensor)}
    _call(name, tensors)
    for key, tensor in tensors.items():
        for axis in range(tensor.dim()):
            if key in ("taps", "tap_proj") and axis == 1:
                continue
            with pytest.raises((ValueError, TypeError)):
                _call(name, tensors | {key: _longer(tensor, axis)})
    with pytest.raises(ValueError, match="segment=0"):
        _call(name, tensors | {"segment": 0})


@pytest.mark.parametrize("name", CALLS)
def test_under_vmap(name) -> None:
    keys = [key for key, value in CALLS[name].items() if isinstance(value, Tensor)]
    for wrong in keys:
        tensors = [
            torch.stack([t, t]) if key != wrong else torch.stack([t, t])[..., :-1]
            for key in keys if (t := CALLS[name][key]) is not None
        ]  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            torch.vmap(lambda *ts: _call(name, dict(zip(keys, ts, strict=True))))(*tensors)


class _Scan(torch.nn.Module):
    def forward(self, x: Tensor, taps: Tensor, lam: Tensor) -> Tensor:
        return gspn.line_scan(x, taps, lam, direction="left", segment=2)


class _Propagate(torch.nn.Module):
    def forward(self, x: Tensor, proxy: Tensor, taps: Tensor, lam: Tensor, u: Tensor) -> Tensor:
        return gspn.propagate(x, proxy, taps, lam, u)


@pytest.mark.parametrize("kind", ["jit", "export"])
@pytest.mark.parametrize("case", ["scan", "propagate"])
def test_traced_modules_at_other_sizes(case, kind) -> None:
    module = _Scan() if case == "scan" else _Propagate()

    def inputs(height: int, width: int) -> tuple[Tensor, ...]:
        if case == "scan":
            return make_inputs(2, 4, height, width, 2, torch.float32)[:3]
        return make_arguments(2, 4, height, width, 3, 2, torch.float32)[0][:5]  # type: ignore[return-value]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        if kind == "jit":
            traced = torch.jit.trace(module, inputs(5, 6))
        else:
            h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
            frame = {2: h, 3: w}
            shapes = (frame, {3: h, 4: w}, frame) if case == "scan" else (frame, frame, None, None, None)
            traced = torch.export.export(module, inputs(5, 6), dynamic_shapes=shapes).module()
    for size in [(5, 6), (9, 3), (2, 40)]:
        torch.testing.assert_close(traced(*inputs(*size)), module(*inputs(*size)))
    small, large = inputs(3, 4), inputs(9, 8)
    with pytest.raises(
        (RuntimeError, AssertionError, ValueError), match=r"does not fit|differs|must be|[Gg]uard|Expected"
    ):
        traced(large[0], *small[1:])


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_the_specification_takes_8_bit_floats(dtype) -> None:
    x, taps, lam = (t.to(dtype).requires_grad_() for t in (X, TAPS, LAM))
    h = gspn.line_scan(x, taps, lam, direction="up", impl="reference")
    expected = gspn.line_scan(x.float(), taps.float(), lam.float(), direction="up", impl="reference")
    assert torch.equal(h.float(), expected.to(dtype).float())
    proxy, projections = PROJECTED["proxy"].to(dtype).requires_grad_(), ARGUMENTS[2:5]
    y = gspn.propagate(x, proxy, *projections, impl="reference")
    exact = gspn.propagate(x.float(), proxy.float(), *projections, impl="reference")
    assert torch.equal(y.float(), exact.to(dtype).float())
    assert torch.autograd.grad(y, proxy, y)[0].dtype == dtype
    raw = OPS.propagate_backward(y.detach(), x, proxy, *projections, None, "down,up,right,left", None, "reference")
    assert raw[0].dtype == dtype
    with pytest.raises(NotImplementedError, match="float8"):
        gspn.line_scan(x, taps, direction="up", impl="cpu")


@pytest.mark.parametrize(
    "dtype", [torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, torch.int8, torch.bool, torch.complex64]
)
def test_dtypes_without_scans(dtype) -> None:
    x, taps = torch.empty(1, 2, 3, 4, dtype=dtype), torch.empty(1, 1, 3, 3, 4, dtype=dtype)
    for impl in ("auto", "cpu", "reference"):
        with pytest.raises(TypeError, match=rf"x\.dtype is {dtype}; a scan needs floating point.*\.float\(\)"):
            gspn.line_scan(x, taps, direction="down", impl=impl)
        with pytest.raises(TypeError, match=rf"x\.dtype is {dtype}"):
            gspn.propagate(x, x, torch.zeros(4, 1, 3, 2), *[torch.zeros(4, 2, 2)] * 2, impl=impl)
