"""The scan and its adjoint, each in one launch: a program for some channels and a run of lines.

Shapes and strides are run-time arguments that never specialise a kernel; what the compiler must know are the constexpr
arguments, which :mod:`.line_scan_config` chooses. Sizes along the axis FAST and all strides count ALIGN elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import anchor, integers, load_lines, locate, place, store_lines, stride
from .neighbour_shuffle import neighbour_pairs, neighbours


@triton.jit
def _scan_tile(
    xs, lams, befores, heres, afters, state, h_ptr, h_at, h_line,
    owned, has_left, has_right, line, low, high, step, segment,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, MAY_OVERRUN: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, HAS_LAM: tl.constexpr,
):  # fmt: skip
    """Advance the scan by a tile whose first scanned line is number ``step``; stores its states, returns the last.

    Lines are stored in groups of GROUP, as wide as one thread's store, so that no state waits in a register for the
    others. Products with neighbours that do not exist are left out by a select, never multiplied by zero: the tap
    concerned may hold anything, NaN included.
    """
    g = tl.arange(0, GROUP)[None, None, :]
    phase = step
    if SEGMENTED:
        phase = step % segment
    for group in tl.static_range(LINES // GROUP):
        scanned = ()
        for i in tl.static_range(group * GROUP, group * GROUP + GROUP):
            left, right = neighbours(state, state, VECTOR)
            carried = heres[i].to(tl.float32) * state
            carried += tl.where(has_left, befores[i].to(tl.float32) * left, 0.0)
            carried += tl.where(has_right, afters[i].to(tl.float32) * right, 0.0)
            carried = tl.where(phase != 0, carried, 0.0)
            phase += 1
            if SEGMENTED:
                phase = tl.where(phase == segment, 0, phase)
            state = xs[i].to(tl.float32)
            if HAS_LAM:
                state *= lams[i].to(tl.float32)
            state += carried
            scanned = scanned + (state,)
        first = LINES - GROUP - group * GROUP if REVERSE else group * GROUP
        mask = owned
        if MAY_OVERRUN:
            mask = owned & (line + first + g >= low) & (line + first + g < high)
        store_lines(h_ptr + first * h_line, h_at, scanned, mask, GROUP, REVERSE)
    return state


@triton.jit(do_not_specialize=integers("x", "taps", "lam", "h"))
def forward_kernel(
    x_ptr, taps_ptr, lam_ptr, h_ptr, states_ptr,
    x_batch, x_channel, x_cross, x_line,
    taps_batch, taps_channel, taps_cross, taps_line, taps_tap,
    lam_batch, lam_channel, lam_cross, lam_line,
    h_batch, h_channel, h_cross, h_line,
    groups, channels, width, lines, chunk, chunks, segment,
    X_FAST: tl.constexpr, TAPS_FAST: tl.constexpr, LAM_FAST: tl.constexpr, H_FAST: tl.constexpr,
    FAST: tl.constexpr, ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, UNIFORM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr, HAS_LAM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``h`` for ``channels`` of each group (one group of all unless taps are SHARED), ``chunk`` lines a program.

    With HALO 0 a row is one block and the state stays in registers. Else the program takes HALO lines of one block of
    the row after the other. The blocks overlap by HALO on each side, where each line leaves one more pixel out of date,
    and only what they own is stored; the states after those lines wait in ``states_ptr [programs, 2, BLOCK_C, width]``
    (FAST 0: channels last) for the next lines.
    """
    PLACES: tl.constexpr = tl.int64 if WIDE else tl.int32
    if FAST == 0:
        channels *= ALIGN
    elif FAST == 1:
        width *= ALIGN
    else:
        lines *= ALIGN
        chunk *= ALIGN
    block, group, batch, start, low, high = locate(tl.cdiv(channels, BLOCK_C), groups, lines, chunk, chunks, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t, g = tl.arange(0, LINES)[None, None, :], tl.arange(0, GROUP)[None, None, :]
    exists = block * BLOCK_C + c < channels
    first_channel = group * channels + block * BLOCK_C
    tap_channel = group if SHARED else first_channel
    tap_c = tl.arange(0, 1)[:, None, None] if SHARED else c

    x_ptr = anchor(x_ptr, batch, first_channel, x_batch, x_channel, X_FAST, ALIGN)
    x_at = place(c.to(PLACES), n.to(PLACES), t.to(PLACES), x_channel, x_cross, x_line, X_FAST, ALIGN)
    x_line, x_cross = stride(x_line, 2, X_FAST, ALIGN), stride(x_cross, 1, X_FAST, ALIGN)
    h_ptr = anchor(h_ptr, batch, first_channel, h_batch, h_channel, H_FAST, ALIGN)
    h_at = place(c.to(PLACES), n.to(PLACES), g.to(PLACES), h_channel, h_cross, h_line, H_FAST, ALIGN)
    h_line, h_cross = stride(h_line, 2, H_FAST, ALIGN), stride(h_cross, 1, H_FAST, ALIGN)
    taps_ptr = anchor(taps_ptr, batch, tap_channel, taps_batch, taps_channel, TAPS_FAST, TAPS_ALIGN)
    taps_at = place(
        tap_c.to(PLACES), n.to(PLACES), t.to(PLACES), taps_channel, taps_cross, taps_line, TAPS_FAST, TAPS_ALIGN
    )
    taps_line, taps_cross = stride(taps_line, 2, TAPS_FAST, TAPS_ALIGN), stride(taps_cross, 1, TAPS_FAST, TAPS_ALIGN)
    taps_tap = taps_tap.to(tl.int64) * TAPS_ALIGN
    lam_at = x_at
    if HAS_LAM:
        lam_ptr = anchor(lam_ptr, batch, first_channel, lam_batch, lam_channel, LAM_FAST, ALIGN)
        if not UNIFORM:
            lam_at = place(c.to(PLACES), n.to(PLACES), t.to(PLACES), lam_channel, lam_cross, lam_line, LAM_FAST, ALIGN)
        lam_line, lam_cross = stride(lam_line, 2, LAM_FAST, ALIGN), stride(lam_cross, 1, LAM_FAST, ALIGN)

    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    held = (block * BLOCK_C + channel < channels) & (cross >= HALO) & (cross < BLOCK_N - HALO)
    state = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    visits = TILES
    if HALO > 0:
        visits = tl.cdiv(width, BLOCK_N - 2 * HALO) * TILES
        states_ptr += tl.program_id(0).to(tl.int64) * 2 * BLOCK_C * width
        state_at = cross * BLOCK_C + channel if FAST == 0 else channel * width + cross

    for k in tl.range(0, tl.cdiv(high - low, TILES * LINES), num_stages=STAGES):
        for visit in tl.range(0, visits, num_stages=STAGES):
            step = (k * TILES + visit % TILES) * LINES
            line = lines - start - step - LINES if REVERSE else start + step
            line64 = line.to(tl.int64)
            shift = visit // TILES * (BLOCK_N - 2 * HALO) - HALO
            shift64 = shift.to(tl.int64)
            taps_inside = (shift + n >= 0) & (shift + n < width)
            inside = exists & taps_inside
            if not SHARED:
                taps_inside = inside
            owned = inside & (n >= HALO) & (n < BLOCK_N - HALO)
            if MAY_OVERRUN:
                inside = inside & (line + t >= low) & (line + t < high)
                taps_inside = taps_inside & (line + t >= low) & (line + t < high)
            xs = load_lines(x_ptr + line64 * x_line + shift64 * x_cross, x_at, inside, LINES, REVERSE)
            lams = xs
            if HAS_LAM:
                lams = load_lines(lam_ptr + line64 * lam_line + shift64 * lam_cross, lam_at, inside, LINES, REVERSE)
            taps = taps_ptr + line64 * taps_line + shift64 * taps_cross
            befores = load_lines(taps, taps_at, taps_inside, LINES, REVERSE)
            heres = load_lines(taps + taps_tap, taps_at, taps_inside, LINES, REVERSE)
            afters = load_lines(taps + 2 * taps_tap, taps_at, taps_inside, LINES, REVERSE)
            if HALO > 0:
                arrives = visit % TILES == 0
                reach = tl.where(arrives, tl.where(k > 0, width, 0), 0)
                now = states_ptr + (k % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                waiting = tl.load(now + state_at, mask=(shift + cross >= 0) & (shift + cross < reach), other=0.0)
                state = tl.where(arrives, waiting, state)
            state = _scan_tile(
                xs, lams, befores, heres, afters, state,
                h_ptr + line64 * h_line + shift64 * h_cross, h_at, h_line,
                owned, shift + cross > 0, shift + cross < width - 1, line, low, high, step, segment,
                LINES, GROUP, VECTOR, MAY_OVERRUN, REVERSE, SEGMENTED, HAS_LAM,
            )  # fmt: skip
            if HALO > 0:
                reach = tl.where(visit % TILES == TILES - 1, width, 0)
                then = states_ptr + ((k + 1) % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                tl.store(then + state_at, state, mask=held & (shift + cross < reach))
        if HALO > 0:
            # The next lines' states come from other threads.
            tl.debug_barrier()


@triton.jit
def _adjoint_tile(
    grads, previous, xs, lams, befores, heres, afters, carried,
    dx_ptr, dx_at, dx_line, dlam_ptr, dlam_at, dlam_line, dtaps_ptr, dtaps_at, dtaps_line, dtaps_tap,
    exists, owned, taps_owned, has_left, has_right, line, low, high, step, segment,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr, MAY_OVERRUN: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr,
    HAS_LAM: tl.constexpr, NEED_TAPS: tl.constexpr, NEED_LAM: tl.constexpr,
):  # fmt: skip
    """Advance the adjoint scan by a tile whose first scanned line is number ``step``, storing its gradients.

    ``carried`` is what the line after the tile sends to the tile's last; returns what the tile sends on. ``previous``
    are the states of the lines before each line of the tile.
    """
    g = tl.arange(0, GROUP)[None, None, :]
    phase = step + LINES - 1
    if SEGMENTED:
        phase = phase % segment
    for group in tl.static_range(LINES // GROUP):
        dxs, dlams, dbefores, dheres, dafters = (), (), (), (), ()
        for k in tl.static_range(group * GROUP, group * GROUP + GROUP):
            adjoint = grads[LINES - 1 - k].to(tl.float32) + carried
            if SHARED:
                # A channel beyond the last has no part in the sum of its group, even if a tap is infinite.
                adjoint = tl.where(exists, adjoint, 0.0)
            dx = adjoint
            if HAS_LAM:
                dx = lams[LINES - 1 - k].to(tl.float32) * adjoint
            dxs = (dx,) + dxs
            if NEED_LAM:
                dlams = (xs[LINES - 1 - k].to(tl.float32) * adjoint,) + dlams
            follows = phase != 0
            if SEGMENTED:
                phase = tl.where(follows, phase, segment)
            phase -= 1
            to_left = befores[LINES - 1 - k].to(tl.float32) * adjoint
            to_right = afters[LINES - 1 - k].to(tl.float32) * adjoint
            if NEED_TAPS:
                state = previous[LINES - 1 - k].to(tl.float32)
                from_left, from_right, left, right = neighbour_pairs(to_right, to_left, state, VECTOR)
                dbefore = tl.where(has_left, tl.where(follows, adjoint * left, 0.0), 0.0)
                dhere = tl.where(follows, adjoint * state, 0.0)
                dafter = tl.where(has_right, tl.where(follows, adjoint * right, 0.0), 0.0)
                dbefores, dheres, dafters = (dbefore,) + dbefores, (dhere,) + dheres, (dafter,) + dafters
            else:
                from_left, from_right = neighbours(to_right, to_left, VECTOR)
            carried = heres[LINES - 1 - k].to(tl.float32) * adjoint
            carried += tl.where(has_left, from_left, 0.0)
            carried += tl.where(has_right, from_right, 0.0)
            carried = tl.where(follows, carried, 0.0)
        first = group * GROUP if REVERSE else LINES - GROUP - group * GROUP
        mask, taps_mask = owned, taps_owned
        if MAY_OVERRUN:
            mask = mask & (line + first + g >= low) & (line + first + g < high)
            taps_mask = taps_mask & (line + first + g >= low) & (line + first + g < high)
        store_lines(dx_ptr + first * dx_line, dx_at, dxs, mask, GROUP, REVERSE)
        if NEED_LAM:
            store_lines(dlam_ptr + first * dlam_line, dlam_at, dlams, mask, GROUP, REVERSE)
        if NEED_TAPS:
            dtaps_now = dtaps_ptr + first * dtaps_line
            store_lines(dtaps_now, dtaps_at, dbefores, taps_mask, GROUP, REVERSE, SHARED)
            store_lines(dtaps_now + dtaps_tap, dtaps_at, dheres, taps_mask, GROUP, REVERSE, SHARED)
            store_lines(dtaps_now + 2 * dtaps_tap, dtaps_at, dafters, taps_mask, GROUP, REVERSE, SHARED)
    return carried


@triton.jit(do_not_specialize=[*integers("grad", "h", "x", "taps", "lam", "dx", "dtaps", "dlam"), "dtaps_block"])
def backward_kernel(
    grad_ptr, h_ptr, x_ptr, taps_ptr, lam_ptr, dx_ptr, dtaps_ptr, dlam_ptr, states_ptr,
    grad_batch, grad_channel, grad_cross, grad_line,
    h_batch, h_channel, h_cross, h_line,
    x_batch, x_channel, x_cross, x_line,
    taps_batch, taps_channel, taps_cross, taps_line, taps_tap,
    lam_batch, lam_channel, lam_cross, lam_line,
    dx_batch, dx_channel, dx_cross, dx_line,
    dtaps_batch, dtaps_channel, dtaps_cross, dtaps_line, dtaps_tap, dtaps_block,
    dlam_batch, dlam_channel, dlam_cross, dlam_line,
    groups, channels, width, lines, chunk, chunks, segment,
    GRAD_FAST: tl.constexpr, H_FAST: tl.constexpr, X_FAST: tl.constexpr,
    TAPS_FAST: tl.constexpr, LAM_FAST: tl.constexpr,
    DX_FAST: tl.constexpr, DTAPS_FAST: tl.constexpr, DLAM_FAST: tl.constexpr,
    FAST: tl.constexpr, ALIGN: tl.constexpr, TAPS_ALIGN: tl.constexpr, UNIFORM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, HALO: tl.constexpr,
    LINES: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, SEGMENTED: tl.constexpr, SHARED: tl.constexpr, HAS_LAM: tl.constexpr,
    NEED_TAPS: tl.constexpr, NEED_LAM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dtaps and dlam; the work is shared out, and long rows are taken in blocks, as in the forward kernel.

    With SHARED taps each channel block leaves its own sum over its channels, ``dtaps_block`` apart.
    """
    PLACES: tl.constexpr = tl.int64 if WIDE else tl.int32
    if FAST == 0:
        channels *= ALIGN
    elif FAST == 1:
        width *= ALIGN
    else:
        lines *= ALIGN
        chunk *= ALIGN
    block, group, batch, start, low, high = locate(tl.cdiv(channels, BLOCK_C), groups, lines, chunk, chunks, REVERSE)
    c, n = tl.arange(0, BLOCK_C)[:, None, None], tl.arange(0, BLOCK_N)[None, :, None]
    t, g = tl.arange(0, LINES)[None, None, :], tl.arange(0, GROUP)[None, None, :]
    channel, cross = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_N)[None, :]
    exists, channel_exists = block * BLOCK_C + c < channels, block * BLOCK_C + channel < channels
    first_channel = group * channels + block * BLOCK_C
    tap_channel = group if SHARED else first_channel
    cs, ns, ts, gs = c.to(PLACES), n.to(PLACES), t.to(PLACES), g.to(PLACES)
    tap_cs = tl.arange(0, 1)[:, None, None].to(PLACES) if SHARED else cs

    grad_ptr = anchor(grad_ptr, batch, first_channel, grad_batch, grad_channel, GRAD_FAST, ALIGN)
    grad_at = place(cs, ns, ts, grad_channel, grad_cross, grad_line, GRAD_FAST, ALIGN)
    grad_line, grad_cross = stride(grad_line, 2, GRAD_FAST, ALIGN), stride(grad_cross, 1, GRAD_FAST, ALIGN)
    taps_ptr = anchor(taps_ptr, batch, tap_channel, taps_batch, taps_channel, TAPS_FAST, TAPS_ALIGN)
    taps_at = place(tap_cs, ns, ts, taps_channel, taps_cross, taps_line, TAPS_FAST, TAPS_ALIGN)
    taps_line, taps_cross = stride(taps_line, 2, TAPS_FAST, TAPS_ALIGN), stride(taps_cross, 1, TAPS_FAST, TAPS_ALIGN)
    taps_tap = taps_tap.to(tl.int64) * TAPS_ALIGN
    dx_ptr = anchor(dx_ptr, batch, first_channel, dx_batch, dx_channel, DX_FAST, ALIGN)
    dx_at = place(cs, ns, gs, dx_channel, dx_cross, dx_line, DX_FAST, ALIGN)
    dx_line, dx_cross = stride(dx_line, 2, DX_FAST, ALIGN), stride(dx_cross, 1, DX_FAST, ALIGN)
    # Where the strides of all [B, C, H, W] tensors agree, so do the offsets: registers that hold them are dear.
    lam_at, x_at, h_at, dlam_at, dtaps_at = grad_at, grad_at, grad_at, dx_at, dx_at
    if HAS_LAM:
        lam_ptr = anchor(lam_ptr, batch, first_channel, lam_batch, lam_channel, LAM_FAST, ALIGN)
        if not UNIFORM:
            lam_at = place(cs, ns, ts, lam_channel, lam_cross, lam_line, LAM_FAST, ALIGN)
        lam_line, lam_cross = stride(lam_line, 2, LAM_FAST, ALIGN), stride(lam_cross, 1, LAM_FAST, ALIGN)
    if NEED_LAM:
        x_ptr = anchor(x_ptr, batch, first_channel, x_batch, x_channel, X_FAST, ALIGN)
        dlam_ptr = anchor(dlam_ptr, batch, first_channel, dlam_batch, dlam_channel, DLAM_FAST, ALIGN)
        if not UNIFORM:
            x_at = place(cs, ns, ts, x_channel, x_cross, x_line, X_FAST, ALIGN)
            dlam_at = place(cs, ns, gs, dlam_channel, dlam_cross, dlam_line, DLAM_FAST, ALIGN)
        x_line, x_cross = stride(x_line, 2, X_FAST, ALIGN), stride(x_cross, 1, X_FAST, ALIGN)
    dlam_line, dlam_cross = stride(dlam_line, 2, DLAM_FAST, ALIGN), stride(dlam_cross, 1, DLAM_FAST, ALIGN)
    if NEED_TAPS:
        h_ptr = anchor(h_ptr, batch, first_channel, h_batch, h_channel, H_FAST, ALIGN)
        if not UNIFORM:
            h_at = place(cs, ns, ts, h_channel, h_cross, h_line, H_FAST, ALIGN)
        edge_at = place(channel.to(PLACES), cross.to(PLACES), 0, h_channel, h_cross, h_line, H_FAST, ALIGN)
        h_line, h_cross = stride(h_line, 2, H_FAST, ALIGN), stride(h_cross, 1, H_FAST, ALIGN)
        dtaps_ptr = anchor(dtaps_ptr, batch, tap_channel, dtaps_batch, dtaps_channel, DTAPS_FAST, TAPS_ALIGN)
        dtaps_ptr += block.to(tl.int64) * dtaps_block * TAPS_ALIGN
        dtaps_at = place(tap_cs, ns, gs, dtaps_channel, dtaps_cross, dtaps_line, DTAPS_FAST, TAPS_ALIGN)
    dtaps_line = stride(dtaps_line, 2, DTAPS_FAST, TAPS_ALIGN)
    dtaps_cross = stride(dtaps_cross, 1, DTAPS_FAST, TAPS_ALIGN)
    dtaps_tap = dtaps_tap.to(tl.int64) * TAPS_ALIGN

    held = channel_exists & (cross >= HALO) & (cross < BLOCK_N - HALO)
    carried = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    TILES: tl.constexpr = HALO // LINES if HALO > 0 else 1
    MAY_OVERRUN: tl.constexpr = TILES * LINES > 1
    visits = TILES
    if HALO > 0:
        visits = tl.cdiv(width, BLOCK_N - 2 * HALO) * TILES
        states_ptr += tl.program_id(0).to(tl.int64) * 2 * BLOCK_C * width
        state_at = cross * BLOCK_C + channel if FAST == 0 else channel * width + cross
    rounds = tl.cdiv(high - low, TILES * LINES)
    for k in tl.range(0, rounds, num_stages=STAGES):
        for visit in tl.range(0, visits, num_stages=STAGES):
            step = ((rounds - k) * TILES - 1 - visit % TILES) * LINES
            line = lines - start - step - LINES if REVERSE else start + step
            line64 = line.to(tl.int64)
            shift = visit // TILES * (BLOCK_N - 2 * HALO) - HALO
            shift64 = shift.to(tl.int64)
            taps_inside = (shift + n >= 0) & (shift + n < width)
            inside = exists & taps_inside
            if not SHARED:
                taps_inside = inside
            middle = (n >= HALO) & (n < BLOCK_N - HALO)
            owned, taps_owned = inside & middle, taps_inside & middle
            pixel_exists = channel_exists & (shift + cross >= 0) & (shift + cross < width)
            from_line = line + 1 if REVERSE else line - 1
            previous_inside = inside & (from_line + t >= low) & (from_line + t < high)
            if MAY_OVERRUN:
                inside = inside & (line + t >= low) & (line + t < high)
                taps_inside = taps_inside & (line + t >= low) & (line + t < high)
            grads = load_lines(grad_ptr + line64 * grad_line + shift64 * grad_cross, grad_at, inside, LINES, REVERSE)
            xs, lams, previous = grads, grads, grads
            if HAS_LAM:
                lams = load_lines(lam_ptr + line64 * lam_line + shift64 * lam_cross, lam_at, inside, LINES, REVERSE)
            if NEED_LAM:
                xs = load_lines(x_ptr + line64 * x_line + shift64 * x_cross, x_at, inside, LINES, REVERSE)
            if NEED_TAPS:
                h_now = h_ptr + shift64 * h_cross
                if FAST == 2:
                    # A tile shifted by one line would not be aligned: the tile's own states, and one line apart.
                    previous = load_lines(h_now + line64 * h_line, h_at, inside, LINES, REVERSE)
                    edge_line = line + LINES if REVERSE else line - 1
                    reach = tl.where(step > 0, tl.where(step <= high - low, width, 0), 0)
                    edge_inside = channel_exists & (shift + cross >= 0) & (shift + cross < reach)
                    edge = tl.load(h_now + edge_line.to(tl.int64) * h_line + edge_at, mask=edge_inside, other=0.0)
                    # Any value does for the first line of all. Reading the last line keeps the tile's loads whole.
                    edge = tl.where(step > 0, edge, previous[LINES - 1])
                    previous = (edge,) + previous[0 : LINES - 1]
                else:
                    h_now += from_line.to(tl.int64) * h_line
                    previous = load_lines(h_now, h_at, previous_inside, LINES, REVERSE)
            taps = taps_ptr + line64 * taps_line + shift64 * taps_cross
            befores = load_lines(taps, taps_at, taps_inside, LINES, REVERSE)
            heres = load_lines(taps + taps_tap, taps_at, taps_inside, LINES, REVERSE)
            afters = load_lines(taps + 2 * taps_tap, taps_at, taps_inside, LINES, REVERSE)
            if HALO > 0:
                arrives = visit % TILES == 0
                reach = tl.where(arrives, tl.where(k > 0, width, 0), 0)
                now = states_ptr + (k % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                waiting = tl.load(now + state_at, mask=(shift + cross >= 0) & (shift + cross < reach), other=0.0)
                carried = tl.where(arrives, waiting, carried)
            carried = _adjoint_tile(
                grads, previous, xs, lams, befores, heres, afters, carried,
                dx_ptr + line64 * dx_line + shift64 * dx_cross, dx_at, dx_line,
                dlam_ptr + line64 * dlam_line + shift64 * dlam_cross, dlam_at, dlam_line,
                dtaps_ptr + line64 * dtaps_line + shift64 * dtaps_cross, dtaps_at, dtaps_line, dtaps_tap,
                pixel_exists, owned, taps_owned, shift + cross > 0, shift + cross < width - 1,
                line, low, high, step, segment,
                LINES, GROUP, VECTOR, MAY_OVERRUN, REVERSE, SEGMENTED, SHARED, HAS_LAM, NEED_TAPS, NEED_LAM,
            )  # fmt: skip
            if HALO > 0:
                reach = tl.where(visit % TILES == TILES - 1, width, 0)
                then = states_ptr + ((k + 1) % 2) * BLOCK_C * width + shift * (BLOCK_C if FAST == 0 else 1)
                tl.store(then + state_at, carried, mask=held & (shift + cross < reach))
        if HALO > 0:
            # What the next lines receive comes from other threads.
            tl.debug_barrier()
