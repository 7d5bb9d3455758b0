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

// Rows fetched ahead while columns are staged: a walk down the rows touches a new page every few steps, which the
// processor's own prefetchers do not follow.
constexpr int kAhead = 32;

// Columns as lines: V x V tiles through registers. Vectors are stored whole, so a destination line has room for a vector
// more than its elements; what is written there is zero, as the padding after a line has to be.
template <class A, class T>
void gather_transposed(const T* src, const Rect& r, A* dst, int64_t pitch) {
  constexpr int V = kLanes<A>;
  typename VectorOf<A>::type rows[V];
  for (int64_t p = 0; p < r.cross; p += V) {
    const int64_t present = r.cross - p < V ? r.cross - p : V;
    for (int64_t l = 0; l < r.lines; l += V) {
      const int64_t width = r.lines - l < V ? r.lines - l : V;
      const T* from = src + p * r.cross_stride + l;
      if (present == V && width == V) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) {
          rows[i] = load(from + i * r.cross_stride);
          __builtin_prefetch(from + (i + kAhead) * r.cross_stride);
        }
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) store(dst + (l + i) * pitch + p, rows[i]);
      } else {
        for (int i = 0; i < V; ++i) {
          rows[i] = i < present ? load_some<A>(from + i * r.cross_stride, width) : typename VectorOf<A>::type{};
        }
        transpose<A>(rows);
        for (int64_t i = 0; i < width; ++i) store(dst + (l + i) * pitch + p, rows[i]);
      }
    }
  }
}

// The same of the product of two tensors, dense in each row: one transpose instead of two.
template <class A, class T>
void gather_product(const T* a, int64_t a_cross, const T* b, int64_t b_cross, int64_t lines, int64_t cross, A* dst,
                    int64_t pitch) {
  constexpr int V = kLanes<A>;
  typename VectorOf<A>::type rows[V];
  for (int64_t p = 0; p < cross; p += V) {
    const int64_t present = cross - p < V ? cross - p : V;
    for (int64_t l = 0; l < lines; l += V) {
      const int64_t width = lines - l < V ? lines - l : V;
      const T *from_a = a + p * a_cross + l, *from_b = b + p * b_cross + l;
      if (present == V && width == V) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) {
          rows[i] = load(from_a + i * a_cross) * load(from_b + i * b_cross);
          __builtin_prefetch(from_a + (i + kAhead) * a_cross);
          __builtin_prefetch(from_b + (i + kAhead) * b_cross);
        }
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) store(dst + (l + i) * pitch + p, rows[i]);
      } else {
        for (int i = 0; i < V; ++i) {
          rows[i] = i < present ? load_some<A>(from_a + i * a_cross, width) * load_some<A>(from_b + i * b_cross, width)
                                : typename VectorOf<A>::type{};
        }
        transpose<A>(rows);
        for (int64_t i = 0; i < width; ++i) store(dst + (l + i) * pitch + p, rows[i]);
      }
    }
  }
}

template <class A, class T>
void scatter_transposed(const A* src, int64_t pitch, const Rect& r, T* dst, bool streaming) {
  constexpr int V = kLanes<A>;
  typename VectorOf<A>::type rows[V];
  for (int64_t p = 0; p < r.cross; p += V) {
    const int64_t present = r.cross - p < V ? r.cross - p : V;
    for (int64_t l = 0; l < r.lines; l += V) {
      const int64_t width = r.lines - l < V ? r.lines - l : V;
      T* to = dst + p * r.cross_stride + l;
      if (present == V && width == V) {
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i) rows[i] = load(src + (l + i) * pitch + p);
        transpose<A>(rows);
        if (streaming) {
#pragma GCC unroll 16
          for (int i = 0; i < V; ++i) stream<A>(to + i * r.cross_stride, rows[i]);
        } else {
#pragma GCC unroll 16
          for (int i = 0; i < V; ++i) store(to + i * r.cross_stride, rows[i]);
        }
      } else {
        for (int i = 0; i < V; ++i) {
          rows[i] = i < width ? load(src + (l + i) * pitch + p) : typename VectorOf<A>::type{};
        }
        transpose<A>(rows);
        for (int64_t i = 0; i < present; ++i) store_some<A>(to + i * r.cross_stride, rows[i], width);
      }
    }
  }
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
void scatter(const A* src, int64_t pitch, const Rect& r, T* dst, bool streaming) {
  const bool dense_channels = r.m == 1 || r.channel_stride == 1;
  const bool dense_line = dense_channels && r.cross_stride == r.m;
  if (!dense_line && r.m == 1 && r.line_stride == 1) {
    // Every vector of the tile has to be aligned for a streaming store.
    streaming = streaming && aligned<A>(dst) && r.cross_stride * sizeof(T) % GSPN_VECTOR_BYTES == 0;
    scatter_transposed(src, pitch, r, dst, streaming);
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

// `lines` lines of a map from image line `line` on, in place if they can be and `copy` does not ask otherwise.
template <class T, class A = typename StateOf<T>::type>
Lines<A> bring(const T* src, int64_t lines, int64_t cross, int64_t m, int64_t line_stride, int64_t cross_stride,
               int64_t channel_stride, A* staging, int64_t pitch, bool copy) {
  if (!src) return {nullptr, 0, 0};
  const bool dense_channels = m == 1 || channel_stride == 1;
  // With one channel a line, neighbours must be adjacent; with several, each pixel's channels.
  if constexpr (sizeof(T) == sizeof(A)) {
    if (!copy && dense_channels && (m > 1 || cross_stride == 1)) {
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
  void put(bool streaming) const {
    if (dst && !in_place) scatter(lines.data, lines.line, rect, dst, streaming);
  }
};

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
