// The C interface of the CPU line scan, and how a call is cut into items of work.
#pragma once

#include "../common/interface.h"

namespace gspn {

// A tensor [batch, group, tap, row, column]: an image of groups for each of the three taps.
struct Taps {
  Image image;
  int64_t tap;
};

// One call, forward or backward. Lines are rows: for scans over columns, the strides of rows and columns are exchanged.
struct LineScanCall {
  int32_t dtype;
  int32_t reverse;  // the first line scanned is the last one of the image
  int64_t batch, channels, groups, lines, cross;
  int64_t segment;       // >= 1; the number of lines for a global scan
  const int64_t* sizes;  // [batch][2], the lines and the cross extent of each image; null: they fill their maps
  Image x, lam, h;
  Taps taps;
  // Backward alone. x is read for dlam alone; gradients that are absent are not computed.
  Image grad, dx, dlam;
  Taps dtaps;

  GSPN_INLINE bool shared_taps() const { return groups != channels; }
  GSPN_INLINE int64_t segments() const { return (lines + segment - 1) / segment; }

  // The call as it is for one image alone: this one, or `own`, where the image is smaller than its map.
  GSPN_INLINE const LineScanCall& of_image(int64_t image, LineScanCall& own) const {
    if (!sizes) return *this;
    own = *this;
    own.lines = extent_within(sizes[2 * image], lines), own.cross = extent_within(sizes[2 * image + 1], cross);
    if (!own.lines || !own.cross) own.lines = own.cross = 0;
    return own;
  }
};

// How a call is cut into independent items of work. It depends on the shapes and, through `spans`, on the number of
// threads; sums are always taken within an item and over `partials` in a fixed order, so the bits do not depend on the
// cut.
struct LineScanPlan {
  bool interleaved;  // channels are the fastest axis: vectors run over channels, not over the line
  bool columns;      // lines are dense across, in every tensor: the lines are columns of images whose rows are dense
  int64_t block;     // channels an item takes
  int64_t blocks;    // blocks of a tap group (shared taps) or of all channels (per-channel taps)
  int64_t spans;     // runs of whole segments an item may be cut into
  int64_t tile;      // lines staged at a time where the layout cannot be walked in place
  int64_t pitch;     // elements between staged lines; a line has room for a pixel before it and a vector after it
  int64_t items;
  int64_t pixels;  // of a map
  void* partials;  // [blocks, batch, groups, 3, pixels] in the state's type, or null; a pixel's place is
                   // line * cross count + cross, with `columns` cross * line count + line, by the image's own counts

  // Items are ordered by their images.
  GSPN_INLINE int64_t image_of(const LineScanCall& call, int64_t item) const { return item / (items / call.batch); }
};

}  // namespace gspn
