// Vectors of one instruction set: loads and stores that convert, transposes.
//
// Included by translation units that are compiled once for each instruction set. Everything lives in a namespace named
// after it, and nothing of the C++ library is instantiated here: see GSPN_INLINE.
#pragma once

#include <cstdint>
#include <cstring>

#include "interface.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define GSPN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GSPN_VECTOR_BYTES 32
#else
#define GSPN_VECTOR_BYTES 16
#endif

namespace gspn::GSPN_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};

template <class A>
constexpr int kLanes = GSPN_VECTOR_BYTES / static_cast<int>(sizeof(A));

// GCC drops attributes that depend on a template parameter's alias, so the vector types are spelled out.
typedef float float_vector __attribute__((vector_size(GSPN_VECTOR_BYTES)));
typedef double double_vector __attribute__((vector_size(GSPN_VECTOR_BYTES)));
typedef int32_t int32_vector __attribute__((vector_size(GSPN_VECTOR_BYTES)));
typedef int64_t int64_vector __attribute__((vector_size(GSPN_VECTOR_BYTES)));
typedef uint32_t uint32_vector __attribute__((vector_size(GSPN_VECTOR_BYTES)));
typedef uint16_t uint16_half_vector __attribute__((vector_size(GSPN_VECTOR_BYTES / 2)));

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = float_vector;
  using index = int32_vector;
  using index_element = int32_t;
};
template <>
struct VectorOf<double> {
  using type = double_vector;
  using index = int64_vector;
  using index_element = int64_t;
};

template <class To, class From>
GSPN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

GSPN_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A>
GSPN_INLINE void clear(A* p, int64_t count) {
  memset(p, 0, static_cast<size_t>(count) * sizeof(A));
}

// Calls run with a value of the element type that `dtype` names.
template <class Run>
GSPN_INLINE auto dispatch_on_dtype(int32_t dtype, Run run) {
  switch (dtype) {
    case kFloat32: return run(float{});
    case kFloat64: return run(double{});
    case kBFloat16: return run(bf16{});
    default: return run(f16{});
  }
}

// The same with a value of the state's type.
template <class Run>
GSPN_INLINE auto dispatch_on_state(int32_t dtype, Run run) {
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

// --- One element ---

GSPN_INLINE float widen(float v) { return v; }
GSPN_INLINE double widen(double v) { return v; }
GSPN_INLINE float widen(bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
GSPN_INLINE float widen(f16 v) {
  // Shift exponent and mantissa into place and let one multiplication rebias the exponent, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= (31u << 23)) bits |= 255u << 23;  // inf and NaN
  return bit_cast<float>(bits | sign);
}

template <class T>
GSPN_INLINE T narrow(typename StateOf<T>::type v);
template <>
GSPN_INLINE float narrow<float>(float v) {
  return v;
}
template <>
GSPN_INLINE double narrow<double>(double v) {
  return v;
}
template <>
GSPN_INLINE bf16 narrow<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
GSPN_INLINE f16 narrow<f16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds beyond 65504
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal in half: add a number whose last place is half's
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// --- One vector ---

// Keeps what was loaded in a register for all its uses. With the 16 registers that there are without AVX-512, compilers
// would rather load a weight or a constant again for each of them, and the load ports then decide the speed.
template <class V>
GSPN_INLINE V in_register(V v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm volatile("" : "+x"(v));
#endif
  return v;
}

// The smaller and the greater of two, b if either is a NaN. Spelled out, since compilers make two instructions of it.
template <class A>
GSPN_INLINE typename VectorOf<A>::type smaller_of(typename VectorOf<A>::type a, typename VectorOf<A>::type b) {
#if GSPN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    return bit_cast<float_vector>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  } else {
    return bit_cast<double_vector>(_mm256_min_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b)));
  }
#else
  return a < b ? a : b;
#endif
}
template <class A>
GSPN_INLINE typename VectorOf<A>::type greater_of(typename VectorOf<A>::type a, typename VectorOf<A>::type b) {
#if GSPN_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    return bit_cast<float_vector>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
  } else {
    return bit_cast<double_vector>(_mm256_max_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b)));
  }
#else
  return a > b ? a : b;
#endif
}
template <class A>
GSPN_INLINE typename VectorOf<A>::type magnitude_of(typename VectorOf<A>::type v) {
  using I = typename VectorOf<A>::index;
  using E = typename VectorOf<A>::index_element;
  constexpr E all_but_sign = static_cast<E>(~(uint64_t{1} << (8 * sizeof(E) - 1)));
  return bit_cast<typename VectorOf<A>::type>(bit_cast<I>(v) & all_but_sign);
}

template <class A>
GSPN_INLINE typename VectorOf<A>::type load(const A* p) {
  typename VectorOf<A>::type v;
  memcpy(&v, p, sizeof(v));
  return v;
}

GSPN_INLINE float_vector load(const bf16* p) {
  uint16_half_vector narrow_bits;
  memcpy(&narrow_bits, p, sizeof(narrow_bits));
  return bit_cast<float_vector>(__builtin_convertvector(narrow_bits, uint32_vector) << 16);
}

GSPN_INLINE float_vector load(const f16* p) {
#if defined(__AVX512F__)
  return bit_cast<float_vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<float_vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  float16x4_t v;
  memcpy(&v, p, sizeof(v));
  return bit_cast<float_vector>(vcvt_f32_f16(v));
#else
  float_vector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}

template <class A>
GSPN_INLINE void store(A* p, typename VectorOf<A>::type v) {
  memcpy(p, &v, sizeof(v));
}

GSPN_INLINE void store(bf16* p, float_vector v) {
  const uint32_vector bits = bit_cast<uint32_vector>(v);
  const uint32_vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_vector quiet = (bits >> 16) | 0x40;
  const uint32_vector nan = bit_cast<uint32_vector>(v != v);
  const uint16_half_vector out = __builtin_convertvector((quiet & nan) | (rounded & ~nan), uint16_half_vector);
  memcpy(p, &out, sizeof(out));
}

GSPN_INLINE void store(f16* p, float_vector v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t narrowed = vcvt_f16_f32(bit_cast<float32x4_t>(v));
  memcpy(p, &narrowed, sizeof(narrowed));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<f16>(v[i]);
#endif
}

template <class A, class T>
GSPN_INLINE typename VectorOf<A>::type load_some(const T* p, int64_t count) {
  if (count >= kLanes<A>) return load(p);
  T lanes[kLanes<A>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class A, class T>
GSPN_INLINE void store_some(T* p, typename VectorOf<A>::type v, int64_t count) {
  if (count >= kLanes<A>) {
    store(p, v);
    return;
  }
  T lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// --- Transposes ---

// Lane numbers for one round of a transpose, the second operand's lanes counted from n. A table at compile time: built
// from a loop at run time, the numbers would cost more than the shuffles.
template <class Index, int n, int s>
struct SwapLanes {
  Index low[n], high[n];
  constexpr SwapLanes() : low{}, high{} {
    for (int l = 0; l < n; ++l) {
      low[l] = (l & s) ? n + (l ^ s) : l;
      high[l] = (l & s) ? n + l : (l ^ s);
    }
  }
};

// low takes from a and b the lanes whose number has no bit s, side by side; high takes those that have it.
template <class A, int s>
GSPN_INLINE void exchange_lanes(typename VectorOf<A>::type a, typename VectorOf<A>::type b,
                                typename VectorOf<A>::type& low, typename VectorOf<A>::type& high) {
  constexpr int n = kLanes<A>;
#if defined(__clang__)
  for (int l = 0; l < n; ++l) {
    low[l] = (l & s) ? b[l ^ s] : a[l];
    high[l] = (l & s) ? b[l] : a[l ^ s];
  }
#else
  using I = typename VectorOf<A>::index;
  static constexpr SwapLanes<typename VectorOf<A>::index_element, n, s> lanes;
  low = __builtin_shuffle(a, b, bit_cast<I>(lanes.low));
  high = __builtin_shuffle(a, b, bit_cast<I>(lanes.high));
#endif
}

// Swaps the off-diagonal squares of side s within squares of side 2 s, and so on down to single elements.
template <class A, int s>
GSPN_INLINE void swap_squares(typename VectorOf<A>::type* rows) {
  constexpr int n = kLanes<A>;
#if defined(__clang__)
#pragma clang loop unroll(full)
#else
#pragma GCC unroll 16
#endif
  for (int i = 0; i < n; ++i) {
    if (!(i & s)) exchange_lanes<A, s>(rows[i], rows[i + s], rows[i], rows[i + s]);
  }
  if constexpr (s > 1) swap_squares<A, s / 2>(rows);
}

// rows[i][j] becomes rows[j][i].
template <class A>
GSPN_INLINE void transpose(typename VectorOf<A>::type* rows) {
  swap_squares<A, kLanes<A> / 2>(rows);
}

// lane l: the sum of the lanes of rows[l], for as many rows as a vector has lanes. Squares are folded onto each other,
// from half a vector down to single lanes. Destroys rows.
template <class A, int s = kLanes<A> / 2>
GSPN_INLINE typename VectorOf<A>::type sums_of_rows(typename VectorOf<A>::type* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < s; ++i) {
    typename VectorOf<A>::type low, high;
    exchange_lanes<A, s>(rows[i], rows[i + s], low, high);
    rows[i] = low + high;
  }
  if constexpr (s > 1) {
    return sums_of_rows<A, s / 2>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace gspn::GSPN_ISA
