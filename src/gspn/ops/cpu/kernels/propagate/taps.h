// Taps from logits in registers: w_k = sigmoid(a_k) / (sum over existing neighbours of sigmoid(a_j)).
//
// With e_k = exp(-a_k) and d_k = 1 + e_k the sigmoids are 1 / d_k, and w_0 : w_1 : w_2 = d_1 d_2 : d_0 d_2 : d_0 d_1.
// One division serves all three. The kernels hand over t_k = -a_k log2(e), the factor being part of the packed
// projection.
//
// The products overflow for logits of about -44 and below (float). That shows in their sum, and the pixels concerned
// are computed again by `shift_into_range`, which uses that the ratios of sigmoids of very negative logits do not
// change when all of them are moved by the same amount.
#pragma once

#include "exp2.h"

namespace gspn::GSPN_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;

template <class A>
struct TapRange;
template <>
struct TapRange<float> {
  // Beyond 28 the sigmoid is 2^-t to the last place; below 62 products of two do not overflow.
  static constexpr float exponential = 28.f, most = 62.f, overflow = 1e37f;
};
template <>
struct TapRange<double> {
  static constexpr double exponential = 58., most = 500., overflow = 1e307;
};

// True if any lane is not below the limit: infinite, NaN or large.
template <class A>
GSPN_INLINE bool any_beyond(typename VectorOf<A>::type v, A limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    return _mm512_cmp_ps_mask(bit_cast<__m512>(v), _mm512_set1_ps(limit), _CMP_NLT_UQ) != 0;
  } else {
    return _mm512_cmp_pd_mask(bit_cast<__m512d>(v), _mm512_set1_pd(limit), _CMP_NLT_UQ) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    return _mm256_movemask_ps(_mm256_cmp_ps(bit_cast<__m256>(v), _mm256_set1_ps(limit), _CMP_NLT_UQ)) != 0;
  } else {
    return _mm256_movemask_pd(_mm256_cmp_pd(bit_cast<__m256d>(v), _mm256_set1_pd(limit), _CMP_NLT_UQ)) != 0;
  }
#else
  bool beyond = false;
  for (int i = 0; i < kLanes<A>; ++i) beyond |= !(v[i] < limit);
  return beyond;
#endif
}

// Moves logits whose products would overflow. `has` are all ones in lanes where the outer neighbours exist.
template <class A>
GSPN_INLINE void shift_into_range(typename VectorOf<A>::type* t, typename VectorOf<A>::index has_before,
                                  typename VectorOf<A>::index has_after) {
  using V = typename VectorOf<A>::type;
  using R = TapRange<A>;
  const V zero{}, most = V{} + R::most;
  V least = t[1];
  least = has_before ? (t[0] < least ? t[0] : least) : least;
  least = has_after ? (t[2] < least ? t[2] : least) : least;
  V by = least - R::exponential;
  by = by < zero ? zero : by;  // a NaN stays
  for (int k = 0; k < 3; ++k) {
    t[k] -= by;
    t[k] = t[k] > most ? most : t[k];
  }
  // A neighbour that does not exist has no say, not even as infinity times zero.
  t[0] = has_before ? t[0] : zero;
  t[2] = has_after ? t[2] : zero;
}

// Weights up to a common factor, and their product d_0 d_1 d_2.
template <class A>
struct Weights {
  using V = typename VectorOf<A>::type;
  V w[3], e[3], product;

  GSPN_INLINE explicit Weights(const V* t) {
    V d[3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) {
      e[k] = exp2_of<A>(t[k]);
      d[k] = e[k] + A(1);
    }
    w[0] = d[1] * d[2];
    w[1] = d[0] * d[2];
    w[2] = d[0] * d[1];
    product = d[0] * w[0];
  }
  GSPN_INLINE V sum() const { return w[0] + w[1] + w[2]; }
};

}  // namespace
}  // namespace gspn::GSPN_ISA
