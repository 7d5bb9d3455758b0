// Powers of two of a vector, below 2 units in the last place (measured: 1.4 in float, 1.0 in double).
//
// 2^t = 2^floor(t) 2^r with r = t - floor(t), which is exact; the second factor by the polynomial of least relative
// error on [0, 1]: 1.9e-9 of degree 6 in float, 4.5e-18 of degree 11 in double. The logarithm's base is folded into
// what computes t, so that no product with log2(e) and no correction of r is left.
#pragma once

#include "../common/simd.h"

namespace gspn::GSPN_ISA {
namespace {

template <class A>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float polynomial[] = {0x1.00000007f87a8p+0f, 0x1.62e42955d523bp-1f, 0x1.ebfd9ed291e86p-3f,
                                         0x1.c685006959072p-5f, 0x1.3d2800c653d17p-7f, 0x1.461954ee7f118p-10f,
                                         0x1.c72118d652231p-13f};
  static constexpr int degree = 6, mantissa = 23;
  static constexpr float least = -127.f, most = 127.f, round = 0x1.8p23f;
};

template <>
struct Exp2<double> {
  static constexpr double polynomial[] = {0x1.0000000000000p+0,  0x1.62e42fefa39fap-1,  0x1.ebfbdff82bd67p-3,
                                          0x1.c6b08d7070085p-5,  0x1.3b2ab6f5ef905p-7,  0x1.5d87ff7b78a76p-10,
                                          0x1.4308f5f51db7ep-13, 0x1.ffd042008e366p-17, 0x1.628a9b2661495p-20,
                                          0x1.b895fab031272p-24, 0x1.c1546b0b891a7p-28, 0x1.5a6d6b99eb4a1p-31};
  static constexpr int degree = 11, mantissa = 52;
  static constexpr double least = -1023., most = 1023., round = 0x1.8p52;
};

template <class A, class V>
GSPN_INLINE V exp2_fraction(V r) {
  using E = Exp2<A>;
  V p = V{} + E::polynomial[E::degree];
#pragma GCC unroll 16
  for (int i = E::degree - 1; i >= 0; --i) p = p * r + E::polynomial[i];
  return p;
}

// 2^t for t from the smallest to the largest normal number's exponent; below, at most the smallest one. Beyond, the
// largest power of two, for a NaN too; with AVX-512 subnormal numbers below, infinity beyond, and a NaN stays one.
template <class A>
GSPN_INLINE typename VectorOf<A>::type exp2_of(typename VectorOf<A>::type t) {
  using V = typename VectorOf<A>::type;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  constexpr int below = 0x09;  // the difference to the next integer below
  if constexpr (sizeof(A) == 4) {
    const V r = bit_cast<V>(_mm512_reduce_ps(bit_cast<__m512>(t), below));
    return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(exp2_fraction<A>(r)), bit_cast<__m512>(t)));
  } else {
    const V r = bit_cast<V>(_mm512_reduce_pd(bit_cast<__m512d>(t), below));
    return bit_cast<V>(_mm512_scalef_pd(bit_cast<__m512d>(exp2_fraction<A>(r)), bit_cast<__m512d>(t)));
  }
#else
  using E = Exp2<A>;
  using I = typename VectorOf<A>::index;
  const V low = V{} + E::least, high = V{} + E::most;
  t = t < high ? t : high;
  t = t > low ? t : low;
  // Adding a number whose last place is 1 rounds to the nearest integer, and leaves it in the low bits.
  const V shifted = (t - A(0.5)) + E::round;
  const V r = t - (shifted - E::round);
  const V p = exp2_fraction<A>(r);
  return bit_cast<V>(bit_cast<I>(p) + (bit_cast<I>(shifted) << E::mantissa));
#endif
}

}  // namespace
}  // namespace gspn::GSPN_ISA
