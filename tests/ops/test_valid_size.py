"""Images of several sizes in one batch: each is computed as if it were alone, and its padding has no influence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from gspn.ops.unfused import project_taps
from propagate_cases import ALL, NAMES, make_arguments
from support import CPU_IMPLS, DTYPES, every_pair, make_inputs, threads
from valid_size_cases import Results, alone, assert_equals_alone, poisoned, random_sizes, sizes_as


@pytest.fixture
def fresh_memory_is_nan(monkeypatch) -> None:
    """An element that no kernel writes shows."""
    allocate = torch.empty_like

    def poisoned_memory(*args, **kwargs):
        return allocate(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned_memory)


SIZES = random_sizes(40, 9, 11)
FEW = random_sizes(5, 5, 6)


def scan(
    x: Tensor, taps: Tensor, lam: Tensor | None, grad: Tensor, h: Tensor | None, *, how: tuple, valid_size=None
) -> Results:
    """The state and every gradient at ``h``, or at that state."""
    state = torch.ops.gspn.line_scan(x, taps, lam, *how, valid_size)
    dx, dtaps, dlam = torch.ops.gspn.line_scan_backward(
        grad, state if h is None else h, None if lam is None else x, taps, lam, *how, True, lam is not None, valid_size
    )
    results = {"h": state, "dx": dx, "dtaps": dtaps}
    return results if lam is None else results | {"dlam": dlam}


def propagated(x: Tensor, proxy: Tensor, grad: Tensor, *, projections: tuple, how: tuple, valid_size=None) -> Results:
    """The result and every gradient."""
    y = torch.ops.gspn.propagate(x, proxy, *projections, *how, valid_size)
    grads = torch.ops.gspn.propagate_backward(grad, x, proxy, *projections, *how, valid_size)
    return {"y": y} | dict(zip(NAMES[: 5 + (projections[-1] is not None)], grads, strict=False))


@pytest.mark.usefixtures("fresh_memory_is_nan")
@every_pair(
    impl=CPU_IMPLS, direction=gspn.DIRECTIONS, segment=[None, 1, 4], dtype=DTYPES, groups=[1, 2, 4],
    layout=["contiguous", "channels_last", "transposed", "sliced"], gated=[True, False],
    padding=[float("nan"), float("inf")],
)  # fmt: skip
def test_a_line_scan_of_40_sizes_is_each_image_alone(
    impl, direction, segment, dtype, groups, layout, gated, padding
) -> None:  # fmt: skip
    x, taps, lam, grad = make_inputs(40, 4, 9, 11, groups, dtype, layout=layout)
    maps = [x, taps, lam if gated else None, grad, None]
    maps[4] = scan(*maps, how=(direction, segment, "reference"))["h"]
    sizes = torch.tensor(SIZES)
    filled = poisoned(maps, SIZES, padding)
    actual = scan(*filled, how=(direction, segment, impl), valid_size=sizes)
    plain = alone(lambda *own: scan(*own, how=(direction, segment, impl)), maps, SIZES)
    doubles = [None if one is None else one.double() for one in maps]
    exact = alone(lambda *own: scan(*own, how=(direction, segment, "reference")), doubles, SIZES)
    assert_equals_alone(actual, plain, exact)
    if impl == "reference":
        assert all(torch.equal(actual[name], plain[name]) for name in actual)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@every_pair(direction=gspn.DIRECTIONS, segment=[None, 3], layout=["contiguous", "channels_last"], groups=[1, 40])
def test_a_line_scan_on_the_cpu_gives_the_same_bits_as_alone(direction, segment, layout, groups) -> None:
    # Blocks of channels are added up in an order that depends on neither the batch nor the threads.
    sizes = random_sizes(9, 33, 20)
    maps = [*make_inputs(9, 40, 33, 20, groups, torch.float32, layout=layout), None]
    filled = poisoned(maps, sizes, float("nan"))
    how = (direction, segment, "cpu")
    for isa in instruction_sets():
        with instruction_set(isa):
            expected = alone(lambda *own: scan(*own, how=how), maps, sizes)
            for count in (1, 3):
                with threads(count):
                    actual = scan(*filled, how=how, valid_size=torch.tensor(sizes))
                for name, result in actual.items():
                    assert torch.equal(result, expected[name]), (isa, count, name)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@every_pair(
    impl=CPU_IMPLS, segment=[None, 1, 4], dtype=DTYPES, groups=[1, 2, 16], states=[2, 3],
    layout=["contiguous", "channels_last", "transposed"], skip=[True, False],
)  # fmt: skip
def test_propagate_of_40_sizes_is_each_image_alone(impl, segment, dtype, groups, states, layout, skip) -> None:
    (x, proxy, *projections), grad = make_arguments(
        40, 16, 9, 11, states, groups, dtype, layout=layout, skip=skip, logits=8.0
    )
    maps = [x, proxy, grad]
    filled = poisoned(maps, SIZES, float("nan"))
    how = (ALL, segment, impl)
    actual = propagated(*filled, projections=projections, how=how, valid_size=torch.tensor(SIZES))
    plain = alone(lambda *own: propagated(*own, projections=projections, how=how), maps, SIZES)
    wide = [None if one is None else one.double() for one in projections]
    exact = alone(
        lambda *own: propagated(*own, projections=wide, how=(ALL, segment, "reference")),
        [one.double() for one in maps],
        SIZES,
    )
    assert_equals_alone(actual, plain, exact)


@pytest.mark.usefixtures("fresh_memory_is_nan")
@every_pair(channels=[3, 16, 40], size=[(40, 33), (6, 150)], count=[1, 4], layout=["contiguous", "channels_last"])
def test_propagate_on_the_cpu_gives_the_same_bits_as_alone(channels, size, count, layout) -> None:
    # Many threads for few channels cut a call by directions; large maps are walked in tiles, or where they are.
    sizes = random_sizes(4, *size)
    (x, proxy, *projections), grad = make_arguments(4, channels, *size, 4, channels, torch.float32, layout=layout)
    filled = poisoned([x, proxy, grad], sizes, float("nan"))
    for segment in (None, 3):
        how = (ALL, segment, "cpu")
        expected = alone(lambda *own: propagated(*own, projections=projections, how=how), [x, proxy, grad], sizes)  # noqa: B023
        with threads(count * 4):
            actual = propagated(*filled, projections=projections, how=how, valid_size=torch.tensor(sizes))
        assert torch.equal(actual["y"], expected["y"]) and torch.equal(actual["dx"], expected["dx"])
        for name in NAMES[1:]:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_memory_is_nan")
def test_a_large_map_is_gathered_in_its_own_memory() -> None:
    # Beyond half a megabyte a block, a contiguous result is staged where it will be.
    sizes = [(130, 100), (7, 128), (130, 128)]
    (x, proxy, *projections), _ = make_arguments(3, 64, 130, 128, 2, 64, torch.float32)
    filled = poisoned([x, proxy], sizes, float("nan"))
    y = torch.ops.gspn.propagate(*filled, *projections, ALL, None, "cpu", torch.tensor(sizes))
    for i, (h, w) in enumerate(sizes):
        own = torch.ops.gspn.propagate(
            x[i : i + 1, :, :h, :w], proxy[i : i + 1, :, :h, :w], *projections, ALL, None, "cpu"
        )
        assert torch.equal(y[i, :, :h, :w], own[0])
        assert not y[i, :, h:].any() and not y[i, :, :, w:].any()


def inputs(impl: str, gated: bool = True) -> tuple:
    x, taps, lam, _ = make_inputs(5, 4, 5, 6, 2, torch.float64)
    return x, taps, lam if gated else None


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("direction", ["up", "right"])
def test_derivatives_of_a_line_scan_of_every_order_and_mode(impl, direction) -> None:
    leaves = [one.requires_grad_() for one in inputs(impl)]

    def call(*tensors):
        return gspn.line_scan(*tensors, direction=direction, segment=2, valid_size=FEW, impl=impl)

    how = {"fast_mode": True, "check_forward_ad": True}
    assert torch.autograd.gradcheck(call, leaves, **how)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_derivatives_of_propagate_of_every_order_and_mode(impl) -> None:
    (x, proxy, *projections), _ = make_arguments(5, 4, 5, 6, 2, 2, torch.float64)
    leaves = [one.requires_grad_() for one in (x, proxy, *projections[:3])]

    def call(*tensors):
        return gspn.propagate(*tensors, segment=2, valid_size=FEW, impl=impl)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def second_order(call, maps: list[Tensor], sizes) -> list[Tensor]:
    """First and second derivatives, and a tangent, of a sum of squares."""
    leaves = [one.clone().requires_grad_() for one in maps]
    firsts = torch.autograd.grad(call(*leaves).pow(2).sum(), leaves, create_graph=True)
    seconds = torch.autograd.grad(sum(one.pow(2).sum() for one in firsts), leaves)
    # Tangents that are finite: those of the padding have no influence either.
    _, tangent = torch.func.jvp(call, tuple(maps), tuple(torch.ones_like(one) for one in maps))
    return [*(one.detach() for one in firsts), *seconds, tangent]


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_higher_derivatives_do_not_see_the_padding(impl, value) -> None:
    x, taps, lam = inputs(impl)
    (_, proxy, *projections), _ = make_arguments(5, 4, 5, 6, 2, 2, torch.float64)
    calls = (
        (lambda *own: gspn.line_scan(*own, direction="left", segment=2, valid_size=FEW, impl=impl), [x, taps, lam]),
        (lambda *own: gspn.propagate(*own, *projections[:3], segment=2, valid_size=FEW, impl=impl), [x, proxy]),
    )
    for call, maps in calls:
        expected = second_order(call, poisoned(maps, FEW, 0.0), FEW)
        for actual, one in zip(second_order(call, poisoned(maps, FEW, value), FEW), expected, strict=True):
            torch.testing.assert_close(actual, one)
            assert torch.equal(actual, poisoned([actual], FEW, 0.0)[0])


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_opcheck(impl) -> None:
    sizes = torch.tensor(FEW)
    x, taps, lam, grad = make_inputs(5, 4, 5, 6, 2, torch.float32)
    leaves = tuple(one.requires_grad_() for one in (x, taps, lam))
    torch.library.opcheck(torch.ops.gspn.line_scan, (*leaves, "left", 2, impl, sizes))
    backward = (grad, x.detach(), *leaves, "left", 2, impl, True, True, sizes)
    torch.library.opcheck(torch.ops.gspn.line_scan_backward, backward)
    arguments, grad = make_arguments(5, 4, 5, 6, 3, 2, torch.float32)
    arguments = tuple(one.requires_grad_() for one in arguments)
    torch.library.opcheck(torch.ops.gspn.propagate, (*arguments, ALL, None, impl, sizes))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.gspn.propagate_backward, (grad, *arguments, ALL, 2, impl, sizes), test_utils=utilities
    )


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("mapped", ["maps", "sizes", "both", "projections"])
def test_vmap(impl, mapped) -> None:
    (x, proxy, *projections), _ = make_arguments(3 * 5, 4, 5, 6, 3, 2, torch.float64)
    (taps, lam) = make_inputs(3 * 5, 4, 5, 6, 2, torch.float64)[1:3]
    maps = [one.unflatten(0, (3, 5)) for one in (x, proxy, taps, lam)]
    sizes = torch.tensor([FEW, FEW[::-1], [(2, 3)] * 5])
    tap_proj = torch.stack([projections[0] * k for k in (1.0, 2.0, 3.0)])
    chosen = (
        *(one if mapped in ("maps", "both") else one[0] for one in maps),
        sizes if mapped in ("sizes", "both") else sizes[0],
        tap_proj if mapped == "projections" else tap_proj[0],
    )
    one_of_each = (*(one[0] for one in maps), sizes[0], tap_proj[0])
    in_dims = tuple(0 if one.dim() > other.dim() else None for one, other in zip(chosen, one_of_each, strict=True))

    def entry(k: int) -> list[Tensor]:
        return [one if dim is None else one[k] for one, dim in zip(chosen, in_dims, strict=True)]

    def call(x, proxy, taps, lam, sizes, tap_proj):
        h = gspn.line_scan(x, taps, lam, direction="up", segment=2, valid_size=sizes, impl=impl)
        return h + gspn.propagate(x, proxy, tap_proj, *projections[1:3], segment=2, valid_size=sizes, impl=impl)

    actual = torch.func.vmap(call, in_dims)(*chosen)
    for k in range(3):
        torch.testing.assert_close(actual[k], call(*entry(k)))

    def loss(*tensors):
        return call(*tensors).pow(2).sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims)(*chosen)
    torch.testing.assert_close(grads[2], torch.func.grad(loss)(*entry(2)))


def test_compiled_once_for_all_sizes() -> None:
    (x, proxy, *projections), _ = make_arguments(5, 4, 5, 6, 2, 2, torch.float32)
    compilations = []

    def backend(graph, _inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def call(x, proxy, valid_size):
        return gspn.propagate(x, proxy, *projections[:3], valid_size=valid_size)

    x.requires_grad_()
    for sizes in (FEW, FEW[::-1], [(3, 2)] * 5):
        sizes = torch.tensor(sizes)
        y = call(x, proxy, sizes)
        assert torch.equal(y, gspn.propagate(x, proxy, *projections[:3], valid_size=sizes))
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.any()
    assert len(compilations) == 1


def test_export_takes_the_sizes_as_an_input() -> None:
    class Propagate(torch.nn.Module):
        def forward(self, x, proxy, tap_proj, lam_proj, u_proj, sizes):
            return gspn.propagate(x, proxy, tap_proj, lam_proj, u_proj, valid_size=sizes)

    arguments, _ = make_arguments(5, 4, 5, 6, 3, 4, torch.float32)
    program = torch.export.export(Propagate(), (*arguments[:5], torch.tensor(FEW)))
    sizes = torch.tensor(FEW[::-1])
    torch.testing.assert_close(program.module()(*arguments[:5], sizes), Propagate()(*arguments[:5], sizes))


@pytest.mark.parametrize("kind", ["list", "int32", "transposed"])
@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_sizes_of_every_kind(kind, impl) -> None:
    x, taps, lam = inputs(impl)
    expected = gspn.line_scan(x, taps, lam, direction="left", valid_size=torch.tensor(FEW), impl=impl)
    actual = gspn.line_scan(x, taps, lam, direction="left", valid_size=sizes_as(kind, FEW), impl=impl)
    assert torch.equal(actual, expected)
    empty = gspn.line_scan(x[:0], taps[:0], lam[:0], direction="left", valid_size=[], impl=impl)
    assert empty.shape == (0, 4, 5, 6)


def test_the_full_size_is_the_call_without_sizes() -> None:
    (x, proxy, *projections), _ = make_arguments(3, 16, 9, 7, 2, 16, torch.float32)
    for impl in CPU_IMPLS:
        assert torch.equal(
            gspn.propagate(x, proxy, *projections[:3], valid_size=[(9, 7)] * 3, impl=impl),
            gspn.propagate(x, proxy, *projections[:3], impl=impl),
        )


def test_stochastic_taps_end_at_the_images_border() -> None:
    logits = torch.randn(5, 2, 3, 5, 6, dtype=torch.float64)
    for direction in gspn.DIRECTIONS:
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            filled = poisoned([logits], FEW, float("nan"))[0].to(memory_format=layout).requires_grad_()
            taps = gspn.stochastic_taps(filled, direction=direction, valid_size=FEW)
            (grad,) = torch.autograd.grad(taps.pow(2).sum(), filled)
            leaf = logits.clone().requires_grad_()
            for i, (h, w) in enumerate(FEW):
                own = gspn.stochastic_taps(leaf[i : i + 1, ..., :h, :w], direction=direction)
                torch.testing.assert_close(taps[i : i + 1, ..., :h, :w], own)
                own.pow(2).sum().backward()
            torch.testing.assert_close(grad, leaf.grad)
            assert torch.equal(taps, poisoned([taps], FEW, 0.0)[0])


@pytest.mark.parametrize(
    ("sizes", "error", "says"),
    [
        ([(5, 6)], ValueError, r"valid_size.shape=\(1, 2\)"),
        ([(5, 6, 1)] * 2, ValueError, r"valid_size.shape=\(2, 3\)"),
        ([(6, 6), (5, 6)], ValueError, r"valid_size\[0\]=\(6, 6\) is not within the map of 5 x 6"),
        ([(5, 6), (-1, 6)], ValueError, r"valid_size\[1\]=\(-1, 6\)"),
        ([(5.0, 6.0)] * 2, TypeError, r"torch.float32: heights and widths are integers"),
        ([(5, 6), (5,)], TypeError, "pass a height and a width for each image"),
        ([(5, 6), (None, 6)], TypeError, "pass a height and a width for each image"),
        ("large", TypeError, "pass a height and a width for each image"),
        (7, TypeError, "pass a height and a width for each image"),
    ],
)
def test_wrong_sizes_are_refused(sizes, error, says) -> None:
    (x, proxy, *projections), _ = make_arguments(2, 4, 5, 6, 2, 4, torch.float32)
    taps = project_taps(proxy, projections[0][0])
    for impl in CPU_IMPLS:
        with pytest.raises(error, match=says):
            gspn.propagate(x, proxy, *projections[:3], valid_size=sizes, impl=impl)
        with pytest.raises(error, match=says):
            gspn.line_scan(x, taps, direction="down", valid_size=sizes, impl=impl)
    with pytest.raises(error, match=says):
        gspn.stochastic_taps(taps, direction="down", valid_size=sizes)


def test_the_operators_read_and_write_nothing_beyond_the_map_for_any_sizes() -> None:
    x, taps, lam, _ = make_inputs(2, 2, 4, 5, 2, torch.float32)
    sizes = torch.tensor([[9, 9], [-3, 4]])
    whole = gspn.line_scan(x[:1], taps[:1], lam[:1], direction="left")
    for impl in CPU_IMPLS:
        h = torch.ops.gspn.line_scan(x, taps, lam, "left", None, impl, sizes)
        torch.testing.assert_close(h[:1], whole)
        assert not h[1].any()


def test_the_operators_refuse_sizes_that_they_cannot_read() -> None:
    arguments, grad = make_arguments(2, 2, 4, 5, 2, 2, torch.float32)
    x, taps, lam, _ = make_inputs(2, 2, 4, 5, 2, torch.float32)
    sizes = torch.tensor([[1, 2], [3, 4]])
    freed = sizes.clone()
    freed.untyped_storage().resize_(0)
    for wrong, error, says in (
        (sizes.to("meta"), ValueError, "valid_size.device=device.type='meta'.; move both to one device"),
        (sizes.to_sparse(), TypeError, "valid_size.layout=torch.sparse_coo"),
        (freed, ValueError, "needs more than the 0 bytes of its storage, which was freed"),
    ):
        for direction in ("down", "left"):
            with pytest.raises(error, match=says):
                torch.ops.gspn.line_scan(x, taps, lam, direction, None, "cpu", wrong)
            with pytest.raises(error, match=says):
                torch.ops.gspn.line_scan_backward(x, x, x, taps, lam, direction, None, "cpu", True, True, wrong)
            with pytest.raises(error, match=says):
                torch.ops.gspn.propagate(*arguments, ALL, None, "cpu", wrong)
            with pytest.raises(error, match=says):
                torch.ops.gspn.propagate_backward(grad, *arguments, ALL, None, "cpu", wrong)


def test_rows_of_an_image_and_onnx_refuse_sizes() -> None:
    nn = pytest.importorskip("gspn.nn", reason="needs gspn[train]")
    from gspn.distributed.modules import replacement

    forward = replacement("", nn.GSPN2d(4), None)
    with pytest.raises(NotImplementedError, match="valid_size has no meaning for rows of an image"):
        forward(torch.zeros(1, 4, 5, 6), [(5, 6)])
    pytest.importorskip("onnxscript", reason="needs gspn[export]")
    import gspn.export

    class Scan(torch.nn.Module):
        def forward(self, x, taps, sizes):
            return gspn.line_scan(x, taps, direction="down", valid_size=sizes)

    x, taps, _, _ = make_inputs(2, 4, 5, 6, 2, torch.float32)
    with pytest.raises(torch.onnx.OnnxExporterError) as failure:
        torch.onnx.export(Scan(), (x, taps, torch.tensor([[5, 6], [1, 2]])), dynamo=True, verbose=False)
    reasons, error = [], failure.value
    while error is not None:
        reasons.append(str(error))
        error = error.__cause__
    assert any("valid_size has no translation to ONNX" in reason for reason in reasons), reasons
