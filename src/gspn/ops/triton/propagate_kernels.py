"""The maps of ``propagate`` at a pixel, for the gradients.

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
