"""Numbers as tensor cores read them: TF32, the sign, the exponent and 11 significant bits of a float32.

A float32 is the sum of two such numbers, the nearest one and what is left. Three of the four products of two such pairs
are as exact as float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def high(b):
    """The part of a number that tensor cores read."""
    return (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def rounded(b):
    """The nearest TF32 number."""
    return ((b.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def pair(b, TF32: tl.constexpr):
    """A number as the sum of two, the first of which is a TF32 number."""
    if TF32:
        b_high = rounded(b)
        return b_high, b - b_high
    else:
        return b, b
