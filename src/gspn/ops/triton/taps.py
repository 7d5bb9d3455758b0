"""The stochastic taps of ``propagate`` from their logits, for the scans and for the gradients.

Logits come times ``-log2(e)``, which is folded into the projection: ``sigmoid(a) = 1 / (1 + 2^t)``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp2(b, PTX: tl.constexpr):
    """``2^b``, 0 below the normal numbers where PTX can be written."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, True, 1)
    else:
        return tl.math.exp2(b)


@triton.jit
def inverse(b, PTX: tl.constexpr):
    """``1 / b``, 0 below the normal numbers where PTX can be written."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, True, 1)
    else:
        return 1.0 / b


@triton.jit
def stochastic(b_before, b_here, b_after, PTX: tl.constexpr):
    """Logits times ``-log2(e)`` to sigmoids that sum to one; those of neighbours that do not exist are infinite.

    One ``t`` at least has to be below 121.
    """
    b_before = inverse(1.0 + exp2(b_before, PTX), PTX)
    b_here = inverse(1.0 + exp2(b_here, PTX), PTX)
    b_after = inverse(1.0 + exp2(b_after, PTX), PTX)
    # Divided before they meet the states, whose sum may be beyond the largest number.
    b_inverse = inverse(b_before + b_here + b_after, PTX)
    return b_before * b_inverse, b_here * b_inverse, b_after * b_inverse


@triton.jit
def within_reach(logits, i_cross, n_cross, PIXELS: tl.constexpr):
    """Logits of any size, times ``-log2(e)``, as :func:`stochastic` can take them.

    Where no ``t`` is below 30 the one in ``1 + 2^t`` makes no difference and only differences of the ``t`` count: the
    least is then moved to 30. Those beyond 120 are moved there, so that all are equal if all are infinite.
    """
    MOST: tl.constexpr = 3.4028234663852886e38
    moved = ()
    for p in tl.static_range(PIXELS):
        b_least = tl.minimum(tl.minimum(logits[3 * p], logits[3 * p + 1]), logits[3 * p + 2])
        b_excess = tl.minimum(tl.maximum(b_least - 30.0, 0.0), MOST)
        # A NaN stays one.
        b_before = tl.minimum(logits[3 * p] - b_excess, 120.0, tl.PropagateNan.ALL)
        b_here = tl.minimum(logits[3 * p + 1] - b_excess, 120.0, tl.PropagateNan.ALL)
        b_after = tl.minimum(logits[3 * p + 2] - b_excess, 120.0, tl.PropagateNan.ALL)
        b_before = tl.where(i_cross + p > 0, b_before, float("inf"))
        b_after = tl.where(i_cross + p < n_cross - 1, b_after, float("inf"))
        moved = moved + (b_before, b_here, b_after)
    return moved
