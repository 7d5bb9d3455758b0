"""``GSPN2d`` against its formula pixel by pixel, and what a module of PyTorch promises besides."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import gspn
from gspn.nn import GSPN2d
from support import SHAPES, assert_as_exact_as_pytorch, laid_out

# Where the previous line lies: the three neighbours of pixel (i, j), for taps 0, 1, 2.
NEIGHBOURS = {
    "down": [(-1, -1), (-1, 0), (-1, 1)],
    "up": [(1, -1), (1, 0), (1, 1)],
    "right": [(-1, -1), (0, -1), (1, -1)],
    "left": [(-1, 1), (0, 1), (1, 1)],
}

OPTIONS = [
    dict(),
    dict(groups=1),
    dict(groups=2, proxy_dim=1),
    dict(proxy_dim=16, skip=False),
    dict(proxy_bias=True, groups=2),
    dict(segment=1),
    dict(segment=2, groups=3),
    dict(segment=4, skip=False),
    dict(segment=1000),
    dict(directions=("left",)),
    dict(directions=("up", "down"), segment=3, groups=1, skip=False),
    dict(reference_lines=3),
    dict(reference_lines=16, segment=5, directions=("right", "up")),
]


def pixel_by_pixel(module: GSPN2d, x: Tensor) -> Tensor:
    """The formula of :class:`GSPN2d` in float64, a pixel at a time."""
    x = x.detach().double()
    weights = {name: value.detach().double() for name, value in module.named_parameters()}
    channels, height, width = x.shape[1:]
    proxy = torch.einsum("sc,bchw->bshw", weights["proxy.weight"][:, :, 0, 0], x)
    if module.proxy.bias is not None:
        proxy = proxy + weights["proxy.bias"][:, None, None]

    def maps(name: str, d: int) -> Tensor:
        return torch.einsum("cs,bshw->bchw", weights[name][d], proxy)

    y = torch.zeros_like(x)
    for d, direction in enumerate(module.directions):
        gates = torch.einsum("gks,bshw->bgkhw", weights["tap_proj"][d], proxy).sigmoid()
        gates = gates.repeat_interleave(channels // module.groups, dim=1)
        source = maps("lam_proj", d) * x
        rows, columns = list(range(height)), list(range(width))
        if direction in ("down", "up"):
            lines = [[(i, j) for j in columns] for i in (rows if direction == "down" else rows[::-1])]
        else:
            lines = [[(i, j) for i in rows] for j in (columns if direction == "right" else columns[::-1])]
        if module.reference_lines is not None:
            source *= module.reference_lines / min(len(lines), module.segment or len(lines))
        h = torch.zeros_like(x)
        for step, line in enumerate(lines):
            restart = step % (module.segment or len(lines)) == 0
            for i, j in line:
                h[:, :, i, j] = source[:, :, i, j]
                if restart:
                    continue
                exist = [
                    (k, i + di, j + dj)
                    for k, (di, dj) in enumerate(NEIGHBOURS[direction])
                    if 0 <= i + di < height and 0 <= j + dj < width
                ]
                total = sum(gates[:, :, k, i, j] for k, *_ in exist)
                for k, a, b in exist:
                    h[:, :, i, j] += gates[:, :, k, i, j] / total * h[:, :, a, b]
        out = maps("u_proj", d) * h
        if module.skip_proj is not None:
            out = out + maps("skip_proj", d) * x
        y = y + weights["merge"][d] * out
    return y


def make(channels: int = 6, *, seed: int = 0, **options) -> GSPN2d:
    """A module whose merge is not the plain sum that it starts with."""
    torch.manual_seed(seed)
    module = GSPN2d(channels, **{"proxy_dim": 3, **options})
    with torch.no_grad():
        module.merge.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("height", "width"), [(5, 7), (6, 4)])
def test_it_is_the_formula(options, height, width) -> None:
    module = make(dtype=torch.float64, **options)
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    torch.testing.assert_close(module(x), pixel_by_pixel(module, x))


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("groups", [None, 1])
def test_any_size(height, width, groups) -> None:
    module = make(dtype=torch.float64, groups=groups, segment=None if groups else 5)
    x = torch.randn(1, 6, height, width, dtype=torch.float64)
    torch.testing.assert_close(module(x), pixel_by_pixel(module, x))


def test_an_unequal_sum_of_directions_is_their_sum() -> None:
    whole = make(dtype=torch.float64)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    total = torch.zeros_like(x)
    for d, direction in enumerate(whole.directions):
        part = GSPN2d(6, proxy_dim=3, directions=(direction,), dtype=torch.float64)
        state = {
            name: value if name == "proxy.weight" else value[d : d + 1] for name, value in whole.state_dict().items()
        }
        part.load_state_dict(state)
        total += part(x)
    torch.testing.assert_close(whole(x), total)


@pytest.mark.parametrize("alignment", ["image", "official"])
@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (0, 6, 1, 1)])
def test_empty_batch(alignment, shape) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = make(alignment=alignment)(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("alignment", ["image", "official"])
@pytest.mark.parametrize("options", [dict(), dict(groups=1), dict(skip=False, segment=2)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_layouts(alignment, options, layout) -> None:
    module = make(dtype=torch.float64, alignment=alignment, **options)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    there = laid_out(x, layout)
    y = module(there)
    torch.testing.assert_close(y, module(x))
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_precision(dtype, layout) -> None:
    module = make(16, dtype=dtype)
    x = laid_out(torch.randn(2, 16, 17, 19).to(dtype), layout)
    plain = copy.deepcopy(module)
    plain.impl = "reference"
    exact = pixel_by_pixel(module, x)
    assert_as_exact_as_pytorch(module(x), plain(x), exact, exact.abs())


@pytest.mark.parametrize("skip", [True, False])
def test_autocast_is_no_worse_than_computing_in_bfloat16(skip) -> None:
    module = make(16, skip=skip)
    x = torch.randn(2, 16, 17, 19)
    exact = pixel_by_pixel(module, x)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    low = copy.deepcopy(module).bfloat16()(x.detach().bfloat16())
    assert (y.double() - exact).abs().max() <= 2 * (low.double() - exact).abs().max()
    y.float().square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("alignment", ["image", "official"])
@pytest.mark.parametrize(
    "options", [dict(), dict(groups=1, segment=2), dict(skip=False), dict(reference_lines=2)], ids=str
)
def test_gradcheck(alignment, options) -> None:
    module = make(2, proxy_dim=2, dtype=torch.float64, alignment=alignment, **options)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values))
    assert torch.autograd.gradgradcheck(forward, (x, *values), fast_mode=True)


@pytest.mark.parametrize("alignment", ["image", "official"])
@pytest.mark.parametrize("skip", [True, False])
def test_every_parameter_gets_a_gradient(alignment, skip) -> None:
    module = make(alignment=alignment, skip=skip)
    module(torch.randn(2, 6, 5, 5)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(dim=-1).all(), name


FLIP_WIDTH = {"down": "down", "up": "up", "right": "left", "left": "right"}
FLIP_HEIGHT = {"down": "up", "up": "down", "right": "right", "left": "left"}
TRANSPOSE = {"down": "right", "right": "down", "up": "left", "left": "up"}


@pytest.mark.parametrize("segment", [None, 3])
@pytest.mark.parametrize(
    ("move", "exchange", "across"),
    [
        (lambda t: t.flip(-1), FLIP_WIDTH, ("down", "up")),
        (lambda t: t.flip(-2), FLIP_HEIGHT, ("right", "left")),
        (lambda t: t.mT, TRANSPOSE, ()),
    ],
    ids=["flip width", "flip height", "transpose"],
)
def test_moving_the_image_exchanges_the_directions(move, exchange, across, segment) -> None:
    module = make(dtype=torch.float64, segment=segment)
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)
    state = {}
    for name, value in module.state_dict().items():
        if name != "proxy.weight":
            value = torch.stack([value[gspn.DIRECTIONS.index(exchange[d])] for d in gspn.DIRECTIONS])
        state[name] = value
    for d, direction in enumerate(gspn.DIRECTIONS):
        if direction in across:  # a flip along the lines exchanges the outer neighbours
            state["tap_proj"][d] = state["tap_proj"][d].flip(1)
    moved = make(dtype=torch.float64, segment=segment)
    moved.load_state_dict(state)
    torch.testing.assert_close(move(moved(move(x))), module(x))


@pytest.mark.parametrize("alignment", ["image", "official"])
def test_an_image_does_not_depend_on_its_batch(alignment) -> None:
    module = make(alignment=alignment, dtype=torch.float64)
    x = torch.randn(3, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
    x[0] = float("nan")
    assert module(x)[1:].isfinite().all()


def reached(module: GSPN2d, height: int, width: int) -> Tensor:
    """``[H W, H W]``: whether the first pixel's output depends on the second pixel's input."""
    x = torch.randn(1, module.dim, height, width, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x).sum(1).flatten(), x)  # [H W, 1, C, H, W]
    return jacobian.abs().amax(dim=(1, 2)).flatten(1) > 0


def test_each_pixel_sees_every_other() -> None:
    assert reached(make(dtype=torch.float64), 5, 6).all()
    assert reached(make(dtype=torch.float64, groups=1), 6, 5).all()


def test_segments_bound_the_reach() -> None:
    sees = reached(make(dtype=torch.float64, segment=2), 6, 6).view(6, 6, 6, 6)
    for i, j, a, b in itertools.product(range(6), repeat=4):
        # Lines of two, counted from either side of an even frame, are the same pairs: a pixel sees itself, its three
        # neighbours on the other row of its pair of rows, and three on the other column.
        rows = i // 2 == a // 2 and i != a and abs(j - b) <= 1
        columns = j // 2 == b // 2 and j != b and abs(i - a) <= 1
        cone = (i, j) == (a, b) or rows or columns
        assert bool(sees[i, j, a, b]) == cone, (i, j, a, b)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("contiguous", {"segment": 4}), ("channels_last", {"segment": 4}),
        ("contiguous", {"reference_lines": 7}), ("channels_last", {"reference_lines": 7, "segment": 8}),
    ],
)  # fmt: skip
def test_compile_once_for_all_sizes_forward_and_backward(layout, options) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = make(4, **options)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for height, width in [(6, 7), (9, 5), (20, 16)]:  # on both sides of the segment
        x = laid_out(torch.randn(2, 4, height, width), layout).requires_grad_()
        y, expected = compiled(x), module(x)
        torch.testing.assert_close(y, expected)
        inputs = (x, *module.parameters())
        actual = torch.autograd.grad(y.square().mean(), inputs)
        for one, other in zip(actual, torch.autograd.grad(expected.square().mean(), inputs), strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


def test_export_with_dynamic_sizes() -> None:
    module = make(4).eval()
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(module, (torch.randn(2, 4, 5, 6),), dynamic_shapes=({2: height, 3: width},))
    x = torch.randn(2, 4, 9, 11)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("reference_lines", [None, 7])
@pytest.mark.parametrize("alignment", ["image", "official"])
def test_torch_fx_traces_it(alignment, reference_lines) -> None:
    module = make(4, alignment=alignment, reference_lines=reference_lines)
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    for size in (6, 9):
        x = torch.randn(2, 4, size, size)
        assert torch.equal(traced(x), module(x))


def test_state_dict_round_trip() -> None:
    one, other = make(seed=0, groups=2), make(seed=1, groups=2)
    x = torch.randn(1, 6, 5, 4)
    assert not torch.equal(one(x), other(x))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(one(x), other(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    assert {name: tuple(value.shape) for name, value in one.state_dict().items()} == {
        "proxy.weight": (3, 6, 1, 1),
        "tap_proj": (4, 2, 3, 3),
        "lam_proj": (4, 6, 3),
        "u_proj": (4, 6, 3),
        "skip_proj": (4, 6, 3),
        "merge": (4,),
    }
    assert "skip_proj" not in make(skip=False).state_dict()


def test_device_and_dtype() -> None:
    module = GSPN2d(6, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    y = module(torch.empty(2, 6, 5, 4, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 6, 5, 4), torch.bfloat16, "meta")
    real = module.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.randn(2, 6, 5, 4).bfloat16()).isfinite().all()


def test_reset_parameters() -> None:
    module = GSPN2d(64, proxy_dim=4)
    torch.manual_seed(3)
    module.reset_parameters()
    first = copy.deepcopy(module.state_dict())
    assert torch.equal(module.merge, torch.ones(4))
    for name in ("tap_proj", "lam_proj", "u_proj", "skip_proj"):
        assert 0.45 < first[name].abs().max() <= 0.5, name  # 1 / sqrt(S), as a 1x1 convolution of S channels
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(torch.equal(first[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(dim=0), ValueError, r"dim=0"),
        (dict(proxy_dim=0), ValueError, r"proxy_dim=0"),
        (dict(groups=4), ValueError, r"groups=4 does not divide dim=6; use 1 .*6 or None"),
        (dict(groups=0), ValueError, r"groups=0"),
        (dict(segment=0), ValueError, r"segment=0 is below 1.*None"),
        (dict(segment=2.5), TypeError, r"segment=2\.5 is a float.*None"),
        (dict(segment="2"), TypeError, r"segment='2' is a str"),
        (dict(reference_lines=0), ValueError, r"reference_lines=0 is below 1.*None for lam as it is"),
        (dict(reference_lines=True), TypeError, r"reference_lines=True is a bool.*None"),
        (dict(reference_lines=16.0), TypeError, r"reference_lines=16\.0 is a float"),
        (dict(reference_lines=2**63), ValueError, r"reference_lines=9223372036854775808 is more than"),
        (dict(directions=()), ValueError, r"directions=\(\).*'down', 'up', 'right', 'left'"),
        (dict(directions=("down", "down")), ValueError, r"each once"),
        (dict(directions=("north",)), ValueError, r"directions=\('north',\)"),
        (dict(directions="down"), ValueError, r"directions='down'.*'down', 'up'"),
        (dict(alignment="paper"), ValueError, r"alignment='paper'.*'image', 'official'"),
        (dict(alignment="official", directions=("down", "up")), ValueError, r"all four directions"),
        (dict(impl="cuda"), ValueError, r"impl='cuda'.*auto, triton, cpu, reference"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, error, message) -> None:
    with pytest.raises(error, match=message):
        GSPN2d(**{"dim": 6, **options})


def test_official_alignment_needs_a_square() -> None:
    with pytest.raises(ValueError, match=r"\[1, 6, 4, 5\].*H == W.*square inputs, or alignment='image'"):
        make(alignment="official")(torch.randn(1, 6, 4, 5))


def test_it_prints_what_distinguishes_it() -> None:
    assert GSPN2d(6).extra_repr() == "6, proxy_dim=8"
    text = GSPN2d(6, groups=1, segment=2, skip=False, directions=("up",)).extra_repr()
    assert text == "6, proxy_dim=8, groups=1, segment=2, skip=False, directions=('up',)"
    text = GSPN2d(6, reference_lines=14, alignment="official").extra_repr()
    assert text == "6, proxy_dim=8, reference_lines=14, alignment='official'"


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(6, 4, 5), ValueError, r"x\.shape=.*\[6, 4, 5\].*\[B, 6, H, W\]"),
        (torch.zeros(1, 1, 6, 4, 5), ValueError, r"takes \[B, 6, H, W\]"),
        (torch.zeros(1, 5, 4, 5), ValueError, r"\[1, 5, 4, 5\].*takes \[B, 6, H, W\]"),
        (torch.zeros(1, 6, 4, 5, dtype=torch.int64), TypeError, r"x\.dtype is torch\.int64.*\.float\(\)"),
        (torch.zeros(1, 6, 4, 5, dtype=torch.complex64), TypeError, r"x\.dtype is torch\.complex64"),
        (torch.zeros(1, 6, 4, 5, dtype=torch.float64), RuntimeError, "type"),
        (torch.zeros(1, 6, 4, 5, dtype=torch.float8_e5m2), (RuntimeError, NotImplementedError), "type|Float8"),
    ],
    ids=lambda value: str(tuple(value.shape)) + str(value.dtype) if isinstance(value, Tensor) else "",
)
@pytest.mark.parametrize("alignment", ["image", "official"])
def test_inputs_that_do_not_fit(x, error, message, alignment) -> None:
    with pytest.raises(error, match=message):
        GSPN2d(6, alignment=alignment)(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [dict(segment=3), dict(reference_lines=6), dict(reference_lines=6, segment=4)])
def test_a_traced_module_runs_at_other_sizes(options) -> None:
    module = make(**options)
    traced = torch.jit.trace(module, torch.randn(2, 6, 4, 5))
    for shape in [(2, 6, 4, 5), (1, 6, 9, 3), (3, 6, 1, 7)]:
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), module(x))
    with pytest.raises(RuntimeError, match="channels"):
        traced(torch.randn(2, 5, 4, 5))
