// Powers of two of a vector, below 2 units in the last place (measured: 1.4 in float and 1.0 in double with AVX-512,
// 0.9 and 1.0 with AVX2, 1.2 and 1.3 without fused multiply-adds).
//
// 2^t = 2^n 2^r with r = t - n, which is exact; the second factor by the polynomial of least relative error: 1.9e-9 of
// degree 6 in float, 3.1e-18 of degree 11 in double. The logarithm's base is folded into what computes t, so that no
// product with log2(e) and no correction of r is left. AVX-512 splits t by an instruction whose n lies below t;
// elsewhere n is the nearest integer, which one addition finds.
#pragma once

#include "../common/simd.h"

namespace gspn::GSPN_ISA {
namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define GSPN_SCALES_BY_POWERS 1
#else
#define GSPN_SCALES_BY_POWERS 0
#endif

template <class A>
struct Exp2;

template <>
struct Exp2<float> {
#if GSPN_SCALES_BY_POWERS
  static constexpr float polynomial[] = {0x1.00000007f87a8p+0f, 0x1.62e42955d523bp-1f, 0x1.ebfd9ed291e86p-3f,
                                         0x1.c685006959072p-5f, 0x1.3d2800c653d17p-7f, 0x1.461954ee7f118p-10f,
                                         0x1.c72118d652231p-13f};
#else
  static constexpr float polynomial[] = {0x1.000000026150fp+0f, 0x1.62e430c7e9259p-1f, 0x1.ebfbdadcb068fp-3f,
                                         0x1.c6aed4b94e3bfp-5f, 0x1.3b2dbbc0c67cap-7f, 0x1.5f456a8b8a2eep-10f,
                                         0x1.41d333bdf124fp-13f};
#endif
  static constexpr int degree = 6, mantissa = 23;
  static constexpr float bias = 127.f, round = 0x1.8p23f;
};

template <>
struct Exp2<double> {
#if GSPN_SCALES_BY_POWERS
  static constexpr double polynomial[] = {0x1.0000000000000p+0,  0x1.62e42fefa39fap-1,  0x1.ebfbdff82bd67p-3,
                                          0x1.c6b08d7070085p-5,  0x1.3b2ab6f5ef905p-7,  0x1.5d87ff7b78a76p-10,
                                          0x1.4308f5f51db7ep-13, 0x1.ffd042008e366p-17, 0x1.628a9b2661495p-20,
                                          0x1.b895fab031272p-24, 0x1.c1546b0b891a7p-28, 0x1.5a6d6b99eb4a1p-31};
#else
  static constexpr double polynomial[] = {0x1.0000000000000p+0,  0x1.62e42fefa39efp-1,  0x1.ebfbdff82c5adp-3,
                                          0x1.c6b08d7049fd1p-5,  0x1.3b2ab6fb9f413p-7,  0x1.5d87fe78cf26dp-10,
                                          0x1.43091310bf6b0p-13, 0x1.ffcbfba7b89b6p-17, 0x1.62bfc3c1c8a7cp-20,
                                          0x1.b526788b3b73dp-24, 0x1.e620fb765be15p-28, 0x1.e7aa0f6005d3cp-32};
#endif
  static constexpr int degree = 11, mantissa = 52;
  static constexpr double bias = 1023., round = 0x1.8p52;
};

// 2^t[k] and 2^t[k] + 1, side by side: of one alone, each step would wait for the one before. Without AVX-512 |t| is
// below the exponent's bias, or the results are not to be used.
template <class A, int n>
struct PowersOfTwo {
  using V = typename VectorOf<A>::type;
  V power[n], plus_one[n];

  GSPN_INLINE explicit PowersOfTwo(const V* t) {
    using E = Exp2<A>;
    V r[n], p[n], scale[n];
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
#if GSPN_SCALES_BY_POWERS
      constexpr int below = 0x09;  // the difference to the next integer below
      if constexpr (sizeof(A) == 4) {
        r[k] = bit_cast<V>(_mm512_reduce_ps(bit_cast<__m512>(t[k]), below));
      } else {
        r[k] = bit_cast<V>(_mm512_reduce_pd(bit_cast<__m512d>(t[k]), below));
      }
#else
      // Adding a number whose last place is 1 rounds to an integer and leaves it in the low bits, here with the bias
      // that the exponent of 2^n has.
      scale[k] = t[k] + (E::round + E::bias);
      r[k] = t[k] - (scale[k] - (E::round + E::bias));
#endif
      p[k] = V{} + E::polynomial[E::degree];
    }
#pragma GCC unroll 16
    for (int i = E::degree - 1; i >= 0; --i) {
      const V coefficient = in_register(V{} + E::polynomial[i]);
#pragma GCC unroll 4
      for (int k = 0; k < n; ++k) p[k] = p[k] * r[k] + coefficient;
    }
#pragma GCC unroll 4
    for (int k = 0; k < n; ++k) {
#if GSPN_SCALES_BY_POWERS
      if constexpr (sizeof(A) == 4) {
        power[k] = bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(p[k]), bit_cast<__m512>(t[k])));
      } else {
        power[k] = bit_cast<V>(_mm512_scalef_pd(bit_cast<__m512d>(p[k]), bit_cast<__m512d>(t[k])));
      }
      plus_one[k] = power[k] + A(1);
#else
      scale[k] = bit_cast<V>(bit_cast<typename VectorOf<A>::index>(scale[k]) << E::mantissa);
      power[k] = p[k] * scale[k];
      plus_one[k] = p[k] * scale[k] + A(1);
#endif
    }
  }
};

// 2^t for t from the smallest to the largest normal number's exponent; below, at most the smallest one. Beyond, the
// largest power of two, for a NaN too; with AVX-512 subnormal numbers below, infinity beyond, and a NaN stays one.
template <class A>
GSPN_INLINE typename VectorOf<A>::type exp2_of(typename VectorOf<A>::type t) {
#if !GSPN_SCALES_BY_POWERS
  using V = typename VectorOf<A>::type;
  t = greater_of<A>(smaller_of<A>(t, V{} + Exp2<A>::bias), V{} - Exp2<A>::bias);
#endif
  return PowersOfTwo<A, 1>(&t).power[0];
}

}  // namespace
}  // namespace gspn::GSPN_ISA
