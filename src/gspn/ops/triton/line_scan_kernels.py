"""The scan in one launch, a program for some channels and a run of lines, the state in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import place, scan_tile


@triton.jit
def forward(
    x_ptr, taps_ptr, lam_ptr, h_ptr,
    x_batch, x_channel, x_cross, x_line,
    taps_batch, taps_group, taps_tap, taps_cross, taps_line,
    lam_batch, lam_channel, lam_cross, lam_line,
    h_batch, h_channel, h_cross, h_line,
    groups, channels, cross_size, lines, chunk, chunks, segment,
    ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, FAST: tl.constexpr,
    X_FAST: tl.constexpr, TAPS_FAST: tl.constexpr, LAM_FAST: tl.constexpr, H_FAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    SHARED: tl.constexpr, REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, HAS_LAM: tl.constexpr,
    STAGES: tl.constexpr,
):
    if FAST == 0:
        channels *= ALIGN
    elif FAST == 1:
        cross_size *= ALIGN
    else:
        lines *= ALIGN
        chunk *= ALIGN
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    block = program % blocks
    program //= blocks
    run = program % chunks
    program //= chunks
    group = (program % groups).to(tl.int64)
    batch = (program // groups).to(tl.int64)

    first = run * chunk
    count = tl.minimum(chunk, lines - first)
    low = lines - first - count if REVERSE else first
    high = low + count
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None, None]
    n = tl.arange(0, BLOCK_N)[None, :, None]
    t = tl.arange(0, LINES)[None, None, :]
    inside = (c < channels) & (n < cross_size)
    cross = tl.arange(0, BLOCK_N)[None, :]
    has_left = cross > 0
    has_right = cross < cross_size - 1

    c = c.to(tl.int64)
    n = n.to(tl.int64)
    x_ptr += batch * x_batch * ALIGN + place(group * channels, 0, 0, x_channel, x_cross, x_line, X_FAST, ALIGN)
    taps_ptr += batch * taps_batch * TAPS_ALIGN + group * taps_group * TAPS_ALIGN
    x_at = place(c, n, t, x_channel, x_cross, x_line, X_FAST, ALIGN)
    h_ptr += batch * h_batch * ALIGN + place(group * channels, 0, 0, h_channel, h_cross, h_line, H_FAST, ALIGN)
    h_at = place(c, n, tl.arange(0, GROUP)[None, None, :], h_channel, h_cross, h_line, H_FAST, ALIGN)
    if SHARED:
        taps_at = place(0, n, t, taps_group, taps_cross, taps_line, TAPS_FAST, TAPS_ALIGN)
        taps_inside = n < cross_size
    else:
        taps_at = place(c, n, t, taps_group, taps_cross, taps_line, TAPS_FAST, TAPS_ALIGN)
        taps_inside = inside
    if HAS_LAM:
        lam_ptr += batch * lam_batch * ALIGN + place(group * channels, 0, 0, lam_channel, lam_cross, lam_line, LAM_FAST, ALIGN)
        lam_at = place(c, n, t, lam_channel, lam_cross, lam_line, LAM_FAST, ALIGN)
    tap_stride = taps_tap.to(tl.int64) * TAPS_ALIGN

    state = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    phase = 0
    for k in tl.range(0, tl.cdiv(count, LINES), num_stages=STAGES):
        step = k * LINES
        line = lines - first - step - LINES if REVERSE else first + step
        here = inside
        taps_here = taps_inside
        if LINES > 1:
            here = inside & (line + t >= low) & (line + t < high)
            taps_here = taps_inside & (line + t >= low) & (line + t < high)
        line64 = line.to(tl.int64)
        x_now = x_ptr + place(0, 0, line64, x_channel, x_cross, x_line, X_FAST, ALIGN)
        x = tl.load(x_now + x_at, mask=here, other=0.0)
        lam = x
        if HAS_LAM:
            lam_now = lam_ptr + place(0, 0, line64, lam_channel, lam_cross, lam_line, LAM_FAST, ALIGN)
            lam = tl.load(lam_now + lam_at, mask=here, other=0.0)
        taps_now = taps_ptr + place(0, 0, line64, taps_group, taps_cross, taps_line, TAPS_FAST, TAPS_ALIGN)
        before = tl.load(taps_now + taps_at, mask=taps_here, other=0.0)
        middle = tl.load(taps_now + tap_stride + taps_at, mask=taps_here, other=0.0)
        after = tl.load(taps_now + 2 * tap_stride + taps_at, mask=taps_here, other=0.0)
        h_now = h_ptr + place(0, 0, line64, h_channel, h_cross, h_line, H_FAST, ALIGN)
        state, phase = scan_tile(
            x, lam, before, middle, after,
            h_now, h_at, place(0, 0, 1, 0, 0, h_line, H_FAST, ALIGN), inside, line, low, high,
            state, step, phase, segment, has_left, has_right,
            LINES, GROUP, VECTOR, REVERSE, SEGMENTED, HAS_LAM,
        )  # fmt: skip
