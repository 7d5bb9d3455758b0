// A block of channels, as many as a vector has lanes, between memory and scratch [row][column][lane], converted on the
// way.
#pragma once

#include "../common/padding.h"
#include "call.h"

namespace gspn::GSPN_ISA {
namespace {

// A rectangle of an image.
struct Rectangle {
  int64_t row, rows, column, columns;
};

// The channels of one block: `count` from `first` on, of one batch entry.
struct Channels {
  int64_t batch, block, first, count;
  Channels(const PropagateCall& call, int64_t batch, int64_t block, int64_t lanes)
      : batch(batch), block(block), first(block * lanes), count(minimum(lanes, call.channels - first)) {}
};

template <class T>
GSPN_INLINE T* pixel_of(const Image& image, const Channels& channels, int64_t row, int64_t column) {
  return static_cast<T*>(image.data) + channels.batch * image.batch + channels.first * image.channel + row * image.row +
         column * image.column;
}

// Zeros in the padding of an output; `map` is the call for the whole map and `own` the one for the image.
template <class T>
GSPN_INLINE void clear_padding_of(const PropagateCall& map, const PropagateCall& own, const Image& image,
                                  const Channels& channels) {
  if (!map.sizes) return;
  clear_padding(pixel_of<T>(image, channels, 0, 0), image, channels.count, map.height, map.width, own.height,
                own.width);
}

// A rectangle in scratch: the pixel at (row, column) of the image is a vector at data + (row - at.row) * row + ...
template <class A>
struct Tile {
  A* data;
  Rectangle at;
  int64_t row, column;  // strides, in elements

  // Row after row; or, for a walk over columns, column after column. An odd vector between the columns keeps the rows
  // of a square of a power of two on different cache sets.
  static Tile by_rows(A* data, const Rectangle& at) { return {data, at, at.columns * kLanes<A>, kLanes<A>}; }
  static Tile by_columns(A* data, const Rectangle& at) {
    return {data, at, kLanes<A>, (at.rows + 1 - at.rows % 2) * kLanes<A>};
  }
  GSPN_INLINE A* pixel(int64_t r, int64_t c) const { return data + (r - at.row) * row + (c - at.column) * column; }
  // The part of it that lies in another rectangle.
  Tile part(const Rectangle& other) const { return {pixel(other.row, other.column), other, row, column}; }
};

// Rows ahead of the one read that are fetched: a step from row to row is beyond what processors fetch themselves.
constexpr int64_t kRowsAhead = 2;

// Lanes beyond the last channel are zero.
template <class T, class A = typename StateOf<T>::type>
void read_block(const Image& image, const Channels& channels, const Tile<A>& tile) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const Rectangle& at = tile.at;
  const int64_t count = channels.count;
  for (int64_t i = 0; i < at.rows; ++i) {
    A* out = tile.data + i * tile.row;
    const T* row = pixel_of<const T>(image, channels, at.row + i, at.column);
    if (image.channel == 1 || count == 1) {
      for (int64_t j = 0; j < at.columns; ++j) {
        __builtin_prefetch(row + (j + 16) * image.column);
        if (at.columns < 32) __builtin_prefetch(row + j * image.column + kRowsAhead * image.row);
        store(out + j * tile.column, load_some<A>(row + j * image.column, count));
      }
    } else if (image.column == 1) {
      for (int64_t j = 0; j < at.columns; j += L) {
        const int64_t width = at.columns - j;
        V square[L];
        for (int c = 0; c < L; ++c) {
          __builtin_prefetch(row + c * image.channel + j + kRowsAhead * image.row);
          square[c] = c < count ? load_some<A>(row + c * image.channel + j, width) : V{};
        }
        transpose<A>(square);
        for (int64_t p = 0; p < L && p < width; ++p) store(out + (j + p) * tile.column, square[p]);
      }
    } else {
      for (int64_t j = 0; j < at.columns; ++j) {
        for (int64_t c = 0; c < L; ++c) {
          out[j * tile.column + c] = c < count ? widen(row[c * image.channel + j * image.column]) : A(0);
        }
      }
    }
  }
}

template <class T, class A = typename StateOf<T>::type>
void write_block(const Tile<A>& tile, const Image& image, const Channels& channels) {
  using V = typename VectorOf<A>::type;
  constexpr int L = kLanes<A>;
  const Rectangle& at = tile.at;
  const int64_t count = channels.count;
  for (int64_t i = 0; i < at.rows; ++i) {
    const A* in = tile.data + i * tile.row;
    T* row = pixel_of<T>(image, channels, at.row + i, at.column);
    if (image.channel == 1 || count == 1) {
      for (int64_t j = 0; j < at.columns; ++j) store_some<A>(row + j * image.column, load(in + j * tile.column), count);
    } else if (image.column == 1) {
      for (int64_t j = 0; j < at.columns; j += L) {
        const int64_t width = at.columns - j;
        V square[L];
        for (int64_t p = 0; p < L; ++p) square[p] = p < width ? load(in + (j + p) * tile.column) : V{};
        transpose<A>(square);
        for (int64_t c = 0; c < count; ++c) store_some<A>(row + c * image.channel + j, square[c], width);
      }
    } else {
      for (int64_t j = 0; j < at.columns; ++j) {
        for (int64_t c = 0; c < count; ++c)
          row[c * image.channel + j * image.column] = narrow<T>(in[j * tile.column + c]);
      }
    }
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
