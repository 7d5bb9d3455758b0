// Tensors as a few lines at a time: walked where they lie, or staged in scratch as [line][cross][m] of the state's
// type.
#pragma once

#include "transpose.h"

namespace gspn::GSPN_ISA {
namespace {

// `lines` x `cross` positions of `m` channels of a tensor. Strides count elements.
template <class T>
struct View {
  T* data;  // null: absent
  int64_t lines, cross, m;
  int64_t line_stride, cross_stride, channel_stride;

  bool dense_channels() const { return m == 1 || channel_stride == 1; }
  bool dense_line() const { return dense_channels() && cross_stride == m; }
  bool dense_columns() const { return m == 1 && line_stride == 1 && cross_stride != 1; }
  // With one channel a line, neighbours must be adjacent; with several, each pixel's channels.
  bool walkable() const {
    return sizeof(T) == sizeof(typename StateOf<T>::type) && dense_channels() && (m > 1 || cross_stride == 1);
  }
};

// Line l starts at data + l * line, cross position p of it at p * cross.
template <class A>
struct Lines {
  A* data;
  int64_t line, cross;
  GSPN_INLINE A* at(int64_t l) const { return data ? data + l * line : nullptr; }
  GSPN_INLINE A* position(int64_t p) const { return data + p * cross; }
};

template <class A, class T>
void gather(const View<T>& v, A* dst, int64_t pitch) {
  if (v.dense_columns()) {
    gather_transposed(v.data, v.cross_stride, v.lines, v.cross, dst, pitch);
    return;
  }
  for (int64_t l = 0; l < v.lines; ++l) {
    const T* line = v.data + l * v.line_stride;
    A* out = dst + l * pitch;
    if (v.dense_line()) {
      copy_in(line, out, v.cross * v.m);
    } else if (v.dense_channels() && v.m > 1) {
      for (int64_t p = 0; p < v.cross; ++p) copy_in(line + p * v.cross_stride, out + p * v.m, v.m);
    } else if (v.channel_stride == 3) {
      // Taps in channels_last lie [cross][channel][tap]; a constant stride lets the compiler de-interleave in
      // registers.
      for (int64_t p = 0; p < v.cross; ++p) {
        const T* pixel = line + p * v.cross_stride;
        for (int64_t c = 0; c < v.m; ++c) out[p * v.m + c] = widen(pixel[c * 3]);
      }
    } else {
      for (int64_t p = 0; p < v.cross; ++p) {
        const T* pixel = line + p * v.cross_stride;
        for (int64_t c = 0; c < v.m; ++c) out[p * v.m + c] = widen(pixel[c * v.channel_stride]);
      }
    }
  }
}

template <class A, class T>
void scatter(const A* src, int64_t pitch, const View<T>& v) {
  if (v.dense_columns()) {
    scatter_transposed(src, pitch, v.lines, v.cross, v.data, v.cross_stride);
    return;
  }
  for (int64_t l = 0; l < v.lines; ++l) {
    const A* line = src + l * pitch;
    T* out = v.data + l * v.line_stride;
    if (v.dense_line()) {
      copy_out(line, out, v.cross * v.m);
    } else if (v.dense_channels() && v.m > 1) {
      for (int64_t p = 0; p < v.cross; ++p) copy_out(line + p * v.m, out + p * v.cross_stride, v.m);
    } else {
      for (int64_t p = 0; p < v.cross; ++p) {
        for (int64_t c = 0; c < v.m; ++c) {
          out[p * v.cross_stride + c * v.channel_stride] = narrow<T>(line[p * v.m + c]);
        }
      }
    }
  }
}

// The lines of a view: where they are if they can be walked there, else copied to `staging`.
template <class T, class A = typename StateOf<T>::type>
Lines<A> load_or_view(const View<T>& v, A* staging, int64_t pitch) {
  if (!v.data) return {nullptr, 0, 0};
  if (v.walkable()) return {reinterpret_cast<A*>(v.data), v.line_stride, v.cross_stride};
  gather(v, staging, pitch);
  return {staging, pitch, v.m};
}

// Where a kernel writes: in place, or to staging that flush() then copies to the tensor.
template <class T, class A = typename StateOf<T>::type>
struct Output {
  View<T> view;
  Lines<A> lines;

  Output(const View<T>& view, A* staging, int64_t pitch) : view(view), lines{nullptr, 0, 0} {
    if (!view.data) return;
    lines = view.walkable() ? Lines<A>{reinterpret_cast<A*>(view.data), view.line_stride, view.cross_stride}
                            : Lines<A>{staging, pitch, view.m};
  }
  void flush() const {
    if (view.data && !view.walkable()) scatter(lines.data, lines.line, view);
  }
};

}  // namespace
}  // namespace gspn::GSPN_ISA
