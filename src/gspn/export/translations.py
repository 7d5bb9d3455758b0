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


# OpenVINO has to know the rank of what a scan works on.
LINE = FLOAT[None, None, None, None, None, None]


@onnxscript.script(onnxscript.values.Opset("gspn", 1))
def _scan(
    state: FLOAT, source: FLOAT, before: FLOAT, here: FLOAT, after: FLOAT, cross: Sequence[int], axes: Sequence[int],
    reverse: Sequence[int], out_axis: Sequence[int], out_reverse: Sequence[int],
) -> FLOAT:  # fmt: skip
    """``h[j] = source[j] + before[j] h[j-1] + here[j] h[j] + after[j] h[j+1]``, line by line, ``j`` along ``cross``."""

    @onnxscript.graph()
    def step(h: LINE, x: LINE, w0: LINE, w1: LINE, w2: LINE):  # noqa: ANN202
        axis = op.Constant(value_ints=cross)
        padded = op.Pad(h, op.Constant(value_ints=[1, 1]), None, axis)
        left = op.Slice(padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[-2]), axis)
        right = op.Slice(padded, op.Constant(value_ints=[2]), op.Constant(value_ints=[9223372036854775807]), axis)
        line = x + w0 * left + w1 * h + w2 * right
        return line, op.Identity(line)

    _, states = op.Scan(
        state, source, before, here, after, body=step, num_scan_inputs=4, scan_input_axes=axes,
        scan_input_directions=reverse, scan_output_axes=out_axis, scan_output_directions=out_reverse,
    )  # fmt: skip
    return states


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _wide(map_: Any) -> Any:
    """In float32, the dtype of the states."""
    if map_.dtype == ir.DataType.DOUBLE:
        raise TypeError("the operators have no translation in float64; convert the model with .float().")
    return map_ if map_.dtype == ir.DataType.FLOAT else op.Cast(map_, to=ir.DataType.FLOAT)


def _like(states: Any, x: Any) -> Any:
    return states if x.dtype == ir.DataType.FLOAT else op.Cast(states, to=x.dtype)


class _Lines:
    """The scans of an image along one of its axes, in both directions.

    Segments are an axis of their own, so that a scan has as many steps as a segment has lines; the last one is filled
    up with lines that nothing reads. With K channels in a group and n segments of s lines, scans see
    ``[B, 1, G, K, n, s, W]`` for rows as lines and ``[B, 1, G, K, H, n, s]`` for columns.
    """

    def __init__(self, image: Any, axis: int, groups: int, segment: int | None) -> None:
        self.axis, self.segment = axis, segment
        self.groups, self.channels = groups, image.shape[1] // groups
        size = op.Shape(image, start=2)
        self.count, cross = (op.Gather(size, _ints(n)) for n in ((0, 1) if axis == -2 else (1, 0)))
        segments, length = _ints(1), self.count
        if segment is not None:
            length = op.Min(self.count, _ints(segment))
            segments = op.Div(op.Sub(op.Add(self.count, length), _ints(1)), length)
            self.filling = op.Sub(op.Mul(segments, length), self.count)
        in_rows = axis == -2
        self.frame = (segments, length, cross) if in_rows else (cross, segments, length)
        line = (segments, cross) if in_rows else (cross, segments)
        self.scanned, self.cross = (5, 5) if in_rows else (6, 4)
        batch = op.Shape(image, start=0, end=1)
        self.start = op.ConstantOfShape(
            op.Concat(batch, _ints(1, groups, self.channels), *line, axis=0),
            value=ir.tensor([0.0]),
        )

    def _framed(self, maps: Any, *channels: int) -> Any:
        return op.Reshape(maps, op.Concat(_ints(0, *channels), *self.frame, axis=0))

    def scan(self, source: Any, taps: Any, reverse: int) -> Any:
        """``[B, C, H, W]`` and taps ``[B, 3, G, H, W]`` to the states ``[B, C, H, W]``."""
        if self.segment is not None:
            ends = (self.filling, _ints(0)) if reverse else (_ints(0), self.filling)
            source, taps = (op.Pad(one, op.Concat(*ends, axis=0), None, _ints(self.axis)) for one in (source, taps))
        before, here, after = op.Split(self._framed(taps, 3, self.groups, 1), axis=1, num_outputs=3)
        states = _scan(
            self.start, self._framed(source, 1, self.groups, self.channels), before, here, after, cross=[self.cross],
            axes=[self.scanned] * 4, reverse=[reverse] * 4, out_axis=[self.scanned], out_reverse=[reverse],
        )  # fmt: skip
        states = op.Reshape(states, op.Shape(source))
        if self.segment is None:
            return states
        first = self.filling if reverse else _ints(0)
        return op.Slice(states, first, op.Add(first, self.count), _ints(self.axis))


def _refuse_sizes(valid_size: Any) -> None:
    if valid_size is not None:
        raise NotImplementedError("valid_size has no translation to ONNX; export the model for images of one size.")


@torch_op("gspn::line_scan", trace_only=True)
def line_scan(
    x: FLOAT, taps: FLOAT, lam: Optional[FLOAT] = None, direction: str = "", segment: Optional[int] = None,
    impl: str = "", valid_size: Optional[INT64] = None,
) -> FLOAT:  # fmt: skip
    """:func:`gspn.line_scan`."""
    _refuse_sizes(valid_size)
    axes = scan_axes(direction)
    source = _wide(x) if lam is None else op.Mul(_wide(x), _wide(lam))
    ordered = op.Transpose(_wide(taps), perm=[0, 2, 1, 3, 4])  # [B, 3, G, H, W]
    states = _Lines(x, axes.line, taps.shape[1], segment).scan(source, ordered, int(axes.reverse))
    return _like(states, x)


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
    directions: str = "", segment: Optional[int] = None, impl: str = "", valid_size: Optional[INT64] = None,
) -> FLOAT:  # fmt: skip
    """:func:`gspn.propagate`, with the merge folded into the projections as the operator has it."""
    _refuse_sizes(valid_size)
    groups, proxy_channels, image, wide = tap_proj.shape[1], proxy.shape[1], _wide(x), _wide(proxy)

    def project(projection: Any) -> Any:
        return op.Conv(wide, op.Reshape(projection, _ints(-1, proxy_channels, 1, 1)))

    # The minus sign of softmax(log(sigmoid(a))) = softmax(-softplus(-a)) is in the projection of the taps.
    to_logits = op.Transpose(op.Neg(tap_proj), perm=[0, 2, 1, 3])  # [D, 3, G, S]
    unfolded = op.Concat(_ints(0, 3, groups), op.Shape(x, start=2), axis=0)
    never = op.Constant(value_float=-math.inf)
    scans = [scan_axes(name) for name in directions.split(",")]
    lines = {axis: _Lines(x, axis, groups, segment) for axis in {axes.line for axes in scans}}
    exists = {axis: _exists(x, axis) for axis in {axes.cross for axes in scans}}
    y = None if skip_proj is None else op.Mul(project(skip_proj), image)
    for d, axes in enumerate(scans):
        tap_d, lam_d, u_d = (op.Gather(one, op.Constant(value_int=d), axis=0) for one in (to_logits, lam_proj, u_proj))
        gates = op.Reshape(op.Neg(op.Softplus(project(tap_d))), unfolded)  # [B, 3, G, H, W]
        taps = op.Softmax(op.Where(exists[axes.cross], gates, never), axis=1)
        states = lines[axes.line].scan(op.Mul(project(lam_d), image), taps, int(axes.reverse))
        gated = op.Mul(project(u_d), states)
        y = gated if y is None else op.Add(y, gated)
    return _like(y, x)


TRANSLATIONS = {torch.ops.gspn.line_scan.default: line_scan, torch.ops.gspn.propagate.default: propagate}
"""The argument ``custom_translation_table`` of ``torch.onnx.export``."""
