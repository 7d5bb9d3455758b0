"""Every implementation of ``propagate`` that runs on the CPU, forward and every gradient, against the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gspn
from gspn.ops.cpu import instruction_set, instruction_sets
from propagate_cases import ALL, check_propagate, in_doubles, magnitudes, make_arguments, run
from support import CPU_IMPLS, DTYPES, SEGMENTS, SHAPES, assert_as_exact_as_pytorch, every_pair, threads


@every_pair(shape=SHAPES, segment=SEGMENTS, groups=[3, 1])
def test_sizes_and_segments(shape, segment, groups) -> None:
    check_propagate(*make_arguments(2, 3, *shape, 5, groups, torch.float32), segment)


@every_pair(
    states=[1, 2, 4, 5, 8, 16, 20, 64],
    channels_groups=[(1, 1), (16, 16), (16, 8), (40, 1), (40, 20), (48, 3), (24, 2), (72, 3)],
)
def test_states_channels_and_groups(states, channels_groups) -> None:
    # Groups that fill vectors of any width, that do not, and that lie across their ends; blocks that are partly empty.
    channels, groups = channels_groups
    check_propagate(*make_arguments(1, channels, 7, 18, states, groups, torch.float32), 4)


@every_pair(dtype=DTYPES, layout=["contiguous", "channels_last", "sliced", "expanded", "transposed"], groups=[40, 1])
def test_layouts_and_dtypes(dtype, layout, groups) -> None:
    check_propagate(*make_arguments(2, 40, 6, 19, 8, groups, dtype, layout=layout), None)


@pytest.mark.parametrize(("layout", "other"), [("contiguous", "channels_last"), ("channels_last", "sliced")])
def test_mixed_layouts(layout, other) -> None:
    arguments, _ = make_arguments(2, 17, 9, 18, 8, 17, torch.float32, layout=layout, proxy_layout=other)
    _, grad = make_arguments(2, 17, 9, 18, 8, 17, torch.float32, layout=other, seed=1)
    check_propagate(arguments, grad, None)


@every_pair(directions=["down", "left", "up,right", "left,down,up"], skip=[True, False])
def test_subsets_and_orders_of_directions(directions, skip) -> None:
    count = len(directions.split(","))
    check_propagate(*make_arguments(1, 20, 8, 9, 4, 20, torch.float32, directions=count, skip=skip), 3, directions)


@pytest.mark.slow
@every_pair(
    layout=["contiguous", "channels_last"],
    dtype=[torch.float32, torch.bfloat16],
    shape=[(20, 300, 280), (33, 100, 128), (16, 70, 520)],
)
def test_images_beyond_the_caches(layout, dtype, shape) -> None:
    # Kept whole in scratch, gathered in the result's own memory, walked in tiles or where they are: by size and layout.
    arguments, grad = make_arguments(1, *shape, 2, 1, dtype, layout=layout)
    plain = torch.ops.gspn.propagate(*arguments, ALL, 50, "reference")
    exact = torch.ops.gspn.propagate(*in_doubles(arguments), ALL, 50, "reference")
    magnitude = magnitudes(arguments, grad, ALL, 50)["y"]
    for isa in instruction_sets():
        with instruction_set(isa), threads(2):
            y = torch.ops.gspn.propagate(*arguments, ALL, 50, "cpu")
        assert_as_exact_as_pytorch(y, plain, exact, magnitude, isa)


@pytest.mark.parametrize("segment", [None, 40])
def test_gradients_of_images_whose_taps_are_kept_in_part(segment) -> None:
    # The backward keeps a mebibyte of exponentials: of the last lines, and of those alone whose logits are moderate.
    arguments, grad = make_arguments(1, 4, 160, 150, 2, 4, torch.float32, logits=1.0)
    arguments[1][0, :, 1::50, ::70] *= 90
    check_propagate(arguments, grad, segment)


@every_pair(
    impl=["reference", *instruction_sets()],
    size=[30.0, 300.0, 1e4],
    groups=[20, 1],
    dtype=[torch.float64, torch.float32],
    sign=[None, -1.0],
)
def test_logits_of_any_size(impl, size, groups, dtype, sign) -> None:
    # Sigmoids that underflow, alone and all three of a pixel: their ratios are still right.
    arguments, grad = make_arguments(1, 20, 6, 18, 2, groups, dtype, logits=size)
    x, proxy, tap_proj, *gates = arguments
    if sign is not None:
        proxy, tap_proj = proxy.abs() + 0.1, sign * tap_proj.abs()
    arguments = (x, proxy, tap_proj, *gates)
    plain = run(arguments, grad, ALL, None, "reference")
    exact = run(in_doubles(arguments), grad.double(), ALL, None, "reference")
    magnitude = magnitudes(arguments, grad, ALL, None)
    results = plain
    if impl != "reference":
        with instruction_set(impl):
            results = run(arguments, grad, ALL, None, "cpu")
    for name, result in results.items():
        assert result.isfinite().all(), name
        # A sigmoid of a is as exact as a is, and a as large as `size`.
        error, allowed = (result - exact[name]).abs().max(), 4 * (plain[name] - exact[name]).abs().max()
        scale = max(exact[name].abs().max() * size, 2 * magnitude[name].max()) * torch.finfo(dtype).eps
        assert error <= max(allowed, scale), (name, error, allowed, scale)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("groups", [2, 1])
def test_the_formula_in_loops(impl, groups) -> None:
    """Written out pixel by pixel, from the docstring alone."""
    (x, proxy, tap_proj, lam_proj, u_proj, skip_proj), _ = make_arguments(1, 2, 3, 4, 3, groups, torch.float64)
    _, channels, height, width = x.shape
    steps = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}
    y = torch.zeros_like(x)
    for d, direction in enumerate(gspn.DIRECTIONS):
        di, dj = steps[direction]
        for c in range(channels):
            group = c * groups // channels
            h: dict[tuple[int, int], float] = {}
            rows = range(height) if di >= 0 else range(height - 1, -1, -1)
            columns = range(width) if dj >= 0 else range(width - 1, -1, -1)
            order = [(i, j) for i in rows for j in columns] if di else [(i, j) for j in columns for i in rows]
            for i, j in order:
                p = proxy[0, :, i, j]
                value = float(lam_proj[d, c] @ p) * float(x[0, c, i, j])
                weights = {}
                for k in range(3):
                    at = (i - di, j + k - 1) if di else (i + k - 1, j - dj)
                    line = at[0] if di == 0 else at[1]
                    if 0 <= line < (height if di == 0 else width):
                        weights[at] = 1 / (1 + float(torch.exp(-(tap_proj[d, group, k] @ p))))
                for at, weight in weights.items():
                    value += weight / sum(weights.values()) * h.get(at, 0.0)
                h[i, j] = value
                y[0, c, i, j] += float(u_proj[d, c] @ p) * value
    y += torch.einsum("cs,bshw->bchw", skip_proj, proxy) * x
    actual = torch.ops.gspn.propagate(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, ALL, None, impl)
    torch.testing.assert_close(actual, y)


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_merge_and_skips_are_folded(impl) -> None:
    (x, proxy, tap_proj, lam_proj, u_proj, _), _ = make_arguments(2, 6, 5, 7, 3, 2, torch.float64)
    skip_proj, merge = torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y = gspn.propagate(x, proxy, tap_proj, lam_proj, u_proj, skip_proj, merge, impl=impl)
    parts = 0
    for d, direction in enumerate(gspn.DIRECTIONS):
        one = [p[d : d + 1] for p in (tap_proj, lam_proj, u_proj, skip_proj)]
        parts = parts + merge[d] * gspn.propagate(x, proxy, *one, directions=[direction], impl=impl)
    torch.testing.assert_close(y, parts)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("groups", [40, 1])
def test_states_grow_by_one_a_line(impl, groups) -> None:
    # Taps sum to one whatever the logits: with gates of one and an input of one, line i holds i + 1.
    proxy = torch.cat([torch.ones(1, 1, 6, 50), torch.randn(1, 3, 6, 50)], dim=1)
    gate = torch.zeros(1, 40, 4)
    gate[:, :, 0] = 1
    tap_proj = torch.randn(1, groups, 3, 4) * 3
    y = gspn.propagate(torch.ones(1, 40, 6, 50), proxy, tap_proj, gate, gate, directions=["up"], impl=impl)
    torch.testing.assert_close(y, torch.arange(6.0, 0, -1).view(1, 1, 6, 1).expand_as(y))


@pytest.mark.parametrize("impl", CPU_IMPLS)
def test_turning_the_image_turns_the_result(impl) -> None:
    (x, proxy, *projections), _ = make_arguments(1, 5, 6, 9, 3, 5, torch.float64)
    y = torch.ops.gspn.propagate(x, proxy, *projections, ALL, 4, impl)
    tap_proj, *gates = projections
    # Along the axis that is flipped, the neighbours before and after change places.
    flipped = torch.cat([tap_proj[:2], tap_proj[2:].flip(2)])
    for turn, names, taps in (
        (lambda t: t.flip(-2), "up,down,right,left", flipped),
        (lambda t: t.mT, "right,left,down,up", tap_proj),
    ):
        turned = torch.ops.gspn.propagate(turn(x), turn(proxy), taps, *gates, names, 4, impl)
        torch.testing.assert_close(turn(turned), y)


def test_shared_taps_are_repeated_taps() -> None:
    (x, proxy, tap_proj, *rest), _ = make_arguments(1, 32, 6, 20, 8, 1, torch.float64)
    shared = torch.ops.gspn.propagate(x, proxy, tap_proj, *rest, ALL, None, "cpu")
    repeated = torch.ops.gspn.propagate(x, proxy, tap_proj.expand(4, 32, 3, 8), *rest, ALL, None, "cpu")
    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_maps(impl, shape) -> None:
    batch, channels, height, width = shape
    arguments, grad = make_arguments(batch, channels, height, width, 3, 1, torch.float32)
    results = run(arguments, grad, ALL, None, impl)
    assert results["y"].shape == shape
    assert all(not r.any() for r in results.values())


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_inputs_are_not_written_to(impl, layout) -> None:
    arguments, grad = make_arguments(2, 20, 7, 18, 3, 20, torch.float32, layout=layout)
    before = [t.clone() for t in (*arguments, grad)]
    run(arguments, grad, ALL, 3, impl)
    assert all(torch.equal(a, b) for a, b in zip((*arguments, grad), before, strict=True))


@every_pair(
    dtype=[torch.float32, torch.bfloat16],
    layout=["contiguous", "channels_last", "sliced"],
    size=[(5, 19), (100, 130)],
    states=[2, 5, 9],
    groups=[24, 1],
)
def test_every_output_element_is_written_and_nothing_beside_the_inputs_matters(
    dtype, layout, size, states, groups, monkeypatch
) -> None:
    # Outputs and the proxy's copy come from empty memory; filled with NaN, an element that is left out or read shows.
    arguments, grad = make_arguments(1, 24, *size, states, groups, dtype, layout=layout)
    plain_empty_like, plain_empty = torch.empty_like, torch.empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: plain_empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: plain_empty(*a, **k).fill_(float("nan")))
    for isa, segment in itertools.product(instruction_sets(), (None, 2)):
        with instruction_set(isa):
            assert all(r.isfinite().all() for r in run(arguments, grad, ALL, segment, "cpu").values()), isa


@pytest.mark.parametrize(("channels", "groups", "segment"), [(5, 5, None), (16, 1, 3), (40, 40, None)])
def test_the_same_bits_for_any_number_of_threads_and_any_batch(channels, groups, segment) -> None:
    arguments, grad = make_arguments(3, channels, 13, 21, 8, groups, torch.float32)
    x, proxy, *projections = arguments
    results = []
    for count in (1, 2, 7):
        with threads(count):
            results.append(run(arguments, grad, ALL, segment, "cpu"))
            again = run(arguments, grad, ALL, segment, "cpu")
            assert all(torch.equal(a, b) for a, b in zip(results[-1].values(), again.values(), strict=True))
            alone = run((x[1:2], proxy[1:2], *projections), grad[1:2], ALL, segment, "cpu")
        for name in ("y", "dx"):
            assert torch.equal(alone[name], results[-1][name][1:2])
    # The proxy's gradient is a sum over the channels, and each thread adds up some of them.
    for name in results[0].keys() - {"dproxy"}:
        assert all(torch.equal(r[name], results[0][name]) for r in results), name


def test_a_nan_goes_where_the_scan_takes_it_and_nowhere_else() -> None:
    (x, proxy, *projections), _ = make_arguments(1, 20, 9, 9, 4, 20, torch.float32, directions=1)
    x[0, 3, 4, 4] = float("nan")
    y = torch.ops.gspn.propagate(x, proxy, *projections, "down", None, "cpu")
    expected = torch.ops.gspn.propagate(x, proxy, *projections, "down", None, "reference")
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().any() and not y[:, :3].isnan().any()


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 35), st.integers(1, 20), st.integers(1, 20), st.integers(1, 17),
    st.one_of(st.none(), st.integers(1, 25)), st.booleans(), st.integers(0, 10**6), st.sampled_from([1, None]),
)  # fmt: skip
def test_any_size(batch, channels, height, width, states, segment, skip, seed, groups) -> None:
    arguments, grad = make_arguments(
        batch, channels, height, width, states, groups or channels, torch.float64, skip=skip, seed=seed
    )
    check_propagate(arguments, grad, segment)
