"""The gradients of ``propagate``, of all pixels side by side.

Once both scans are known nothing is sequential any more. A program is one warp. It takes 16 channels, one direction
after the other, and with each of them a run of tiles of 16 pixels, so that the gradients of the projections, sums over
pixels, stay in its registers; that of the proxy, a sum over channels, is one in its tile. The maps are products of the
projections with the proxy, and both sums are products with the gradients of the maps. No sum is atomic: each program
writes its own, and the order of all additions is fixed.

**Layout.** Tensor cores hold a product ``[16, 16]`` with two neighbouring columns in a thread, and read a factor with
columns four apart. The proxy's pixels are therefore put in the order in which a product's columns become a factor's: a
thread holds the same channels and pixels from the load to the sum over pixels, and only what is summed over channels
moves. Images are loaded four columns at a time, by 8 x 4 threads: whether channels or pixels are the fastest axis, each
sector of memory that is read is used.

**Precision.** A float32 is the sum of two TF32 numbers, the nearest one and what is left. Three of the four products of
two such pairs are as exact as float32.

The prefixes of names are explained in :mod:`.addressing`. A line's neighbours are named by where they are on it:
before, here and after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import extent_within
from .taps import exp2, inverse, within_reach
from .tf32 import high, pair

# Triton before 3.8 takes no product that sums over fewer numbers than 16; tensor cores sum over 8.
_LEAST = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16)


@triton.jit
def _beside_zeros(b):
    """Each column beside a column of zeros, which adds nothing to a product."""
    return tl.reshape(tl.join(b, tl.zeros_like(b)), [b.shape[0], 2 * b.shape[1]])


@triton.jit
def _matmul(a, b, b_sum, PRECISION: tl.constexpr):
    """``b_sum`` plus the product of two matrices."""
    if a.shape[1] < _LEAST:
        return tl.dot(_beside_zeros(a), tl.trans(_beside_zeros(tl.trans(b))), b_sum, input_precision=PRECISION)
    else:
        return tl.dot(a, b, b_sum, input_precision=PRECISION)


@triton.jit
def _dot(a, b, b_sum, PTX: tl.constexpr):
    """``b_sum`` plus the product of two matrices, by tensor cores or as they compute it."""
    if PTX:
        return _matmul(a, b, b_sum, "tf32")
    else:
        return _matmul(high(a), high(b), b_sum, "ieee")


@triton.jit
def _add_product(b_sum, a, b, TF32: tl.constexpr, PTX: tl.constexpr):
    """``b_sum`` plus the product of two matrices that are pairs."""
    if TF32:
        b_sum = _dot(a[0], b[0], b_sum, PTX)
        b_sum = _dot(a[0], b[1], b_sum, PTX)
        return _dot(a[1], b[0], b_sum, PTX)
    else:
        return _matmul(a[0], b[0], b_sum, "ieee")


@triton.jit
def _fours(b):
    """``[.., 8]`` or ``[.., 16]`` to its two or four ``[.., 4]``, in order."""
    R: tl.constexpr = b.shape[0]
    if b.shape[1] == 8:
        return tl.split(tl.permute(tl.reshape(b, [R, 2, 4]), (0, 2, 1)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(b, [R, 2, 2, 4]), (0, 3, 1, 2)))
        b_0, b_2 = tl.split(even)
        b_1, b_3 = tl.split(odd)
        return b_0, b_1, b_2, b_3


@triton.jit
def _load_four(p, o, m):
    """A tile of four columns in float32; 0 where ``m`` is not."""
    b = tl.load(p + o, mask=m, other=0.0)
    if p.dtype.element_ty == tl.float32:
        return b
    else:
        # A sum of one number each: where the compiler sees that a factor was loaded from a half type, it arranges the
        # columns of the factor in pairs.
        return tl.sum(tl.expand_dims(b.to(tl.float32), 2), axis=2)


@triton.jit
def _load(p, o_row, o_column, m):
    """A tile in float32 from offsets of its rows ``[.., 1]`` and of its columns ``[1, ..]``; 0 where ``m`` is not."""
    C: tl.constexpr = o_column.shape[1]
    o, masks = _fours(o_column), _fours(m)
    b_0, b_1 = _load_four(p, o_row + o[0], masks[0]), _load_four(p, o_row + o[1], masks[1])
    if C == 8:
        b = tl.permute(tl.join(b_0, b_1), (0, 2, 1))
    else:
        b_2, b_3 = _load_four(p, o_row + o[2], masks[2]), _load_four(p, o_row + o[3], masks[3])
        b = tl.permute(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (0, 2, 3, 1))
    return tl.reshape(b, [o_row.shape[0], C])


@triton.jit
def _store(p, o_channel, o_pixel, b, m_channels, m):
    """Store what :func:`_load` would load."""
    o, masks, parts = _fours(o_pixel), _fours(m), _fours(b)
    for i in tl.static_range(4):
        tl.store(p + (o_channel + o[i]), parts[i].to(p.dtype.element_ty), mask=m_channels & masks[i])


@triton.jit
def _by_column(i):
    """The pixel whose proxy the column ``i`` of a product is made with."""
    return (i & 8) + (i & 1) * 4 + ((i >> 1) & 3)


@triton.jit
def _by_pixel(b):
    """A product with columns in the order of :func:`_by_column` to one by pixels."""
    return tl.reshape(tl.permute(tl.reshape(b, [16, 2, 4, 2]), (0, 1, 3, 2)), [16, 16])


@triton.jit
def _read_pair(p, R: tl.constexpr, C: tl.constexpr):
    """The two numbers of each element of ``[R, C, 2]``."""
    o = tl.arange(0, R)[:, None] * (2 * C) + tl.arange(0, 4)[None, :] * 2
    pair = ()
    for i in tl.static_range(2):
        b_0, b_1 = tl.load(p + (o + i)), tl.load(p + (o + (8 + i)))
        if C == 8:
            b = tl.permute(tl.join(b_0, b_1), (0, 2, 1))
        else:
            b_2, b_3 = tl.load(p + (o + (16 + i))), tl.load(p + (o + (24 + i)))
            b = tl.permute(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), (0, 2, 3, 1))
        pair = pair + (tl.reshape(b, [R, C]),)
    return pair


@triton.jit
def _map(
    p_factors, MAP: tl.constexpr, p_image, s_plane, n_left, S: tl.constexpr, TF32: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Map number MAP, ``[16, 16]``, at the pixels that a tile of the proxy begins with."""
    i, s = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, :]
    i_pixel = _by_column(i)
    b_map = tl.zeros([16, 16], tl.float32)
    for i_first in tl.static_range(0, S, 8):
        b_p = _load(p_image, i_pixel, (i_first + s) * s_plane, (i_first + s < S) & (i_pixel < n_left))
        factor = _read_pair(p_factors + (i_first // 8 * 6 + MAP) * 256, 16, 8)
        b_map = _add_product(b_map, factor, pair(tl.trans(b_p), TF32), TF32, PTX)
    return _by_pixel(b_map)


@triton.jit
def _add_gradient(b_sum, b_dproxy, b_d, p, p_weights, MAP: tl.constexpr, TF32: tl.constexpr, PTX: tl.constexpr):
    """Adds the gradient of map number MAP to that of its projection, ``[16, WIDTH]``, and to that of the proxy."""
    WIDTH: tl.constexpr = b_sum.shape[1]
    b_sum = _add_product(b_sum, pair(b_d, TF32), p, TF32, PTX)
    weight = _read_pair(p_weights + MAP * (32 * WIDTH), WIDTH, 16)
    weight = (tl.trans(weight[0]), tl.trans(weight[1]))
    return b_sum, _add_product(b_dproxy, pair(tl.trans(b_d), TF32), weight, TF32, PTX)


@triton.jit(do_not_specialize=["n_channels", "n_groups"])
def factors_kernel(
    p_taps, p_lam, p_u, p_skip, p_largest, p_factors, p_large, n_channels, n_groups,
    S: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Writes the projections as ``gradients_kernel`` reads them, for one direction and 16 channels.

    ``taps [D, G, 3, S]``, ``lam`` and ``u [D, C, S]``, ``skip [C, S]``. ``largest [>= S]``: the largest absolute value
    of each channel of the proxy; most logits are known to be small.
    ``factors [D, blocks, SIZE]``, of pairs and filled up with zeros: ``[S / 8, 6, 16, 8, 2]``, three taps times
    ``-log2(e)``, lam, u and skip; then ``[S / WIDTH, 6, WIDTH, 16, 2]``, the same with taps times two.
    ``large [D, blocks]``: how many logits may be large.
    """
    i_block, i_direction = tl.program_id(0), tl.program_id(1)
    c, s = tl.arange(0, 16)[:, None], tl.arange(0, 8)[None, :]
    i_channel = i_block.to(tl.int64) * 16 + c
    m_channels = i_channel < n_channels
    o_gates = (i_direction * n_channels.to(tl.int64) + i_channel) * S
    o_taps = (i_direction * n_groups + i_channel // (n_channels // n_groups)) * (3 * S)
    i_output = i_direction * tl.num_programs(0) + i_block
    p_factors += i_output.to(tl.int64) * SIZE
    b_bound = tl.zeros([16, 8], tl.float32)
    for i_first in tl.static_range(0, S, 8):
        i_s = i_first + s
        m = m_channels & (i_s < S)
        b_largest = tl.load(p_largest + i_s, mask=i_s < S, other=0.0)
        b_most = tl.zeros([16, 8], tl.float32)
        for k in tl.static_range(6):
            if k < 3:
                b_weight = tl.load(p_taps + (o_taps + (k * S + i_s)), mask=m, other=0.0)
                b_most = tl.maximum(b_most, tl.abs(b_weight), tl.PropagateNan.ALL)
                b_factor, b_weight = b_weight * -1.4426950408889634, b_weight * 2.0
            else:
                if k == 3:
                    b_weight = tl.load(p_lam + (o_gates + i_s), mask=m, other=0.0)
                elif k == 4:
                    b_weight = tl.load(p_u + (o_gates + i_s), mask=m, other=0.0)
                elif p_skip is None:
                    b_weight = tl.zeros([16, 8], tl.float32)
                else:
                    b_weight = tl.load(p_skip + (i_channel * S + i_s), mask=m, other=0.0)
                b_factor = b_weight
            factor, weight = pair(b_factor, TF32), pair(b_weight, TF32)
            p_factor = p_factors + (i_first // 8 * 6 + k) * 256
            o_weights = (S + 7) // 8 * 1536 + i_first // WIDTH * (192 * WIDTH) + i_first % WIDTH * 32
            p_weight = p_factors + (o_weights + k * (32 * WIDTH))
            for i in tl.static_range(2):
                tl.store(p_factor + (c * 16 + s * 2 + i), factor[i])
                tl.store(p_weight + (s * 32 + c * 2 + i), weight[i])
        b_bound += b_most * b_largest
    # A bound that is a NaN is not below 69, whose power of e is 2^100, either.
    tl.store(p_large + i_output, tl.sum(tl.where(tl.sum(b_bound, axis=1) < 69.0, 0, 1)))


@triton.jit
def _place(i_tile, n_image_tiles, n_rows, n_columns, n_pixels, NARROW: tl.constexpr, OFFSET: tl.constexpr):
    """Where a tile is: its batch entry, its first pixel, its rows and columns ``[1, 16]``, and which pixels exist.

    Beyond the last pixel are pixels of the last row.
    """
    i_batch = i_tile // n_image_tiles
    i_first = (i_tile - i_batch * n_image_tiles).to(OFFSET) * 16
    n = tl.arange(0, 16)[None, :]
    i_row = i_first // n_columns
    i_column = i_first - i_row * n_columns + n
    if NARROW:
        i_wraps = i_column // n_columns
    else:
        i_wraps = (i_column >= n_columns).to(OFFSET)
    i_row, i_column = tl.minimum(i_row + i_wraps, n_rows - 1), i_column - i_wraps * n_columns
    return i_batch.to(tl.int64), i_first, i_row, i_column, i_first + n < n_pixels


@triton.jit
def _in_image(p_sizes, i_batch, i_row, i_column):
    """Which pixels are those of an image, where images are smaller than their maps."""
    p_sizes += i_batch * 2
    return (i_row < tl.load(p_sizes)) & (i_column < tl.load(p_sizes + 1))


@triton.jit
def _add_to_proxy(p_image_sum, o_proxy, b_dproxy, m, m_summed):
    """Adds to the proxy's gradient what an earlier block of the program, or an earlier direction, has not begun."""
    b_dproxy += tl.load(p_image_sum + o_proxy, mask=m_summed, other=0.0)
    tl.store(p_image_sum + o_proxy, b_dproxy, mask=m)


@triton.jit(
    do_not_specialize=[
        "s_x_batch", "s_x_channel", "s_x_row", "s_x_column",
        "s_grad_batch", "s_grad_channel", "s_grad_row", "s_grad_column",
        "s_dx_batch", "s_dx_channel", "s_dx_row", "s_dx_column", "s_direction",
        "n_channels", "n_rows", "n_columns", "n_segment", "n_image_tiles", "n_tiles", "n_run",
        "n_span_blocks", "n_directions", "n_all", "i_first_direction", "i_axes",
    ]
)  # fmt: skip
def gradients_kernel(
    p_x, s_x_batch, s_x_channel, s_x_row, s_x_column,
    p_grad, s_grad_batch, s_grad_channel, s_grad_row, s_grad_column,
    p_dx, s_dx_batch, s_dx_channel, s_dx_row, s_dx_column,
    p_total, p_h, p_g, s_direction, p_proxy, p_dproxy, p_factors, p_large, p_sums, p_sizes,
    n_channels, n_rows, n_columns, n_segment, n_image_tiles, n_tiles, n_run, n_span_blocks,
    n_directions, n_all, i_first_direction, i_axes,
    OF_TAPS: tl.constexpr, UNIFORM: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, SEGMENTED: tl.constexpr,
    S: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, SKIP: tl.constexpr, TF32: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Adds ``n_directions`` of all ``n_all`` directions to ``dx`` and ``dproxy``, and writes their sums.

    That is for the gates, lam, u and skip; then, in another launch, OF_TAPS. Both at once would need too many
    registers.

    ``h``, ``g [n_directions, ..]`` are the states and adjoint states; they and ``total`` have the strides of ``dx``,
    and if UNIFORM so have ``x`` and ``grad``. ``total``, if there is one, is the sum until the last direction of all,
    which writes ``dx``. ``i_axes`` has two bits for each direction: its lines are columns, and it runs backwards.
    ``dproxy [spans, B, S, H, W]``: one for each ``n_span_blocks`` blocks of channels, the program's second number.
    ``factors`` and ``large`` are what :func:`factors_kernel` writes.
    ``sums [programs, ..]``: program by program the gradients of taps (of each channel three taps, one after the other),
    lam, u and skip, one after the other.
    ``sizes [B, 2]``: the height and width of each image, if they are smaller than their maps. Then neither ``dx`` nor
    ``total`` is written to in the padding, the states there may be anything, and the proxy is zero.
    The third number of a program is that of its WIDTH channels of the proxy: more would not leave registers for the
    rest.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    i_program, i_span, i_part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c, n = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    i_s = i_part * WIDTH + tl.arange(0, WIDTH)
    zero = tl.full([], 0, tl.int64)
    n_pixels = n_rows.to(OFFSET) * n_columns
    o_proxy = i_s[None, :] * n_pixels + c
    p_dproxy += i_span.to(tl.int64) * (n_tiles // n_image_tiles) * S * n_pixels
    n_gates = n_all.to(tl.int64) * n_channels * S
    p_sums += i_program * (5 * n_gates + n_channels * S if SKIP else 5 * n_gates)
    i_first_tile = i_program * n_run
    i_last_tile = tl.minimum(i_first_tile + n_run, n_tiles)

    i_first_block = i_span * n_span_blocks
    i_last_block = tl.minimum(i_first_block + n_span_blocks, tl.cdiv(n_channels, 16))
    for i_each in tl.range(0, n_directions * (i_last_block - i_first_block), num_stages=1):
        i_block, i_of_launch = i_first_block + i_each // n_directions, i_each % n_directions
        i_direction = i_first_direction + i_of_launch
        i_lowest = (zero + i_block) * 16
        # Beyond the last channel the last one is computed again, with factors of zero.
        i_channel = tl.minimum(c, n_channels - 1 - i_block * 16)
        o_dx, o_block = i_channel.to(OFFSET) * s_dx_channel, i_lowest * s_dx_channel
        i_factors = i_direction * tl.cdiv(n_channels, 16) + i_block
        p_block = p_factors + (zero + i_factors) * SIZE
        p_weights = p_block + ((S + 7) // 8 * 1536 + i_part * (192 * WIDTH))
        p_states, p_adjoint = p_h + (zero + i_of_launch) * s_direction, p_g + (zero + i_of_launch) * s_direction
        # An earlier block of the same program, or an earlier direction, has left a sum of the proxy's gradient.
        n_summed = S if OF_TAPS else tl.where((i_block > i_first_block) | (i_direction > 0), S, 0)
        i_gates = (i_direction * n_channels.to(tl.int64) + i_lowest) * S
        o_gates = i_channel * S + i_s[None, :]
        m_sums = (i_block * 16 + c < n_channels) & (i_s[None, :] < S)
        b_zero = tl.zeros([16, WIDTH], tl.float32)

        if not OF_TAPS:
            # Programs for other channels of the proxy compute the same dx.
            m_writes = c < tl.where(i_part == 0, n_channels - i_block * 16, 0)
            b_sum_lam, b_sum_u, b_sum_skip = b_zero, b_zero, b_zero
            for i_tile in tl.range(i_first_tile, i_last_tile, num_stages=1):
                i_batch, i_first, i_row, i_column, m_pixels = _place(
                    i_tile, n_image_tiles, n_rows, n_columns, n_pixels, NARROW, OFFSET
                )
                m_there = n >= 0
                if p_sizes is not None:
                    m_pixels = m_pixels & _in_image(p_sizes, i_batch, i_row, i_column)
                    m_there = m_pixels
                n_left = n_pixels - i_first
                p_image = p_proxy + (i_batch * S * n_pixels + i_first)
                b_p = _load(p_image, i_s[:, None] * n_pixels, n.to(OFFSET), (i_s[:, None] < S) & m_pixels)
                p = pair(tl.trans(b_p), TF32)
                b_dproxy = tl.zeros([16, WIDTH], tl.float32)

                o_image = i_batch * s_dx_batch + o_block
                o_pixel = i_row * s_dx_row + i_column * s_dx_column
                if UNIFORM:
                    b_x = _load(p_x + o_image, o_dx, o_pixel, m_there)
                    b_grad = _load(p_grad + o_image, o_dx, o_pixel, m_pixels)
                else:
                    b_x = _load(
                        p_x + (i_batch * s_x_batch + i_lowest * s_x_channel), i_channel.to(OFFSET) * s_x_channel,
                        i_row * s_x_row + i_column * s_x_column, m_there,
                    )  # fmt: skip
                    b_grad = _load(
                        p_grad + (i_batch * s_grad_batch + i_lowest * s_grad_channel),
                        i_channel.to(OFFSET) * s_grad_channel, i_row * s_grad_row + i_column * s_grad_column, m_pixels,
                    )  # fmt: skip
                b_h = _load(p_states + o_image, o_dx, o_pixel, m_there)
                b_sum_u, b_dproxy = _add_gradient(b_sum_u, b_dproxy, b_grad * b_h, p, p_weights, 4, TF32, PTX)
                b_dx = tl.zeros([16, 16], tl.float32)
                if i_direction == 0:  # noqa: SIM102 (only the other is known to the compiler)
                    if SKIP:
                        b_dx = _map(p_block, 5, p_image, n_pixels, n_left, S, TF32, PTX) * b_grad
                        b_sum_skip, b_dproxy = _add_gradient(
                            b_sum_skip, b_dproxy, b_grad * b_x, p, p_weights, 5, TF32, PTX
                        )
                b_g = _load(p_adjoint + o_image, o_dx, o_pixel, m_pixels)
                b_dx += _map(p_block, 3, p_image, n_pixels, n_left, S, TF32, PTX) * b_g
                b_sum_lam, b_dproxy = _add_gradient(b_sum_lam, b_dproxy, b_x * b_g, p, p_weights, 3, TF32, PTX)
                _add_to_proxy(
                    p_dproxy + (i_batch * S * n_pixels + i_first), o_proxy, b_dproxy,
                    (c < n_left) & (i_s[None, :] < S), (c < n_left) & (i_s[None, :] < n_summed),
                )  # fmt: skip

                m_so_far = n < tl.where(i_direction > 0, n_left, 0)
                if p_total is None:
                    b_dx += _load(p_dx + o_image, o_dx, o_pixel, m_so_far)
                    _store(p_dx + o_image, o_dx, o_pixel, b_dx, m_writes, m_pixels)
                else:
                    b_dx += _load(p_total + o_image, o_dx, o_pixel, m_so_far)
                    n_last = tl.where(i_direction == n_all - 1, n_left, 0)
                    m_total, m_last = n < n_left - n_last, n < n_last
                    if p_sizes is not None:
                        m_total, m_last = m_total & m_pixels, m_last & m_pixels
                    _store(p_total + o_image, o_dx, o_pixel, b_dx, m_writes, m_total)
                    _store(p_dx + o_image, o_dx, o_pixel, b_dx, m_writes, m_last)
            p_out = p_sums + (3 * n_gates + i_gates)
            tl.store(p_out + o_gates, b_sum_lam, mask=m_sums)
            tl.store(p_out + n_gates + o_gates, b_sum_u, mask=m_sums)
            if SKIP:
                m_first = m_sums & (i_s[None, :] < tl.where(i_direction == 0, S, 0))
                tl.store(p_sums + (5 * n_gates + i_lowest * S) + o_gates, b_sum_skip, mask=m_first)
        else:
            i_axis = i_axes >> 2 * i_of_launch
            horizontal, reverse = i_axis & 1 != 0, i_axis & 2 != 0
            s_line = tl.where(horizontal, s_dx_column, s_dx_row).to(OFFSET)
            s_cross = tl.where(horizontal, s_dx_row, s_dx_column).to(OFFSET)
            i_lines = horizontal.to(tl.int32)
            n_all_lines = tl.where(horizontal, n_columns, n_rows)
            n_all_cross = tl.where(horizontal, n_rows, n_columns)
            n_lines, n_cross = n_all_lines, n_all_cross
            p_previous = p_states + (o_block + tl.where(reverse, s_line, -s_line))
            large = tl.load(p_large + i_factors) > 0
            b_sum_before, b_sum_here, b_sum_after = b_zero, b_zero, b_zero
            for i_tile in tl.range(i_first_tile, i_last_tile, num_stages=1):
                i_batch, i_first, i_row, i_column, m_pixels = _place(
                    i_tile, n_image_tiles, n_rows, n_columns, n_pixels, NARROW, OFFSET
                )
                if p_sizes is not None:
                    m_pixels = m_pixels & _in_image(p_sizes, i_batch, i_row, i_column)
                    n_lines = extent_within(p_sizes + (i_batch * 2 + i_lines), n_all_lines)
                    n_cross = extent_within(p_sizes + (i_batch * 2 + 1 - i_lines), n_all_cross)
                n_left = n_pixels - i_first
                i_line, i_cross = tl.where(horizontal, i_column, i_row), tl.where(horizontal, i_row, i_column)
                i_step = tl.where(reverse, n_lines - 1 - i_line, i_line)
                m_carries = i_step % n_segment != 0 if SEGMENTED else i_step != 0
                if p_sizes is not None:
                    m_carries = m_carries & m_pixels
                m_has_before, m_has_after = i_cross > 0, i_cross < n_cross - 1

                p_image = p_proxy + (i_batch * S * n_pixels + i_first)
                b_before = _map(p_block, 0, p_image, n_pixels, n_left, S, TF32, PTX)
                b_here = _map(p_block, 1, p_image, n_pixels, n_left, S, TF32, PTX)
                b_after = _map(p_block, 2, p_image, n_pixels, n_left, S, TF32, PTX)
                if large:
                    b_before = tl.where(m_has_before, b_before, float("inf"))
                    b_after = tl.where(m_has_after, b_after, float("inf"))
                    b_before, b_here, b_after = within_reach((b_before, b_here, b_after), i_cross, n_cross, 1)
                    b_before, b_after = tl.minimum(b_before, 120.0), tl.minimum(b_after, 120.0)

                # sigmoid(-a) = 2^t sigmoid(a), where t = -a log2(e).
                b_before, b_here, b_after = exp2(b_before, PTX), exp2(b_here, PTX), exp2(b_after, PTX)
                b_w_before = tl.where(m_has_before, inverse(1.0 + b_before, PTX), 0.0)
                b_w_here = inverse(1.0 + b_here, PTX)
                b_w_after = tl.where(m_has_after, inverse(1.0 + b_after, PTX), 0.0)
                b_inverse = inverse(b_w_before + b_w_here + b_w_after, PTX)
                b_before, b_here, b_after = b_before * b_w_before, b_here * b_w_here, b_after * b_w_after
                b_w_before, b_w_here, b_w_after = b_w_before * b_inverse, b_w_here * b_inverse, b_w_after * b_inverse

                # Differences of states first: where they are alike, nothing large cancels. Half of them, since the
                # difference of two large states may overflow; weights are doubled for it.
                o_image = i_batch * s_dx_batch
                o_pixel = i_row * s_dx_row + i_column * s_dx_column
                b_h_before = 0.5 * _load(p_previous + (o_image - s_cross), o_dx, o_pixel, m_carries & m_has_before)
                b_h_here = 0.5 * _load(p_previous + o_image, o_dx, o_pixel, m_carries)
                b_h_after = 0.5 * _load(p_previous + (o_image + s_cross), o_dx, o_pixel, m_carries & m_has_after)
                b_mean = b_w_before * b_h_before + b_w_here * b_h_here + b_w_after * b_h_after
                b_g = _load(p_adjoint + (o_image + o_block), o_dx, o_pixel, m_carries & m_pixels)
                b_before = b_before * b_w_before * (b_h_before - b_mean) * b_g
                b_here = b_here * b_w_here * (b_h_here - b_mean) * b_g
                b_after = b_after * b_w_after * (b_h_after - b_mean) * b_g

                b_p = _load(p_image, i_s[:, None] * n_pixels, n.to(OFFSET), (i_s[:, None] < S) & m_pixels)
                p = pair(tl.trans(b_p), TF32)
                b_dproxy = tl.zeros([16, WIDTH], tl.float32)
                b_sum_before, b_dproxy = _add_gradient(b_sum_before, b_dproxy, b_before, p, p_weights, 0, TF32, PTX)
                b_sum_here, b_dproxy = _add_gradient(b_sum_here, b_dproxy, b_here, p, p_weights, 1, TF32, PTX)
                b_sum_after, b_dproxy = _add_gradient(b_sum_after, b_dproxy, b_after, p, p_weights, 2, TF32, PTX)
                _add_to_proxy(
                    p_dproxy + (i_batch * S * n_pixels + i_first), o_proxy, b_dproxy,
                    (c < n_left) & (i_s[None, :] < S), (c < n_left) & (i_s[None, :] < n_summed),
                )  # fmt: skip
            o_taps = i_channel * (3 * S) + i_s[None, :]
            tl.store(p_sums + 3 * i_gates + o_taps, 2.0 * b_sum_before, mask=m_sums)
            tl.store(p_sums + (3 * i_gates + S) + o_taps, 2.0 * b_sum_here, mask=m_sums)
            tl.store(p_sums + (3 * i_gates + 2 * S) + o_taps, 2.0 * b_sum_after, mask=m_sums)
        # The next direction adds to what other threads may have stored.
        tl.debug_barrier()
