// Taps from logits in registers: w_k = sigmoid(a_k) / (sum over existing neighbours of sigmoid(a_j)).
//
// With e_k = exp(-a_k) and d_k = 1 + e_k the sigmoids are 1 / d_k, and w_0 : w_1 : w_2 = d_1 d_2 : d_0 d_2 : d_0 d_1.
// One division serves all three. The kernels hand over t_k = -a_k log2(e), the factor being part of the packed
// projection.
//
// The products overflow for logits of about -44 and below (float), and so may a state times such a product. Both show
// in sums that the kernels take anyway, and the pixels concerned are computed again by `safe_taps`, which takes any
// logits.
#pragma once

#include "exp2.h"

namespace gspn::GSPN_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// Where products of e_k + 1 and sums of a few of them are in range.
template <class A>
constexpr A kMostWeight = sizeof(A) == 4 ? A(1e37) : A(1e307);

// True if any lane of `sums` is not below kMostWeight: infinite, NaN or large; or, without AVX-512, if a lane of
// `reach`, the largest |t|, is beyond what powers of two are computed for.
template <class A>
GSPN_INLINE bool out_of_range(typename VectorOf<A>::type sums, typename VectorOf<A>::type reach) {
  constexpr A limit = kMostWeight<A>;
#if GSPN_SCALES_BY_POWERS
  (void)reach;
  const auto v = sums;
#else
  // Not their sum: beyond, the weights may be any numbers, negative ones too. Of a NaN among them a NaN is left.
  const auto v = greater_of<A>(reach * (kMostWeight<A> / (Exp2<A>::bias - 1)), sums);
#endif
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
#elif defined(__aarch64__)
  const auto below = v < limit;  // all ones or zeros
  return vminvq_u32(bit_cast<uint32x4_t>(below)) == 0;
#else
  bool beyond = false;
  for (int i = 0; i < kLanes<A>; ++i) beyond |= !(v[i] < limit);
  return beyond;
#endif
}

// 2^t for t <= 0, subnormal numbers included.
template <class A>
GSPN_INLINE typename VectorOf<A>::type gradual_exp2(typename VectorOf<A>::type t) {
  const auto root = exp2_of<A>(t * A(0.5));
  return root * root;
}

// Taps that sum to one, and slope_k = 1 - sigmoid(a_k), for any logits.
//
// sigmoid(a) = 2^min(-t, 0) / (1 + 2^-|t|), and the largest power is taken out of all three. Infinite logits are as the
// largest finite ones, so that all three at -infinity are equal. `has` are all ones where the outer neighbours exist.
template <class A>
struct TapsAndSlopes {
  typename VectorOf<A>::type w[3], slope[3];
};
template <class A>
__attribute__((noinline)) TapsAndSlopes<A> safe_taps(const typename VectorOf<A>::type* t,
                                                     typename VectorOf<A>::index has_before,
                                                     typename VectorOf<A>::index has_after) {
  using V = typename VectorOf<A>::type;
  using I = typename VectorOf<A>::index;
  TapsAndSlopes<A> out;
  const I has[3] = {has_before, ~I{}, has_after};
  const V zero{}, one = zero + A(1), lowest = zero - static_cast<A>(sizeof(A) == 4 ? __FLT_MAX__ : __DBL_MAX__);
  V power[3], divisor[3], largest = lowest, nan{};
  for (int k = 0; k < 3; ++k) {
    const V small = gradual_exp2<A>(t[k] > zero ? zero - t[k] : t[k]);
    out.slope[k] = (t[k] > zero ? one : small) / (small + A(1));
    power[k] = t[k] > zero ? zero - t[k] : zero;
    power[k] = power[k] > lowest ? power[k] : lowest;
    // A neighbour that does not exist has no say, not even as a NaN.
    divisor[k] = has[k] ? small + A(1) : one;
    largest = (power[k] > largest) & has[k] ? power[k] : largest;
    nan = (t[k] != t[k]) & has[k] ? t[k] : nan;
  }
  V sum{};
  for (int k = 0; k < 3; ++k) {
    const V weight = gradual_exp2<A>(power[k] - largest) * divisor[(k + 1) % 3] * divisor[(k + 2) % 3];
    out.w[k] = has[k] ? weight : zero;
    sum += out.w[k];
  }
  const V inverse = nan != nan ? nan : A(1) / sum;
  for (V& w : out.w) w *= inverse;
  return out;
}

// Weights up to a common factor, their product d_0 d_1 d_2, and the largest |t_k| (zero with AVX-512, which takes any).
template <class A>
struct Weights {
  using V = typename VectorOf<A>::type;
  V w[3], e[3], product, reach{};

  GSPN_INLINE explicit Weights(const V* t) {
    const PowersOfTwo<A, 3> powers(t);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) e[k] = powers.power[k];
    multiply(powers.plus_one);
#if !GSPN_SCALES_BY_POWERS
    reach = greater_of<A>(greater_of<A>(magnitude_of<A>(t[0]), magnitude_of<A>(t[1])), magnitude_of<A>(t[2]));
#endif
  }
  // From the e_k of a pixel that were kept. They are exact products with a power of two, so these are the same bits.
  GSPN_INLINE explicit Weights(const A* kept) {
    V d[3];
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) e[k] = load(kept + k * kLanes<A>), d[k] = e[k] + A(1);
    multiply(d);
  }
  GSPN_INLINE V sum() const { return w[0] + w[1] + w[2]; }

 private:
  GSPN_INLINE void multiply(const V* d) {
    w[0] = d[1] * d[2];
    w[1] = d[0] * d[2];
    w[2] = d[0] * d[1];
    product = d[0] * w[0];
  }
};

}  // namespace
}  // namespace gspn::GSPN_ISA
