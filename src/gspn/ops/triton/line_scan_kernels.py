"""The scan and its adjoint, each in one launch: a program for some channels and a run of lines.

The prefixes of names, tiles and views are explained in :mod:`.addressing`; the constexpr arguments are what
:mod:`.planner` chooses. A line's neighbours are named by where they are on it: before, here and after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import (
    in_elements,
    integers,
    load_lines,
    load_state,
    move,
    share,
    share_of_image,
    states,
    store_lines,
    store_state,
    tap,
    tile,
    view,
)  # fmt: skip
from .neighbour_shuffle import neighbour_pairs, neighbours


@triton.jit(do_not_specialize=integers("x", "taps", "lam", "h"))
def forward_kernel(
    p_x, s_x_batch, s_x_channel, s_x_cross, s_x_line,
    p_taps, s_taps_batch, s_taps_channel, s_taps_cross, s_taps_line, s_taps_tap,
    p_lam, s_lam_batch, s_lam_channel, s_lam_cross, s_lam_line,
    p_h, s_h_batch, s_h_channel, s_h_cross, s_h_line,
    p_states, p_sizes, n_groups, n_channels, n_cross, n_lines, n_run, n_runs, n_segment,
    FAST: tl.constexpr, ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, UNIFORM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``h``, for ``n_run`` lines a program and ``n_channels`` of each of ``n_groups`` groups, or of all if it is None.

    Taps are SHARED by the channels of a group. ``sizes [B, 2]``: the lines and the cross extent of each image, if they
    are smaller than their maps. The padding of the map is not written to.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    HAS_LAM: tl.constexpr = p_lam is not None
    n_channels, n_cross, n_lines, n_run = in_elements(n_channels, n_cross, n_lines, n_run, FAST, ALIGN)
    if UNIFORM:
        # Registers that hold offsets are dear: where all images agree in their strides, they share them.
        s_lam_channel, s_lam_cross, s_lam_line = s_x_channel, s_x_cross, s_x_line
    mine = share(tl.cdiv(n_channels, BLOCK_C), n_groups, n_lines, n_run, n_runs, REVERSE)
    n_row = n_cross
    if p_sizes is not None:
        mine, n_lines, n_cross = share_of_image(mine, p_sizes, 0, n_lines, n_cross, n_run, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t, g = tl.arange(0, LINES)[None, None, :], tl.arange(0, GROUP)[None, None, :]
    m_channels = mine.i_block * BLOCK_C + c < n_channels
    i_channel = mine.i_group * n_channels + mine.i_block * BLOCK_C
    i_tap_channel = mine.i_group if SHARED else i_channel
    o_c, o_n, o_t, o_g = c.to(OFFSET), n.to(OFFSET), t.to(OFFSET), g.to(OFFSET)
    o_tap_c = tl.arange(0, 1)[:, None, None].to(OFFSET) if SHARED else o_c
    o_read, o_stored, o_taps = (o_c, o_n, o_t), (o_c, o_n, o_g), (o_tap_c, o_n, o_t)
    x = view(p_x, mine.i_batch, i_channel, o_read, (s_x_batch, s_x_channel, s_x_cross, s_x_line), ALIGN)
    h = view(p_h, mine.i_batch, i_channel, o_stored, (s_h_batch, s_h_channel, s_h_cross, s_h_line), ALIGN)
    s_taps = (s_taps_batch, s_taps_channel, s_taps_cross, s_taps_line)
    taps = view(p_taps, mine.i_batch, i_tap_channel, o_taps, s_taps, TAPS_ALIGN)
    s_taps_tap = s_taps_tap.to(tl.int64) * TAPS_ALIGN
    lam = x
    if HAS_LAM:
        lam = view(p_lam, mine.i_batch, i_channel, o_read, (s_lam_batch, s_lam_channel, s_lam_cross, s_lam_line), ALIGN)

    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_kept = (mine.i_block * BLOCK_C + channel < n_channels) & (cross >= HALO) & (cross < BLOCK_N - HALO)
    b_state = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    n_visits = tl.cdiv(n_cross, BLOCK_N - 2 * HALO) * TILES if HALO > 0 else TILES
    if HALO > 0:
        between = states(p_states, channel, cross, n_row, BLOCK_C, FAST)
    n_rounds = tl.cdiv(mine.i_high - mine.i_low, TILES * LINES)

    for i_round in tl.range(0, n_rounds, num_stages=STAGES):
        for i_visit in tl.range(0, n_visits, num_stages=STAGES):
            i_step, i_line, i_first = tile(
                i_round, i_visit, n_rounds, mine, n_lines, BLOCK_N, HALO, LINES, TILES, False, REVERSE
            )
            i_cross = i_first + cross
            m_has_left, m_has_right = i_cross > 0, i_cross < n_cross - 1
            m_taps = (i_first + n >= 0) & (i_first + n < n_cross)
            m = m_channels & m_taps
            if not SHARED:
                m_taps = m
            m_owned = m & (n >= HALO) & (n < BLOCK_N - HALO)
            if MAY_OVERRUN:
                m = m & (i_line + t >= mine.i_low) & (i_line + t < mine.i_high)
                m_taps = m_taps & (i_line + t >= mine.i_low) & (i_line + t < mine.i_high)
            b_x = load_lines(move(x, i_line, i_first), m, LINES, REVERSE)
            b_lam = b_x
            if HAS_LAM:
                b_lam = load_lines(move(lam, i_line, i_first), m, LINES, REVERSE)
            w = move(taps, i_line, i_first)
            b_before = load_lines(w, m_taps, LINES, REVERSE)
            b_here = load_lines(tap(w, s_taps_tap, 1), m_taps, LINES, REVERSE)
            b_after = load_lines(tap(w, s_taps_tap, 2), m_taps, LINES, REVERSE)
            if HALO > 0:
                b_state = load_state(b_state, between, i_round, i_visit, i_first, i_cross, n_row, BLOCK_C, TILES, FAST)
            h_tile = move(h, i_line, i_first)
            i_phase = i_step % n_segment if SEGMENTED else i_step
            # GROUP lines are stored together, as wide as one thread's store: no state waits in a register for others.
            for i_group in tl.static_range(LINES // GROUP):
                b_states = ()
                for i in tl.static_range(i_group * GROUP, i_group * GROUP + GROUP):
                    # Products with neighbours that do not exist are left out by a select, never multiplied by zero:
                    # the tap concerned may hold anything, NaN included.
                    b_left, b_right = neighbours(b_state, b_state, VECTOR)
                    b_carried = b_here[i].to(tl.float32) * b_state
                    b_carried += tl.where(m_has_left, b_before[i].to(tl.float32) * b_left, 0.0)
                    b_carried += tl.where(m_has_right, b_after[i].to(tl.float32) * b_right, 0.0)
                    b_carried = tl.where(i_phase != 0, b_carried, 0.0)
                    i_phase += 1
                    if SEGMENTED:
                        i_phase = tl.where(i_phase == n_segment, 0, i_phase)
                    b_state = b_x[i].to(tl.float32)
                    if HAS_LAM:
                        b_state *= b_lam[i].to(tl.float32)
                    b_state += b_carried
                    b_states = b_states + (b_state,)
                i_stored = LINES - GROUP - i_group * GROUP if REVERSE else i_group * GROUP
                m_stored = m_owned
                if MAY_OVERRUN:
                    i_stored_line = i_line + i_stored + g
                    m_stored = m_owned & (i_stored_line >= mine.i_low) & (i_stored_line < mine.i_high)
                store_lines(h_tile, i_stored, b_states, m_stored, GROUP, REVERSE)
            if HALO > 0:
                store_state(b_state, between, i_round, i_visit, i_first, i_cross, n_row, m_kept, BLOCK_C, TILES, FAST)
        if HALO > 0:
            # The next round's states come from other threads.
            tl.debug_barrier()


@triton.jit(do_not_specialize=[*integers("grad", "h", "x", "taps", "lam", "dx", "dtaps", "dlam"), "s_dtaps_block"])
def backward_kernel(
    p_grad, s_grad_batch, s_grad_channel, s_grad_cross, s_grad_line,
    p_h, s_h_batch, s_h_channel, s_h_cross, s_h_line,
    p_x, s_x_batch, s_x_channel, s_x_cross, s_x_line,
    p_taps, s_taps_batch, s_taps_channel, s_taps_cross, s_taps_line, s_taps_tap,
    p_lam, s_lam_batch, s_lam_channel, s_lam_cross, s_lam_line,
    p_dx, s_dx_batch, s_dx_channel, s_dx_cross, s_dx_line,
    p_dtaps, s_dtaps_batch, s_dtaps_channel, s_dtaps_cross, s_dtaps_line, s_dtaps_tap, s_dtaps_block,
    p_dlam, s_dlam_batch, s_dlam_channel, s_dlam_cross, s_dlam_line,
    p_states, p_sizes, n_groups, n_channels, n_cross, n_lines, n_run, n_runs, n_segment,
    FAST: tl.constexpr, ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, UNIFORM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dx``, and ``dtaps`` and ``dlam`` where they are not None, by the adjoint scan; the work is shared as forward.

    With SHARED taps each channel block leaves its own sum over its channels, ``s_dtaps_block`` from the last.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    HAS_LAM: tl.constexpr = p_lam is not None
    NEED_TAPS: tl.constexpr = p_dtaps is not None
    NEED_LAM: tl.constexpr = p_dlam is not None
    n_channels, n_cross, n_lines, n_run = in_elements(n_channels, n_cross, n_lines, n_run, FAST, ALIGN)
    if UNIFORM:
        s_h_channel, s_h_cross, s_h_line = s_grad_channel, s_grad_cross, s_grad_line
        s_x_channel, s_x_cross, s_x_line = s_grad_channel, s_grad_cross, s_grad_line
        s_lam_channel, s_lam_cross, s_lam_line = s_grad_channel, s_grad_cross, s_grad_line
        s_dlam_channel, s_dlam_cross, s_dlam_line = s_dx_channel, s_dx_cross, s_dx_line
    mine = share(tl.cdiv(n_channels, BLOCK_C), n_groups, n_lines, n_run, n_runs, REVERSE)
    n_row = n_cross
    if p_sizes is not None:
        mine, n_lines, n_cross = share_of_image(mine, p_sizes, 0, n_lines, n_cross, n_run, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t, g = tl.arange(0, LINES)[None, None, :], tl.arange(0, GROUP)[None, None, :]
    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_channels, m_rows = mine.i_block * BLOCK_C + c < n_channels, mine.i_block * BLOCK_C + channel < n_channels
    i_batch, i_channel = mine.i_batch, mine.i_group * n_channels + mine.i_block * BLOCK_C
    i_tap_channel = mine.i_group if SHARED else i_channel
    o_c, o_n, o_t, o_g = c.to(OFFSET), n.to(OFFSET), t.to(OFFSET), g.to(OFFSET)
    o_tap_c = tl.arange(0, 1)[:, None, None].to(OFFSET) if SHARED else o_c

    o_read, o_stored = (o_c, o_n, o_t), (o_c, o_n, o_g)
    o_taps, o_dtaps = (o_tap_c, o_n, o_t), (o_tap_c, o_n, o_g)

    grad = view(p_grad, i_batch, i_channel, o_read, (s_grad_batch, s_grad_channel, s_grad_cross, s_grad_line), ALIGN)
    s_taps = (s_taps_batch, s_taps_channel, s_taps_cross, s_taps_line)
    taps = view(p_taps, i_batch, i_tap_channel, o_taps, s_taps, TAPS_ALIGN)
    s_taps_tap = s_taps_tap.to(tl.int64) * TAPS_ALIGN
    dx = view(p_dx, i_batch, i_channel, o_stored, (s_dx_batch, s_dx_channel, s_dx_cross, s_dx_line), ALIGN)
    lam, x, h, edge, dlam, dtaps = grad, grad, grad, grad, dx, dx
    if HAS_LAM:
        lam = view(p_lam, i_batch, i_channel, o_read, (s_lam_batch, s_lam_channel, s_lam_cross, s_lam_line), ALIGN)
    if NEED_LAM:
        x = view(p_x, i_batch, i_channel, o_read, (s_x_batch, s_x_channel, s_x_cross, s_x_line), ALIGN)
        dlam = view(
            p_dlam, i_batch, i_channel, o_stored, (s_dlam_batch, s_dlam_channel, s_dlam_cross, s_dlam_line), ALIGN
        )
    if NEED_TAPS:
        s_h = (s_h_batch, s_h_channel, s_h_cross, s_h_line)
        h = view(p_h, i_batch, i_channel, o_read, s_h, ALIGN)
        edge = view(p_h, i_batch, i_channel, (channel.to(OFFSET), cross.to(OFFSET), 0), s_h, ALIGN)
        p_dtaps += mine.i_block.to(tl.int64) * s_dtaps_block * TAPS_ALIGN
        s_dtaps = (s_dtaps_batch, s_dtaps_channel, s_dtaps_cross, s_dtaps_line)
        s_dtaps_tap = s_dtaps_tap.to(tl.int64) * TAPS_ALIGN
        dtaps = view(p_dtaps, i_batch, i_tap_channel, o_dtaps, s_dtaps, TAPS_ALIGN)

    m_kept = m_rows & (cross >= HALO) & (cross < BLOCK_N - HALO)
    b_carried = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    n_visits = tl.cdiv(n_cross, BLOCK_N - 2 * HALO) * TILES if HALO > 0 else TILES
    if HALO > 0:
        between = states(p_states, channel, cross, n_row, BLOCK_C, FAST)
    n_rounds = tl.cdiv(mine.i_high - mine.i_low, TILES * LINES)

    for i_round in tl.range(0, n_rounds, num_stages=STAGES):
        for i_visit in tl.range(0, n_visits, num_stages=STAGES):
            i_step, i_line, i_first = tile(
                i_round, i_visit, n_rounds, mine, n_lines, BLOCK_N, HALO, LINES, TILES, True, REVERSE
            )
            i_cross = i_first + cross
            m_has_left, m_has_right = i_cross > 0, i_cross < n_cross - 1
            m_taps = (i_first + n >= 0) & (i_first + n < n_cross)
            m = m_channels & m_taps
            if not SHARED:
                m_taps = m
            m_middle = (n >= HALO) & (n < BLOCK_N - HALO)
            m_owned, m_taps_owned = m & m_middle, m_taps & m_middle
            m_pixels = m_rows & (i_cross >= 0) & (i_cross < n_cross)
            i_previous = i_line + 1 if REVERSE else i_line - 1
            m_previous = m & (i_previous + t >= mine.i_low) & (i_previous + t < mine.i_high)
            if MAY_OVERRUN:
                m = m & (i_line + t >= mine.i_low) & (i_line + t < mine.i_high)
                m_taps = m_taps & (i_line + t >= mine.i_low) & (i_line + t < mine.i_high)
            b_grad = load_lines(move(grad, i_line, i_first), m, LINES, REVERSE)
            b_x, b_lam, b_previous = b_grad, b_grad, b_grad
            if HAS_LAM:
                b_lam = load_lines(move(lam, i_line, i_first), m, LINES, REVERSE)
            if NEED_LAM:
                b_x = load_lines(move(x, i_line, i_first), m, LINES, REVERSE)
            if NEED_TAPS:
                if FAST == 2:
                    # A tile shifted by one line would not be aligned: the tile's own states, and the line beside it.
                    b_previous = load_lines(move(h, i_line, i_first), m, LINES, REVERSE)
                    n_reached = tl.where(i_step > 0, tl.where(i_step <= mine.i_high - mine.i_low, n_cross, 0), 0)
                    m_edge = m_rows & (i_cross >= 0) & (i_cross < n_reached)
                    beside = move(edge, i_line + LINES if REVERSE else i_line - 1, i_first)
                    b_edge = tl.load(beside.p + beside.o, mask=m_edge, other=0.0)
                    # Any value does for the first line of all. Reading the last line keeps the tile's loads whole.
                    b_edge = tl.where(i_step > 0, b_edge, b_previous[LINES - 1])
                    b_previous = (b_edge,) + b_previous[0 : LINES - 1]
                else:
                    b_previous = load_lines(move(h, i_previous, i_first), m_previous, LINES, REVERSE)
            w = move(taps, i_line, i_first)
            b_before = load_lines(w, m_taps, LINES, REVERSE)
            b_here = load_lines(tap(w, s_taps_tap, 1), m_taps, LINES, REVERSE)
            b_after = load_lines(tap(w, s_taps_tap, 2), m_taps, LINES, REVERSE)
            if HALO > 0:
                b_carried = load_state(
                    b_carried, between, i_round, i_visit, i_first, i_cross, n_row, BLOCK_C, TILES, FAST
                )
            dx_tile, dlam_tile = move(dx, i_line, i_first), move(dlam, i_line, i_first)
            dw = move(dtaps, i_line, i_first)
            # ``b_carried`` is what the line scanned next sends; ``b_previous`` the states of the lines scanned before.
            i_phase = (i_step + LINES - 1) % n_segment if SEGMENTED else i_step + LINES - 1
            for i_group in tl.static_range(LINES // GROUP):
                b_dx, b_dlam, b_dbefore, b_dhere, b_dafter = (), (), (), (), ()
                for k in tl.static_range(i_group * GROUP, i_group * GROUP + GROUP):
                    b_g = b_grad[LINES - 1 - k].to(tl.float32) + b_carried
                    if SHARED:
                        # A channel beyond the last has no part in the sum of its group, even if a tap is infinite.
                        b_g = tl.where(m_pixels, b_g, 0.0)
                    b_dx_line = b_g
                    if HAS_LAM:
                        b_dx_line = b_lam[LINES - 1 - k].to(tl.float32) * b_g
                    b_dx = (b_dx_line,) + b_dx
                    if NEED_LAM:
                        b_dlam = (b_x[LINES - 1 - k].to(tl.float32) * b_g,) + b_dlam
                    m_follows = i_phase != 0
                    if SEGMENTED:
                        i_phase = tl.where(m_follows, i_phase, n_segment)
                    i_phase -= 1
                    b_to_left = b_before[LINES - 1 - k].to(tl.float32) * b_g
                    b_to_right = b_after[LINES - 1 - k].to(tl.float32) * b_g
                    if NEED_TAPS:
                        b_h = b_previous[LINES - 1 - k].to(tl.float32)
                        b_from_left, b_from_right, b_h_left, b_h_right = neighbour_pairs(
                            b_to_right, b_to_left, b_h, VECTOR
                        )
                        b_dbefore = (tl.where(m_has_left, tl.where(m_follows, b_g * b_h_left, 0.0), 0.0),) + b_dbefore
                        b_dhere = (tl.where(m_follows, b_g * b_h, 0.0),) + b_dhere
                        b_dafter = (tl.where(m_has_right, tl.where(m_follows, b_g * b_h_right, 0.0), 0.0),) + b_dafter
                    else:
                        b_from_left, b_from_right = neighbours(b_to_right, b_to_left, VECTOR)
                    b_carried = b_here[LINES - 1 - k].to(tl.float32) * b_g
                    b_carried += tl.where(m_has_left, b_from_left, 0.0)
                    b_carried += tl.where(m_has_right, b_from_right, 0.0)
                    b_carried = tl.where(m_follows, b_carried, 0.0)
                i_stored = i_group * GROUP if REVERSE else LINES - GROUP - i_group * GROUP
                m_stored, m_taps_stored = m_owned, m_taps_owned
                if MAY_OVERRUN:
                    i_stored_line = i_line + i_stored + g
                    m_stored = m_stored & (i_stored_line >= mine.i_low) & (i_stored_line < mine.i_high)
                    m_taps_stored = m_taps_stored & (i_stored_line >= mine.i_low) & (i_stored_line < mine.i_high)
                store_lines(dx_tile, i_stored, b_dx, m_stored, GROUP, REVERSE)
                if NEED_LAM:
                    store_lines(dlam_tile, i_stored, b_dlam, m_stored, GROUP, REVERSE)
                if NEED_TAPS:
                    store_lines(dw, i_stored, b_dbefore, m_taps_stored, GROUP, REVERSE, SHARED)
                    store_lines(tap(dw, s_dtaps_tap, 1), i_stored, b_dhere, m_taps_stored, GROUP, REVERSE, SHARED)
                    store_lines(tap(dw, s_dtaps_tap, 2), i_stored, b_dafter, m_taps_stored, GROUP, REVERSE, SHARED)
            if HALO > 0:
                store_state(b_carried, between, i_round, i_visit, i_first, i_cross, n_row, m_kept, BLOCK_C, TILES, FAST)
        if HALO > 0:
            # The next round's states come from other threads.
            tl.debug_barrier()
