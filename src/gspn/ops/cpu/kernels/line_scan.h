// The plain C interface of the CPU line scan. No Python, no torch: one binary serves every version of both.
#pragma once

#include "interface.h"

namespace gspn {

// A tensor [batch, channel, line, cross] wherever its elements are. Strides count elements; lines are in image order.
struct Map {
  void* data;  // null: absent
  int64_t batch, channel, line, cross;
};

// A tensor [batch, group, tap, line, cross].
struct TapMap {
  void* data;
  int64_t batch, group, tap, line, cross;
};

// One call, forward or backward. The Python side mirrors this struct field by field; kInterfaceVersion guards it.
struct LineScanCall {
  int32_t dtype;
  int32_t reverse;  // the first line scanned is the last one of the image
  int64_t batch, channels, groups, lines, cross;
  int64_t segment;  // >= 1; the number of lines for a global scan
  Map x, lam, h;
  TapMap taps;
  // Backward alone. x is read for dlam alone; an absent output is not wanted.
  Map grad, dx, dlam;
  TapMap dtaps;
};

// How a call is cut into independent items of work. It depends on the shapes and, through `spans`, on the number of
// threads; sums are always taken within an item and over `partials` in a fixed order, so the bits depend on neither.
struct Plan {
  bool interleaved;   // channels are the fastest axis: vectors run over channels, not over the line
  bool columns;       // columns are the lines and rows are dense, in every tensor
  int64_t block;      // channels an item takes
  int64_t blocks;     // blocks of a tap group (shared taps) or of all channels (per-channel taps)
  int64_t spans;      // runs of whole segments an item may be cut into
  int64_t tile;       // lines staged at a time where the layout cannot be walked in place
  int64_t pitch;      // elements between staged lines
  int64_t items;
  size_t scratch_bytes;  // for each worker
  void* partials;        // [blocks, batch, groups, 3, pixels] in the state's type, or null; a pixel's place is
                         // line * cross count + cross, with `columns` cross * line count + line
};

}  // namespace gspn
