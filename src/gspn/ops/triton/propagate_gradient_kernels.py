"""The gradients of ``propagate`` from the states and the adjoint states of one direction, every pixel by itself.

Once both scans are known nothing is sequential any more. A program takes a block of channels and every so many tiles
of pixels, so that the gradients of the projections, sums over all pixels, are sums in its registers; that of the proxy,
a sum over all channels, is one in its tile. Both are products of small matrices, in three products of TF32 numbers,
which is as exact as float32. No sum is atomic: programs leave theirs apart, and the order of all additions is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .propagate_kernels import line_maps, stochastic


@triton.jit
def _pixels(channel, flat, row, column, channel_stride, row_stride, column_stride, FAST: tl.constexpr):
    """Offsets of pixels. FAST 0: channels are contiguous; 1: the pixels of a channel are; 3: neither."""
    at_channel = channel if FAST == 0 else channel * channel_stride
    at_pixel = flat if FAST == 1 else row * row_stride + column * column_stride
    return at_channel + at_pixel


@triton.jit
def _rows_of_eight(a, b, c, d, e, f):
    """``[C, N]`` each to ``[8 C, N]``, the last two of eight zero."""
    C: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    zero = tl.zeros_like(a)
    # Joined along the last axes, the first of them the halves of the eight.
    low = tl.join(tl.join(a, c), tl.join(b, d))
    high = tl.join(tl.join(e, zero), tl.join(f, zero))
    return tl.reshape(tl.permute(tl.join(low, high), (4, 2, 3, 0, 1)), [8 * C, N])


@triton.jit
def _logit_gradient(a, w, difference, g):
    """``sigmoid(-a) w difference g``."""
    small = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, small, 1.0) / (1.0 + small) * w * difference * g


@triton.jit(
    do_not_specialize=[
        "x_batch", "x_channel", "x_row", "x_column", "grad_batch", "grad_channel", "grad_row", "grad_column",
        "out_batch", "out_channel", "out_row", "out_column",
        "channels", "tap_channels", "height", "width", "segment", "image_tiles", "tiles", "span_blocks",
    ]
)  # fmt: skip
def gradients_kernel(
    x_ptr, grad_ptr, h_ptr, g_ptr, before_ptr, dx_ptr, proxy_ptr, dproxy_ptr, tap_ptr, gate_ptr, skip_ptr,
    packed_ptr, sums_ptr,
    x_batch, x_channel, x_row, x_column,
    grad_batch, grad_channel, grad_row, grad_column,
    out_batch, out_channel, out_row, out_column,
    channels, tap_channels, height, width, segment, image_tiles, tiles, span_blocks,
    X_FAST: tl.constexpr, GRAD_FAST: tl.constexpr, OUT_FAST: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr, REVERSE: tl.constexpr,
    S: tl.constexpr,
    HAS_SKIP: tl.constexpr, ADD_DX: tl.constexpr, ADD_PROXY: tl.constexpr,
):  # fmt: skip
    """Adds one direction to ``dx`` and ``dproxy``, and leaves its sums for the projections.

    ``h``, ``g``, ``before`` and ``dx`` have one set of strides, and with ADD_DX ``before`` is added to ``dx``.
    ``dproxy [spans, B, S, H, W]``: one for each ``span_blocks`` blocks of channels, the program's second number.
    ``packed [5 or 6, C, S]``: the projections, three taps for each channel, both gates and, if there is one, the skip.
    ``sums [programs, 5 or 6, C, S]``: their gradients, program by program.
    The third number of a program is that of its 16 channels of the proxy: more would not leave registers for the rest.
    """
    MAPS: tl.constexpr = 6 if HAS_SKIP else 5
    pid, span = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    c, n = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m = tl.arange(0, 8 * BLOCK_C)[:, None]
    first = tl.program_id(2) * 16
    s_row, s_column = first + tl.arange(0, 16)[None, :], first + tl.arange(0, 16)[:, None]
    s_exists = s_column < S
    plane = height.to(tl.int64) * width
    dproxy_ptr += span.to(tl.int64) * (tiles // image_tiles) * S * plane
    sums_ptr += pid.to(tl.int64) * MAPS * channels * S
    proxy_at = s_column * plane
    PLACES: tl.constexpr = tl.int64 if WIDE else tl.int32
    cross = width if VERTICAL else height
    lines = height if VERTICAL else width
    step_line = out_row.to(tl.int64) if VERTICAL else out_column.to(tl.int64)
    step_cross = out_column.to(tl.int64) if VERTICAL else out_row.to(tl.int64)
    if OUT_FAST == 1:
        step_line = width.to(tl.int64) if VERTICAL else tl.full([], 1, tl.int64)
        step_cross = tl.full([], 1, tl.int64) if VERTICAL else width.to(tl.int64)
    previous = step_line if REVERSE else -step_line

    last_block = tl.minimum((span + 1) * span_blocks, tl.cdiv(channels, BLOCK_C))
    for block in tl.range(span * span_blocks, last_block, num_stages=1):
        channel = block * BLOCK_C + c
        exists = channel < channels
        c64 = channel.to(tl.int64)
        at = channel * S
        tap_at = channel // tap_channels * (3 * S)
        # All maps of the block, one after the other, are the rows of one small matrix.
        row_channel = block * BLOCK_C + m % BLOCK_C
        packed_at = (m // BLOCK_C * channels + row_channel) * S + s_row
        packed_exists = (row_channel < channels) & (s_row < S) & (m < MAPS * BLOCK_C)
        packed = tl.load(packed_ptr + packed_at, mask=packed_exists, other=0.0)
        sums = tl.zeros([8 * BLOCK_C, 16], tl.float32)

        for tile in tl.range(pid, tiles, programs, num_stages=1):
            batch = (tile // image_tiles).to(tl.int64)
            place = (tile % image_tiles).to(PLACES) * BLOCK_N + n
            pixel_exists = place < plane
            row, column, flat = (place // width).to(tl.int64), (place % width).to(tl.int64), place.to(tl.int64)
            inside = exists & pixel_exists
            # Programs for other channels of the proxy come upon the same pixels.
            writes = n < tl.where(first == 0, BLOCK_N, 0)
            line = row if VERTICAL else column
            position = column if VERTICAL else row
            step = lines - 1 - line if REVERSE else line
            carries = inside & (step % segment != 0)
            has_left, has_right = position > 0, position < cross - 1

            x_at = batch * x_batch + _pixels(c64, flat, row, column, x_channel, x_row, x_column, X_FAST)
            x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
            grad_at = batch * grad_batch + _pixels(
                c64, flat, row, column, grad_channel, grad_row, grad_column, GRAD_FAST
            )
            grad = tl.load(grad_ptr + grad_at, mask=inside, other=0.0).to(tl.float32)
            out_at = batch * out_batch + _pixels(c64, flat, row, column, out_channel, out_row, out_column, OUT_FAST)
            h = tl.load(h_ptr + out_at, mask=inside, other=0.0)
            g = tl.load(g_ptr + out_at, mask=inside, other=0.0)
            h_before = tl.load(h_ptr + out_at + (previous - step_cross), mask=carries & has_left, other=0.0)
            h_here = tl.load(h_ptr + out_at + previous, mask=carries, other=0.0)
            h_after = tl.load(h_ptr + out_at + (previous + step_cross), mask=carries & has_right, other=0.0)

            rows_ptr = proxy_ptr + batch * S * plane + flat
            a_before, a_here, a_after, gate, _, skip = line_maps(
                rows_ptr, plane, pixel_exists, (), tap_ptr, gate_ptr, gate_ptr, skip_ptr,
                tap_at, at, exists, exists, S, False, False, HAS_SKIP,
            )  # fmt: skip
            w_before, w_here, w_after = stochastic(a_before, a_here, a_after, has_left, has_right)

            dx = gate * g
            if HAS_SKIP:
                dx += skip * grad
            if ADD_DX:
                dx += tl.load(before_ptr + out_at, mask=inside & writes, other=0.0).to(tl.float32)
            tl.store(dx_ptr + out_at, dx.to(dx_ptr.dtype.element_ty), mask=inside & writes)

            # Differences of states first: where they are alike, nothing large cancels.
            mean = w_before * h_before + w_here * h_here + w_after * h_after
            carried = tl.where(carries, g, 0.0)
            d_before = _logit_gradient(a_before, w_before, h_before - mean, carried)
            d_here = _logit_gradient(a_here, w_here, h_here - mean, carried)
            d_after = _logit_gradient(a_after, w_after, h_after - mean, carried)
            d_gate = x * g
            d_out_gate = grad * h
            d_skip = tl.zeros_like(d_gate)
            if HAS_SKIP:
                d_skip = grad * x

            d = _rows_of_eight(d_before, d_here, d_after, d_gate, d_out_gate, d_skip)
            p = tl.load(proxy_ptr + batch * S * plane + flat + proxy_at, mask=s_exists & pixel_exists, other=0.0)
            sums = tl.dot(d, tl.trans(p.to(tl.float32)), sums, input_precision="tf32x3")
            dproxy = tl.trans(tl.dot(tl.trans(d), packed, input_precision="tf32x3"))
            # An earlier block of the same program, or an earlier direction, has left the sum so far.
            reach = tl.where(block > span * span_blocks, S, S if ADD_PROXY else 0)
            so_far_ptr = dproxy_ptr + batch * S * plane + flat + proxy_at
            dproxy += tl.load(so_far_ptr, mask=(s_column < reach) & s_exists & pixel_exists, other=0.0)
            tl.store(so_far_ptr, dproxy, mask=s_exists & pixel_exists)

        tl.store(sums_ptr + packed_at, sums, mask=packed_exists)
        # The next block adds to what other threads may have stored.
        tl.debug_barrier()
