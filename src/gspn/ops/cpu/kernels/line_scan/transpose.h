// Columns as lines: reading rows of memory into lines of scratch that run down the columns, and writing them back.
#pragma once

#include "../common/simd.h"

namespace gspn::GSPN_ISA {
namespace {

// Columns as lines. A band of V rows is first read along its rows, since memory delivers runs and not columns, into a
// buffer in the first-level cache, which is transposed from there by V x V squares in registers. Writing goes the same
// way back.
//
// kBand bounds the columns of a band: a kilobyte a row, the least that memory delivers near its full rate when the next
// piece is a row away. kAhead rows are fetched ahead, since a step from row to row is beyond the processor's own
// prefetchers; with rows a power of two apart, as images often have them, more would push each other out of the cache.
constexpr int64_t kBand = 256;
constexpr int kAhead = 4;

template <class A>
struct Band {
  static constexpr int64_t pitch = kBand + kLanes<A>;  // not a power of two: rows fall on different cache sets
  alignas(64) A rows[kLanes<A>][pitch];
};

// Turns `width` columns of a band of rows into lines of dst. Vectors are stored whole, so a destination line has room
// for a vector more than its elements; what is written there is zero, as the padding after a line has to be.
template <class A>
__attribute__((noinline)) void transpose_in(const Band<A>& band, int64_t width, A* dst, int64_t pitch) {
  constexpr int V = kLanes<A>;
  typename VectorOf<A>::type square[V];
  for (int64_t l = 0; l < width; l += V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) square[i] = load(band.rows[i] + l);
    transpose<A>(square);
    if (width - l >= V) {
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) store(dst + (l + i) * pitch, square[i]);
    } else {
      for (int64_t i = 0; i < width - l; ++i) store(dst + (l + i) * pitch, square[i]);
    }
  }
}

// Lines of src to columns of a band of rows.
template <class A>
__attribute__((noinline)) void transpose_out(const A* src, int64_t pitch, int64_t width, Band<A>& band) {
  constexpr int V = kLanes<A>;
  typename VectorOf<A>::type square[V];
  for (int64_t l = 0; l < width; l += V) {
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) square[i] = load(src + (l + i < width ? l + i : l) * pitch);
    transpose<A>(square);
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) store(band.rows[i] + l, square[i]);
  }
}

// read(row, column, width, out) reads one row's piece; rows beyond the last are zero.
template <class A, class Read>
GSPN_INLINE void gather_rows(int64_t lines, int64_t cross, A* dst, int64_t pitch, Read read) {
  constexpr int V = kLanes<A>;
  Band<A> band;
  for (int64_t l = 0; l < lines; l += kBand) {
    const int64_t width = minimum(lines - l, kBand);
    for (int64_t p = 0; p < cross; p += V) {
      for (int i = 0; i < V; ++i) {
        if (p + i < cross) {
          read(p + i, l, width, band.rows[i]);
        } else {
          memset(band.rows[i], 0, sizeof(band.rows[i]));
        }
      }
      transpose_in(band, width, dst + l * pitch + p, pitch);
    }
  }
}

template <class T>
GSPN_INLINE void fetch_row(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

template <class A, class T>
GSPN_INLINE void copy_in(const T* src, A* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = widen(src[i]);
}

template <class A, class T>
GSPN_INLINE void copy_out(const A* src, T* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = narrow<T>(src[i]);
}

template <class A, class T>
void gather_transposed(const T* src, int64_t src_pitch, int64_t lines, int64_t cross, A* dst, int64_t pitch) {
  gather_rows(lines, cross, dst, pitch,
              [&](int64_t p, int64_t l, int64_t width, A* out) __attribute__((always_inline)) {
                const T* row = src + p * src_pitch + l;
                fetch_row(row + kAhead * src_pitch, width);
                copy_in(row, out, width);
              });
}

// The same of the product of two tensors that are dense in each row: one transpose instead of two.
template <class A, class T>
void gather_product(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t lines, int64_t cross, A* dst,
                    int64_t pitch) {
  gather_rows(lines, cross, dst, pitch,
              [&](int64_t p, int64_t l, int64_t width, A* out) __attribute__((always_inline)) {
                const T *row_a = a + p * a_pitch + l, *row_b = b + p * b_pitch + l;
                fetch_row(row_a + kAhead * a_pitch, width);
                fetch_row(row_b + kAhead * b_pitch, width);
                int64_t i = 0;
                for (; i + kLanes<A> <= width; i += kLanes<A>) store(out + i, load(row_a + i) * load(row_b + i));
                for (; i < width; ++i) out[i] = widen(row_a[i]) * widen(row_b[i]);
              });
}

template <class A, class T>
void scatter_transposed(const A* src, int64_t pitch, int64_t lines, int64_t cross, T* dst, int64_t dst_pitch) {
  constexpr int V = kLanes<A>;
  Band<A> band;
  for (int64_t l = 0; l < lines; l += kBand) {
    const int64_t width = minimum(lines - l, kBand);
    for (int64_t p = 0; p < cross; p += V) {
      transpose_out(src + l * pitch + p, pitch, width, band);
      for (int64_t i = 0; i < V && p + i < cross; ++i) {
        copy_out(band.rows[i], dst + (p + i) * dst_pitch + l, width);
      }
    }
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
