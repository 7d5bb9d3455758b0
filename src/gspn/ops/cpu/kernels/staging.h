// Staging: tiles of a few lines between memory and scratch, converted, transposed or gathered on the way.
//
// Included by translation units that are compiled once for each instruction set; see simd.h.
#pragma once

#include "simd.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// A staged or in-place tensor: line l of the tile starts at data + l * line, cross position p at p * cross.
template <class A>
struct Lines {
  A* data;
  int64_t line, cross;
  GSPN_INLINE A* at(int64_t l) const { return data ? data + l * line : nullptr; }
};

// Hands out pieces of a worker's scratch, each aligned to a vector.
class Scratch {
 public:
  explicit Scratch(char* base) : next_(base) {}
  template <class A>
  A* take(int64_t count) {
    A* p = reinterpret_cast<A*>(next_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(A));
    next_ += (bytes + 63) / 64 * 64;
    return p;
  }

 private:
  char* next_;
};

// --- Staging: from memory to [line][cross][m] in the state's type, and back ------------------------------------------------

// A rectangle of a tensor: `lines` x `cross` positions of `m` channels. Strides count elements.
struct Rect {
  int64_t lines, cross, m;
  int64_t line_stride, cross_stride, channel_stride;
};

// Columns as lines. A band of V rows is first read along its rows, since memory delivers runs and not columns, into a
// buffer in the first-level cache that is turned from there by V x V squares in registers. Writing goes the same way back.
//
// kBand bounds the columns of a band: a kilobyte a row, the least that memory delivers near its full rate when the next
// piece is a row away. kAhead rows are fetched ahead, since a step from row to row is beyond the processor's own
// prefetchers; with rows a power of two apart, as pictures often have them, more would push each other out of the cache.
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
GSPN_INLINE void turn_in(const Band<A>& band, int64_t width, A* dst, int64_t pitch) {
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
GSPN_INLINE void turn_out(const A* src, int64_t pitch, int64_t width, Band<A>& band) {
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

// read(row, column, width, out) brings one row's piece; rows beyond the last are zero.
template <class A, class Read>
GSPN_INLINE void gather_turned(int64_t lines, int64_t cross, A* dst, int64_t pitch, Read read) {
  constexpr int V = kLanes<A>;
  Band<A> band;
  for (int64_t l = 0; l < lines; l += kBand) {
    const int64_t width = lines - l < kBand ? lines - l : kBand;
    for (int64_t p = 0; p < cross; p += V) {
      for (int i = 0; i < V; ++i) {
        if (p + i < cross) {
          read(p + i, l, width, band.rows[i]);
        } else {
          memset(band.rows[i], 0, sizeof(band.rows[i]));
        }
      }
      turn_in(band, width, dst + l * pitch + p, pitch);
    }
  }
}

template <class T>
GSPN_INLINE void fetch_row(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

template <class A, class T>
GSPN_INLINE void copy_run(const T* src, A* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = widen(src[i]);
}

template <class A, class T>
GSPN_INLINE void copy_run_out(const A* src, T* dst, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store(dst + i, load(src + i));
  for (; i < count; ++i) dst[i] = narrow<T>(src[i]);
}

template <class A, class T>
void gather_transposed(const T* src, const Rect& r, A* dst, int64_t pitch) {
  gather_turned(r.lines, r.cross, dst, pitch, [&](int64_t p, int64_t l, int64_t width, A* out) __attribute__((always_inline)) {
    const T* row = src + p * r.cross_stride + l;
    fetch_row(row + kAhead * r.cross_stride, width);
    copy_run(row, out, width);
  });
}

// The same of the product of two tensors that are dense in each row: one transpose instead of two.
template <class A, class T>
void gather_product(const T* a, int64_t a_cross, const T* b, int64_t b_cross, int64_t lines, int64_t cross, A* dst,
                    int64_t pitch) {
  gather_turned(lines, cross, dst, pitch, [&](int64_t p, int64_t l, int64_t width, A* out) __attribute__((always_inline)) {
    const T *row_a = a + p * a_cross + l, *row_b = b + p * b_cross + l;
    fetch_row(row_a + kAhead * a_cross, width);
    fetch_row(row_b + kAhead * b_cross, width);
    int64_t i = 0;
    for (; i + kLanes<A> <= width; i += kLanes<A>) store(out + i, load(row_a + i) * load(row_b + i));
    for (; i < width; ++i) out[i] = widen(row_a[i]) * widen(row_b[i]);
  });
}

template <class A, class T>
void scatter_transposed(const A* src, int64_t pitch, const Rect& r, T* dst) {
  constexpr int V = kLanes<A>;
  Band<A> band;
  for (int64_t l = 0; l < r.lines; l += kBand) {
    const int64_t width = r.lines - l < kBand ? r.lines - l : kBand;
    for (int64_t p = 0; p < r.cross; p += V) {
      turn_out(src + l * pitch + p, pitch, width, band);
      for (int64_t i = 0; i < V && p + i < r.cross; ++i) {
        copy_run_out(band.rows[i], dst + (p + i) * r.cross_stride + l, width);
      }
    }
  }
}

template <class A, class T>
void gather(const T* src, const Rect& r, A* dst, int64_t pitch) {
  const bool dense_channels = r.m == 1 || r.channel_stride == 1;
  const bool dense_line = dense_channels && r.cross_stride == r.m;
  if (!dense_line && r.m == 1 && r.line_stride == 1) {
    gather_transposed(src, r, dst, pitch);
    return;
  }
  for (int64_t l = 0; l < r.lines; ++l) {
    const T* line = src + l * r.line_stride;
    A* out = dst + l * pitch;
    if (dense_line) {
      copy_run(line, out, r.cross * r.m);
    } else if (dense_channels && r.m > 1) {
      for (int64_t p = 0; p < r.cross; ++p) copy_run(line + p * r.cross_stride, out + p * r.m, r.m);
    } else if (r.channel_stride == 3) {
      // Taps in channels_last lie [cross][channel][tap]; a constant stride lets the compiler de-interleave in registers.
      for (int64_t p = 0; p < r.cross; ++p) {
        const T* pixel = line + p * r.cross_stride;
        for (int64_t c = 0; c < r.m; ++c) out[p * r.m + c] = widen(pixel[c * 3]);
      }
    } else {
      for (int64_t p = 0; p < r.cross; ++p) {
        const T* pixel = line + p * r.cross_stride;
        for (int64_t c = 0; c < r.m; ++c) out[p * r.m + c] = widen(pixel[c * r.channel_stride]);
      }
    }
  }
}

template <class A, class T>
void scatter(const A* src, int64_t pitch, const Rect& r, T* dst) {
  const bool dense_channels = r.m == 1 || r.channel_stride == 1;
  const bool dense_line = dense_channels && r.cross_stride == r.m;
  if (!dense_line && r.m == 1 && r.line_stride == 1) {
    scatter_transposed(src, pitch, r, dst);
    return;
  }
  for (int64_t l = 0; l < r.lines; ++l) {
    const A* line = src + l * pitch;
    T* out = dst + l * r.line_stride;
    if (dense_line) {
      copy_run_out(line, out, r.cross * r.m);
    } else if (dense_channels && r.m > 1) {
      for (int64_t p = 0; p < r.cross; ++p) copy_run_out(line + p * r.m, out + p * r.cross_stride, r.m);
    } else {
      for (int64_t p = 0; p < r.cross; ++p) {
        for (int64_t c = 0; c < r.m; ++c) {
          out[p * r.cross_stride + c * r.channel_stride] = narrow<T>(line[p * r.m + c]);
        }
      }
    }
  }
}

// `lines` lines of a map from image line `line` on, in place if they can be.
template <class T, class A = typename StateOf<T>::type>
Lines<A> bring(const T* src, int64_t lines, int64_t cross, int64_t m, int64_t line_stride, int64_t cross_stride,
               int64_t channel_stride, A* staging, int64_t pitch) {
  if (!src) return {nullptr, 0, 0};
  const bool dense_channels = m == 1 || channel_stride == 1;
  // With one channel a line, neighbours must be adjacent; with several, each pixel's channels.
  if constexpr (sizeof(T) == sizeof(A)) {
    if (dense_channels && (m > 1 || cross_stride == 1)) {
      return {const_cast<A*>(reinterpret_cast<const A*>(src)), line_stride, cross_stride};
    }
  }
  gather(src, Rect{lines, cross, m, line_stride, cross_stride, channel_stride}, staging, pitch);
  return {staging, pitch, m};
}

// Where a kernel writes: in place, or to staging that put() then scatters.
template <class T>
struct Output {
  using A = typename StateOf<T>::type;
  T* dst;
  Rect rect;
  Lines<A> lines;
  bool in_place;

  Output(T* dst, int64_t count, int64_t cross, int64_t m, int64_t line_stride, int64_t cross_stride,
         int64_t channel_stride, A* staging, int64_t pitch)
      : dst(dst), rect{count, cross, m, line_stride, cross_stride, channel_stride}, lines{nullptr, 0, 0}, in_place(false) {
    if (!dst) return;
    if constexpr (sizeof(T) == sizeof(A)) {
      in_place = (m == 1 || channel_stride == 1) && (m > 1 || cross_stride == 1);
    }
    lines = in_place ? Lines<A>{reinterpret_cast<A*>(dst), line_stride, cross_stride} : Lines<A>{staging, pitch, m};
  }
  void put() const {
    if (dst && !in_place) scatter(lines.data, lines.line, rect, dst);
  }
};

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
