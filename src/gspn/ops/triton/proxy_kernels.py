"""The proxy as the scans of ``propagate`` read it: a kernel that packs it for both axes at once.

The prefixes of names are explained in :mod:`.addressing`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tf32 import pair


@triton.jit
def _pack(
    p_proxy, o_channel, s_cross, s_line, p_packed, i_image, i_four, n_cross, n_lines, n_chunks, m_channel,
    FOURS: tl.constexpr, PIXELS: tl.constexpr, PITCH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack a program's pixels for one axis; returns them, missing ones as zeros."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    i_chunk, i_row = i % n_chunks, i // n_chunks  # a row of chunks: those of a pixel of a line
    i_line, i_pixel = (i_row // PIXELS).to(tl.int64), i_row % PIXELS
    i_cross = i_chunk * PIXELS + i_pixel
    m = i_line < n_lines
    o = o_channel + i_line * s_line + i_cross.to(tl.int64) * s_cross
    b = tl.load(p_proxy + o, mask=m & m_channel & (i_cross < n_cross), other=0.0).to(tl.float32)
    i = tl.arange(0, 4)[None, :]
    if PARTS == 0:
        o_row = ((i_image * n_lines + i_line) * PIXELS + i_pixel) * FOURS + i_four
        tl.store(p_packed + (o_row * PITCH + i_chunk) * 4 + i, b, mask=m)
    else:
        o = (((i_image * n_lines + i_line) * PITCH + i_chunk) * 4 + i) * PARTS + i_four
        b_high, b_low = pair(b, PARTS > FOURS)
        tl.store(p_packed + o, b_high, mask=m)
        if PARTS > FOURS:
            tl.store(p_packed + o + PARTS // 2, b_low, mask=m)
    return b


@triton.jit(
    do_not_specialize=[
        "s_batch", "s_channel", "s_row", "s_column", "n_height", "n_width", "n_row_chunks", "n_column_chunks"
    ]
)  # fmt: skip
def pack_kernel(
    p_proxy, s_batch, s_channel, s_row, s_column, p_rows, p_columns, p_largest,
    n_height, n_width, n_row_chunks, n_column_chunks,
    S: tl.constexpr, ROW_PIXELS: tl.constexpr, ROW_PITCH: tl.constexpr, ROW_PARTS: tl.constexpr,
    COLUMN_PIXELS: tl.constexpr, COLUMN_PITCH: tl.constexpr, COLUMN_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rows``, and ``columns`` for lines along the width, or either: float32 ``[B, lines, PIXELS, FOURS, PITCH, 4]``.

    A row is cut into chunks of PIXELS pixels, the last one filled up with zeros; chunks up to PITCH are room. For
    tensor cores, with PARTS, it is ``[B, lines, PITCH, 4, PARTS]``: a pixel and a channel of four, and of each four the
    number or, first of all fours and then of all, the two TF32 numbers whose sum it is.
    ``largest [4 FOURS]``, if it is there, has zeros and gets the largest absolute value of each channel. It is found by
    the bits, which for positive floats are in their order and for a NaN above all: any order of programs will do.
    """
    FOURS: tl.constexpr = (S + 3) // 4
    i_image, i_four = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_channel = i_four * 4 + tl.arange(0, 4)[None, :]
    m_channel = i_channel < S
    p_proxy += i_image * s_batch
    o_channel = i_channel.to(tl.int64) * s_channel
    if p_columns is not None:
        b = _pack(
            p_proxy, o_channel, s_row, s_column, p_columns, i_image, i_four, n_height, n_width, n_column_chunks,
            m_channel, FOURS, COLUMN_PIXELS, COLUMN_PITCH, COLUMN_PARTS, BLOCK,
        )  # fmt: skip
    if p_rows is not None:
        b = _pack(
            p_proxy, o_channel, s_column, s_row, p_rows, i_image, i_four, n_width, n_height, n_row_chunks,
            m_channel, FOURS, ROW_PIXELS, ROW_PITCH, ROW_PARTS, BLOCK,
        )  # fmt: skip
    if p_largest is not None:
        i_bits = tl.max(b.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
        p_bits = p_largest.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_max(p_bits + i_four * 4 + tl.arange(0, 4), i_bits, sem="relaxed")
