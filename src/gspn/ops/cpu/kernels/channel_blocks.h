// A block of channels, as many as a vector has lanes, between memory and scratch [row][column][lane], converted on the way.
#pragma once

#include "propagate.h"
#include "simd.h"

namespace gspn {
namespace GSPN_ISA {
namespace {

// A rectangle of a picture.
struct Rectangle {
  int64_t row, rows, column, columns;
};

template <class T>
GSPN_INLINE T* pixel_of(const Image& image, int64_t batch, int64_t channel, int64_t row, int64_t column) {
  return static_cast<T*>(image.data) + batch * image.batch + channel * image.channel + row * image.row +
         column * image.column;
}

// `count` channels from `channel` on; lanes beyond them are zero.
template <class T, class A = typename StateOf<T>::type>
void read_block(const Image& image, int64_t batch, int64_t channel, int64_t count, const Rectangle& at, A* out) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < at.rows; ++i, out += at.columns * L) {
    const T* row = pixel_of<const T>(image, batch, channel, at.row + i, at.column);
    if (image.channel == 1 || count == 1) {
      for (int64_t j = 0; j < at.columns; ++j) {
        __builtin_prefetch(row + (j + 16) * image.column);
        store(out + j * L, load_some<A>(row + j * image.column, count));
      }
    } else if (image.column == 1) {
      for (int64_t j = 0; j < at.columns; j += L) {
        const int64_t width = at.columns - j;
        V square[L];
        for (int c = 0; c < L; ++c) square[c] = c < count ? load_some<A>(row + c * image.channel + j, width) : V{};
        transpose<A>(square);
        for (int64_t p = 0; p < L && p < width; ++p) store(out + (j + p) * L, square[p]);
      }
    } else {
      for (int64_t j = 0; j < at.columns; ++j) {
        for (int64_t c = 0; c < L; ++c) {
          out[j * L + c] = c < count ? widen(row[c * image.channel + j * image.column]) : A(0);
        }
      }
    }
  }
}

template <class T, class A = typename StateOf<T>::type>
void write_block(const A* in, const Image& image, int64_t batch, int64_t channel, int64_t count, const Rectangle& at) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < at.rows; ++i, in += at.columns * L) {
    T* row = pixel_of<T>(image, batch, channel, at.row + i, at.column);
    if (image.channel == 1 || count == 1) {
      for (int64_t j = 0; j < at.columns; ++j) store_some<A>(row + j * image.column, load(in + j * L), count);
    } else if (image.column == 1) {
      for (int64_t j = 0; j < at.columns; j += L) {
        const int64_t width = at.columns - j;
        V square[L];
        for (int64_t p = 0; p < L; ++p) square[p] = p < width ? load(in + (j + p) * L) : V{};
        transpose<A>(square);
        for (int64_t c = 0; c < count; ++c) store_some<A>(row + c * image.channel + j, square[c], width);
      }
    } else {
      for (int64_t j = 0; j < at.columns; ++j) {
        for (int64_t c = 0; c < count; ++c) row[c * image.channel + j * image.column] = narrow<T>(in[j * L + c]);
      }
    }
  }
}

}  // namespace
}  // namespace GSPN_ISA
}  // namespace gspn
