// The padding of a map whose image is smaller: zeros, written by the item of work that writes the image.
#pragma once

#include "simd.h"

namespace gspn::GSPN_ISA {
namespace {

// Zeros in `channels` channels of a map of `rows` x `columns`, beyond the first `height` rows and `width` columns.
template <class T>
void clear_padding(T* data, Image image, int64_t channels, int64_t rows, int64_t columns, int64_t height,
                   int64_t width) {
  if (!data || (height == rows && width == columns)) return;
  const auto swap = [](int64_t& a, int64_t& b) {
    const int64_t first = a;
    a = b, b = first;
  };
  if (image.row == 1) swap(image.row, image.column), swap(rows, columns), swap(height, width);
  const bool dense = image.channel == 1;  // all channels of a pixel lie side by side
  for (int64_t c = 0; c < (dense ? 1 : channels); ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = r < height ? width : 0;
      T* row = data + c * image.channel + r * image.row;
      if (!dense && image.column == 1) {
        clear(row + from, columns - from);
      } else {
        for (int64_t j = from; j < columns; ++j) clear(row + j * image.column, dense ? channels : 1);
      }
    }
  }
}

}  // namespace
}  // namespace gspn::GSPN_ISA
