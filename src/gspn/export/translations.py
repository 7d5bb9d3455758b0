"""The operators in ONNX: one ``Scan`` for each direction, for any batch, height and width.

onnxscript keeps its translations of PyTorch's own operators in a registry, and these are added to it: once this module
has been imported, every ``torch.onnx.export`` finds them.

As in the kernels, maps and states are float32 where the image is in half precision. A tap towards a neighbour that does
not exist is multiplied by zero here, and not left out: it has to be finite.
"""

# No `from __future__ import annotations`: onnxscript reads the annotations of these functions.

import math
from collections.abc import Sequence
from typing import Any, Optional

import onnxscript
import torch
from onnxscript import FLOAT, INT64, ir
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.registration import torch_op

from ..ops.directions import scan_axes

OPSET = 18
"""The oldest opset of ONNX that the translations, and PyTorch's own, can be written in."""


@onnxscript.script(onnxscript.values.Opset("gspn", 1))
def _scan(
    state: FLOAT, source: FLOAT, before: FLOAT, here: FLOAT, after: FLOAT, cross: INT64,
    axes: Sequence[int], reverse: Sequence[int], out_axis: Sequence[int], out_reverse: Sequence[int],
) -> FLOAT:  # fmt: skip
    """``h[j] = source[j] + before[j] h[j-1] + here[j] h[j] + after[j] h[j+1]``, line by line, ``j`` along ``cross``."""

    @onnxscript.graph()
    def step(h, x, w0, w1, w2):
        padded = op.Pad(h, op.Constant(value_ints=[1, 1]), None, cross)
        left = op.Slice(padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[-2]), cross)
        right = op.Slice(padded, op.Constant(value_ints=[2]), op.Constant(value_ints=[9223372036854775807]), cross)
        line = x + w0 * left + w1 * h + w2 * right
        return line, op.Identity(line)

    _, states = op.Scan(
        state, source, before, here, after, body=step, num_scan_inputs=4, scan_input_axes=axes,
        scan_input_directions=reverse, scan_output_axes=out_axis, scan_output_directions=out_reverse,
    )  # fmt: skip
    return states


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _number(value: float, like: Any) -> Any:
    return op.Constant(value=ir.tensor([value], dtype=like))


def _wide(map_: Any) -> Any:
    """In the dtype of the state."""
    return op.Cast(map_, to=ir.DataType.FLOAT) if map_.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else map_


def _state_dtype(x: Any) -> ir.DataType:
    return ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _scan_image(source: Any, taps: Any, groups: int, channels: int, direction: str, segment: int | None, dtype) -> Any:
    """``[B, C, H, W]`` and taps ``[B, 3, G, H, W]`` to the states ``[B, C, H, W]``.

    Segments are an axis of their own, so that a scan has as many steps as a segment has lines. The last segment is
    filled up with lines that nothing reads.
    """
    axes = scan_axes(direction)
    size = op.Shape(source, start=2)
    lines, cross = (op.Gather(size, _ints(2 + axis)) for axis in (axes.line, axes.cross))
    count, length = _ints(1), lines
    if segment is not None:
        length = op.Min(lines, _ints(segment))
        count = op.Div(op.Sub(op.Add(lines, length), _ints(1)), length)
        more = op.Sub(op.Mul(count, length), lines)
        pads = op.Concat(*((more, _ints(0)) if axes.reverse else (_ints(0), more)), axis=0)
        source, taps = (op.Pad(one, pads, None, _ints(axes.line)) for one in (source, taps))
    vertical = axes.line == -2
    frame = (count, length, cross) if vertical else (cross, count, length)
    line = (count, cross) if vertical else (cross, count)
    padded = op.Shape(source)
    split = op.Reshape(source, op.Concat(_ints(0, 1, groups, channels // groups), *frame, axis=0))
    before, here, after = op.Split(
        op.Reshape(taps, op.Concat(_ints(0, 3, groups, 1), *frame, axis=0)), axis=1, num_outputs=3
    )  # [B, 1, G, 1, ...]
    start = op.ConstantOfShape(
        op.Concat(op.Shape(source, end=1), _ints(1, groups, channels // groups), *line, axis=0),
        value=ir.tensor([0], dtype=dtype),
    )
    scanned, reverse = 5 if vertical else 6, int(axes.reverse)
    states = _scan(
        start, split, before, here, after, _ints(5 if vertical else 4), axes=[scanned] * 4, reverse=[reverse] * 4,
        out_axis=[scanned], out_reverse=[reverse],
    )  # fmt: skip
    states = op.Reshape(states, padded)
    if segment is None:
        return states
    first = more if axes.reverse else _ints(0)
    return op.Slice(states, first, op.Add(first, lines), _ints(axes.line))


@torch_op("gspn::line_scan", trace_only=True)
def line_scan(
    x: FLOAT, taps: FLOAT, lam: Optional[FLOAT] = None, direction: str = "", segment: Optional[int] = None,
    impl: str = "",
) -> FLOAT:  # fmt: skip
    """:func:`gspn.line_scan`."""
    source = _wide(x) if lam is None else op.Mul(_wide(x), _wide(lam))
    ordered = op.Transpose(_wide(taps), perm=[0, 2, 1, 3, 4])  # [B, 3, G, H, W]
    states = _scan_image(source, ordered, taps.shape[1], x.shape[1], direction, segment, _state_dtype(x))
    return op.Cast(states, to=x.dtype)


def _exists(x: Any, axis: int) -> Any:
    """``[3, 1, 1, W]`` or ``[3, 1, H, 1]``: whether a pixel's neighbour along ``axis`` (-1 or -2) exists."""
    count = op.Squeeze(op.Shape(x, start=4 + axis, end=5 + axis))
    zero, one = (op.Constant(value_int=n) for n in (0, 1))
    neighbour = op.Add(op.Range(zero, count, one), op.Constant(value=ir.tensor([[-1], [0], [1]])))
    exists = op.Equal(neighbour, op.Clip(neighbour, zero, op.Sub(count, one)))
    return op.Unsqueeze(exists, _ints(1, 2) if axis == -1 else _ints(1, 3))


@torch_op("gspn::propagate", trace_only=True)
def propagate(
    x: FLOAT, proxy: FLOAT, tap_proj: FLOAT, lam_proj: FLOAT, u_proj: FLOAT, skip_proj: Optional[FLOAT] = None,
    directions: str = "", segment: Optional[int] = None, impl: str = "",
) -> FLOAT:  # fmt: skip
    """:func:`gspn.propagate` with the merge folded into the projections."""
    names = directions.split(",")
    groups, channels, proxy_channels = tap_proj.shape[1], x.shape[1], proxy.shape[1]
    dtype, image, proxy = _state_dtype(x), _wide(x), _wide(proxy)

    def kernels(projection: Any) -> Sequence[Any]:
        """1x1 convolutions, one for each direction."""
        rows = op.Reshape(projection, _ints(-1, proxy_channels, 1, 1))
        return op.Split(rows, axis=0, num_outputs=len(names)) if len(names) > 1 else [rows]

    # softmax(log(sigmoid(a))) = softmax(-softplus(-a)): the minus signs of logits are in their projection.
    tap_kernels = kernels(op.Transpose(op.Neg(tap_proj), perm=[0, 2, 1, 3]))
    exists = {axis: _exists(x, axis) for axis in {scan_axes(name).cross for name in names}}
    never = _number(-math.inf, dtype)
    y = None
    if skip_proj is not None:
        y = op.Mul(op.Conv(proxy, op.Unsqueeze(skip_proj, _ints(2, 3))), image)
    for name, to_taps, to_lam, to_u in zip(names, tap_kernels, kernels(lam_proj), kernels(u_proj), strict=True):
        gates = op.Neg(op.Softplus(op.Conv(proxy, to_taps)))  # [B, 3G, H, W]
        gates = op.Reshape(gates, op.Concat(_ints(0, 3, groups), op.Shape(x, start=2), axis=0))
        taps = op.Softmax(op.Where(exists[scan_axes(name).cross], gates, never), axis=1)
        source = op.Mul(op.Conv(proxy, to_lam), image)
        states = _scan_image(source, taps, groups, channels, name, segment, dtype)
        gated = op.Mul(op.Conv(proxy, to_u), states)
        y = gated if y is None else op.Add(y, gated)
    return op.Cast(y, to=x.dtype)


TRANSLATIONS = {torch.ops.gspn.line_scan.default: line_scan, torch.ops.gspn.propagate.default: propagate}
