"""The gradients of ``propagate``, of all pixels side by side.

Once both scans are known nothing is sequential any more. A program takes a block of channels and every so many tiles of
pixels, so that the gradients of the projections, sums over all pixels, are sums in its registers; that of the proxy, a
sum over all channels, is one in its tile. Both are products of small matrices, in three products of TF32 numbers, which
is as exact as float32. No sum is atomic: each program writes its own, and the order of all additions is fixed.

The prefixes of names are explained in :mod:`.addressing`. A line's neighbours are named by where they are on it:
before, here and after.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, i_s, S: tl.constexpr):
    """The weights of proxy channel ``i_s`` for each map: three taps, the gates before and after the scan, the skip."""
    b_before = tl.load(p_taps + o_taps + i_s, mask=m_taps, other=0.0)
    b_here = tl.load(p_taps + o_taps + S + i_s, mask=m_taps, other=0.0)
    b_after = tl.load(p_taps + o_taps + 2 * S + i_s, mask=m_taps, other=0.0)
    b_gate = tl.load(p_gate + o_gates + i_s, mask=m_channels, other=0.0)
    b_out_gate, b_skip = b_gate, b_gate
    if p_out_gate is not None:
        b_out_gate = tl.load(p_out_gate + o_gates + i_s, mask=m_channels, other=0.0)
    if p_skip is not None:
        b_skip = tl.load(p_skip + o_gates + i_s, mask=m_channels, other=0.0)
    return b_before, b_here, b_after, b_gate, b_out_gate, b_skip


@triton.jit
def _maps(
    p_pixels, s_plane, m_pixels, weights, p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels,
    S: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The maps ``[C, N]`` (taps ``[1, N]`` where shared) at pixels whose proxy begins at ``p_pixels [1, N]``.

    With UNROLL ``weights`` are a tuple of six for each channel of the proxy; else they are loaded again.
    """
    b_before = tl.zeros([o_taps.shape[0], p_pixels.shape[1]], tl.float32)
    b_here, b_after = b_before, b_before
    b_gate = tl.zeros([o_gates.shape[0], p_pixels.shape[1]], tl.float32)
    b_out_gate, b_skip = b_gate, b_gate
    if UNROLL:
        for s in tl.static_range(S):
            b_p = tl.load(p_pixels + s * s_plane, mask=m_pixels, other=0.0).to(tl.float32)
            b_before += weights[6 * s] * b_p
            b_here += weights[6 * s + 1] * b_p
            b_after += weights[6 * s + 2] * b_p
            b_gate += weights[6 * s + 3] * b_p
            if p_out_gate is not None:
                b_out_gate += weights[6 * s + 4] * b_p
            if p_skip is not None:
                b_skip += weights[6 * s + 5] * b_p
    else:
        for s in tl.range(0, S):
            b_p = tl.load(p_pixels + s * s_plane, mask=m_pixels, other=0.0).to(tl.float32)
            w = _weights(p_taps, p_gate, p_out_gate, p_skip, o_taps, o_gates, m_taps, m_channels, s, S)
            b_before += w[0] * b_p
            b_here += w[1] * b_p
            b_after += w[2] * b_p
            b_gate += w[3] * b_p
            if p_out_gate is not None:
                b_out_gate += w[4] * b_p
            if p_skip is not None:
                b_skip += w[5] * b_p
    return b_before, b_here, b_after, b_gate, b_out_gate, b_skip


@triton.jit
def _stochastic(b_before, b_here, b_after, m_has_left, m_has_right):
    """Logits to sigmoids that sum to one over the neighbours that exist; 0 for the others.

    ``sigmoid(a) = exp(min(a, 0)) / (1 + exp(-|a|))``, and what is largest under the exponentials of the numerators is
    taken out of all three: finite for logits of any size, and equal where all of them are ``-inf``.
    """
    LOWEST: tl.constexpr = -3.4028234663852886e38
    b_low_before = tl.where(m_has_left, tl.maximum(tl.minimum(b_before, 0.0), LOWEST), float("-inf"))
    b_low_here = tl.maximum(tl.minimum(b_here, 0.0), LOWEST)
    b_low_after = tl.where(m_has_right, tl.maximum(tl.minimum(b_after, 0.0), LOWEST), float("-inf"))
    b_largest = tl.maximum(b_low_here, tl.maximum(b_low_before, b_low_after))
    # Over a common denominator, whose factors are between 1 and 2: one division for all.
    b_of_before = tl.where(m_has_left, 1.0 + tl.exp(-tl.abs(b_before)), 1.0)
    b_of_here = 1.0 + tl.exp(-tl.abs(b_here))
    b_of_after = tl.where(m_has_right, 1.0 + tl.exp(-tl.abs(b_after)), 1.0)
    b_before = tl.exp(b_low_before - b_largest) * b_of_here * b_of_after
    b_here = tl.exp(b_low_here - b_largest) * b_of_before * b_of_after
    b_after = tl.exp(b_low_after - b_largest) * b_of_before * b_of_here
    b_inverse = 1.0 / (b_before + b_here + b_after)
    return b_before * b_inverse, b_here * b_inverse, b_after * b_inverse


@triton.jit
def _pixels(i_channel, i_flat, i_row, i_column, s_channel, s_row, s_column):
    """Offsets of pixels. ``s_channel`` None: channels are contiguous; ``s_row`` None: the pixels of a channel are."""
    o_channel = i_channel if s_channel is None else i_channel * s_channel
    o_pixel = i_flat if s_row is None else i_row * s_row + i_column * s_column
    return o_channel + o_pixel


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
def _logit_gradient(b_logit, b_tap, b_half_difference, b_g):
    """``sigmoid(-logit) tap difference g``."""
    b_small = tl.exp(-tl.abs(b_logit))
    return tl.where(b_logit >= 0, b_small, 1.0) / (0.5 + 0.5 * b_small) * b_tap * b_half_difference * b_g


@triton.jit(
    do_not_specialize=[
        "s_x_batch", "s_x_channel", "s_x_row", "s_x_column",
        "s_grad_batch", "s_grad_channel", "s_grad_row", "s_grad_column",
        "s_dx_batch", "s_dx_channel", "s_dx_row", "s_dx_column",
        "n_channels", "n_per_group", "n_rows", "n_columns", "n_segment", "n_image_tiles", "n_tiles", "n_span_blocks",
    ]
)  # fmt: skip
def gradients_kernel(
    p_x, s_x_batch, s_x_channel, s_x_row, s_x_column,
    p_grad, s_grad_batch, s_grad_channel, s_grad_row, s_grad_column,
    p_dx, s_dx_batch, s_dx_channel, s_dx_row, s_dx_column,
    p_h, p_g, p_before, p_proxy, p_dproxy, p_taps, p_gate, p_skip, p_packed, p_sums,
    n_channels, n_per_group, n_rows, n_columns, n_segment, n_image_tiles, n_tiles, n_span_blocks,
    WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, VERTICAL: tl.constexpr, REVERSE: tl.constexpr,
    S: tl.constexpr, ADD_PROXY: tl.constexpr,
):  # fmt: skip
    """Adds one direction to ``dx`` and ``dproxy``, and writes its sums for the projections.

    ``h``, ``g``, ``before`` and ``dx`` have one set of strides; ``before``, if there is one, is added to ``dx``.
    ``dproxy [spans, B, S, H, W]``: one for each ``n_span_blocks`` blocks of channels, the program's second number.
    ``packed [5 or 6, C, S]``: the projections, three taps for each channel, both gates and, if there is one, the skip.
    ``sums [programs, 5 or 6, C, S]``: their gradients, program by program.
    The third number of a program is that of its 16 channels of the proxy: more would not leave registers for the rest.
    """
    MAPS: tl.constexpr = 5 if p_skip is None else 6
    i_program, i_span = tl.program_id(0), tl.program_id(1)
    n_programs = tl.num_programs(0)
    c, n = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    r = tl.arange(0, 8 * BLOCK_C)[:, None]
    i_first = tl.program_id(2) * 16
    i_s_row, i_s_column = i_first + tl.arange(0, 16)[None, :], i_first + tl.arange(0, 16)[:, None]
    m_s = i_s_column < S
    s_plane = n_rows.to(tl.int64) * n_columns
    p_dproxy += i_span.to(tl.int64) * (n_tiles // n_image_tiles) * S * s_plane
    p_sums += i_program.to(tl.int64) * MAPS * n_channels * S
    o_proxy = i_s_column * s_plane
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    n_cross = n_columns if VERTICAL else n_rows
    n_lines = n_rows if VERTICAL else n_columns
    if s_dx_row is None:
        s_line = n_columns.to(tl.int64) if VERTICAL else tl.full([], 1, tl.int64)
        s_cross = tl.full([], 1, tl.int64) if VERTICAL else n_columns.to(tl.int64)
    else:
        s_line = s_dx_row.to(tl.int64) if VERTICAL else s_dx_column.to(tl.int64)
        s_cross = s_dx_column.to(tl.int64) if VERTICAL else s_dx_row.to(tl.int64)
    o_previous = s_line if REVERSE else -s_line

    i_last_block = tl.minimum((i_span + 1) * n_span_blocks, tl.cdiv(n_channels, BLOCK_C))
    for i_block in tl.range(i_span * n_span_blocks, i_last_block, num_stages=1):
        i_channel = i_block * BLOCK_C + c
        m_channels = i_channel < n_channels
        i_channel64 = i_channel.to(tl.int64)
        o_gates = i_channel * S
        o_taps = i_channel // n_per_group * (3 * S)
        # All maps of the block, one after the other, are the rows of one small matrix.
        i_row_channel = i_block * BLOCK_C + r % BLOCK_C
        o_packed = (r // BLOCK_C * n_channels + i_row_channel) * S + i_s_row
        m_packed = (i_row_channel < n_channels) & (i_s_row < S) & (r < MAPS * BLOCK_C)
        b_packed = tl.load(p_packed + o_packed, mask=m_packed, other=0.0)
        b_sums = tl.zeros([8 * BLOCK_C, 16], tl.float32)

        for i_tile in tl.range(i_program, n_tiles, n_programs, num_stages=1):
            i_batch = (i_tile // n_image_tiles).to(tl.int64)
            i_pixel = (i_tile % n_image_tiles).to(OFFSET) * BLOCK_N + n
            m_pixels = i_pixel < s_plane
            i_row, i_column = (i_pixel // n_columns).to(tl.int64), (i_pixel % n_columns).to(tl.int64)
            i_flat = i_pixel.to(tl.int64)
            m = m_channels & m_pixels
            # Programs for other channels of the proxy compute the same pixels.
            m_writes = n < tl.where(i_first == 0, BLOCK_N, 0)
            i_line = i_row if VERTICAL else i_column
            i_cross = i_column if VERTICAL else i_row
            i_step = n_lines - 1 - i_line if REVERSE else i_line
            m_carries = m & (i_step % n_segment != 0)
            m_has_left, m_has_right = i_cross > 0, i_cross < n_cross - 1

            o_x = i_batch * s_x_batch + _pixels(i_channel64, i_flat, i_row, i_column, s_x_channel, s_x_row, s_x_column)
            b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
            o_grad = i_batch * s_grad_batch + _pixels(
                i_channel64, i_flat, i_row, i_column, s_grad_channel, s_grad_row, s_grad_column
            )
            b_grad = tl.load(p_grad + o_grad, mask=m, other=0.0).to(tl.float32)
            o_dx = i_batch * s_dx_batch + _pixels(
                i_channel64, i_flat, i_row, i_column, s_dx_channel, s_dx_row, s_dx_column
            )
            b_h = tl.load(p_h + o_dx, mask=m, other=0.0)
            b_g = tl.load(p_g + o_dx, mask=m, other=0.0)
            b_h_before = tl.load(p_h + o_dx + (o_previous - s_cross), mask=m_carries & m_has_left, other=0.0)
            b_h_here = tl.load(p_h + o_dx + o_previous, mask=m_carries, other=0.0)
            b_h_after = tl.load(p_h + o_dx + (o_previous + s_cross), mask=m_carries & m_has_right, other=0.0)

            p_pixels = p_proxy + i_batch * S * s_plane + i_flat
            b_a_before, b_a_here, b_a_after, b_gate, _, b_skip = _maps(
                p_pixels, s_plane, m_pixels, (), p_taps, p_gate, None, p_skip,
                o_taps, o_gates, m_channels, m_channels, S, False,
            )  # fmt: skip
            b_before, b_here, b_after = _stochastic(b_a_before, b_a_here, b_a_after, m_has_left, m_has_right)

            b_dx = b_gate * b_g
            if p_skip is not None:
                b_dx += b_skip * b_grad
            if p_before is not None:
                b_dx += tl.load(p_before + o_dx, mask=m & m_writes, other=0.0).to(tl.float32)
            tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m & m_writes)

            # Differences of states first: where they are alike, nothing large cancels. Half of them, since the
            # difference of two large states may overflow.
            b_half_mean = 0.5 * (b_before * b_h_before + b_here * b_h_here + b_after * b_h_after)
            b_carried = tl.where(m_carries, b_g, 0.0)
            b_d_before = _logit_gradient(b_a_before, b_before, 0.5 * b_h_before - b_half_mean, b_carried)
            b_d_here = _logit_gradient(b_a_here, b_here, 0.5 * b_h_here - b_half_mean, b_carried)
            b_d_after = _logit_gradient(b_a_after, b_after, 0.5 * b_h_after - b_half_mean, b_carried)
            b_d_gate = b_x * b_g
            b_d_skip = tl.zeros_like(b_d_gate)
            if p_skip is not None:
                b_d_skip = b_grad * b_x
            b_d = _rows_of_eight(b_d_before, b_d_here, b_d_after, b_d_gate, b_grad * b_h, b_d_skip)

            b_p = tl.load(p_pixels + o_proxy, mask=m_s & m_pixels, other=0.0)
            b_sums = tl.dot(b_d, tl.trans(b_p.to(tl.float32)), b_sums, input_precision="tf32x3")
            b_dproxy = tl.trans(tl.dot(tl.trans(b_d), b_packed, input_precision="tf32x3"))
            # An earlier block of the same program, or an earlier direction, has left the sum so far.
            n_summed = tl.where(i_block > i_span * n_span_blocks, S, S if ADD_PROXY else 0)
            p_so_far = p_dproxy + i_batch * S * s_plane + i_flat + o_proxy
            b_dproxy += tl.load(p_so_far, mask=(i_s_column < n_summed) & m_s & m_pixels, other=0.0)
            tl.store(p_so_far, b_dproxy, mask=m_s & m_pixels)

        tl.store(p_sums + o_packed, b_sums, mask=m_packed)
        # The next block adds to what other threads may have stored.
        tl.debug_barrier()
