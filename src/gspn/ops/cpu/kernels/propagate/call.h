// The plain C interface of the CPU propagate, and how a call is cut into items of work.
#pragma once

#include "../common/interface.h"

namespace gspn {

enum Direction : int32_t { kDown = 0, kUp = 1, kRight = 2, kLeft = 3 };

// One call, forward or backward.
//
// Projections and the proxy are dense and of the state's type: tap_proj [direction, groups, 3, proxy_channels],
// lam_proj and u_proj [direction, channels, proxy_channels], skip_proj [channels, proxy_channels] or null, proxy
// [batch, height, width, proxy_channels], whose rows begin proxy_row elements apart and whose images proxy_image. A
// vector may be read beyond the proxy's end.
struct PropagateCall {
  int32_t dtype;
  int32_t direction_count;
  int32_t directions[4];
  int64_t batch, channels, groups, proxy_channels, height, width;
  int64_t proxy_row, proxy_image;
  int64_t segment;       // >= 1; beyond the number of lines for a global scan
  const int64_t* sizes;  // [batch][2], the height and width of each image; null: they fill their maps
  Image x, y;
  const void *proxy, *tap_proj, *lam_proj, *u_proj, *skip_proj;
  // Backward alone, gradients as what they are gradients of.
  Image grad, dx;
  void *dproxy, *dtap_proj, *dlam_proj, *du_proj, *dskip_proj;

  GSPN_INLINE int64_t pixels() const { return height * width; }
  GSPN_INLINE int64_t longest() const { return height > width ? height : width; }

  // The call as it is for one image alone: this one, or `own`, where the image is smaller than its map.
  GSPN_INLINE const PropagateCall& of_image(int64_t image, PropagateCall& own) const {
    if (!sizes) return *this;
    own = *this;
    own.height = extent_within(sizes[2 * image], height), own.width = extent_within(sizes[2 * image + 1], width);
    if (!own.height || !own.width) own.height = own.width = 0;
    return own;
  }
};

// A block is as many channels as a vector has lanes: vectors run over channels, so nothing in a scan depends on what is
// beside it, and an item of work is one block of one batch entry.
struct PropagatePlan {
  int64_t blocks;                 // of all channels; the last may be partly empty
  bool shared;                    // a block's channels share their taps
  bool keep_x, keep_y;            // the block's whole image stays in scratch, else a tile of it at a time
  bool fetch;                     // pixels are fetched a little ahead: images that do not stay in the caches
  bool direct;                    // channels_last in the state's type: whole blocks are walked where they are
  bool y_in_place;                // whole blocks of y are gathered in y's own memory and transposed at the end
  int64_t row_tile, column_tile;  // lines of a tile, for walks over rows and over columns
  bool separate;                  // an item is one direction, whose result goes to `parts`: few blocks, many threads
  int64_t spans;                  // runs of whole segments that an item is one of; 1 unless `separate`
  int64_t chunks;                 // backward: runs of blocks that add to the same part of the proxy's gradient
  int64_t items;
  int64_t pixels;  // of a map
  void* packed;    // [blocks][packed_size]: the projections as the kernels read them
  int64_t packed_size;
  void* parts;         // `separate`: [direction][batch][blocks][pixels][lanes], of which an image takes the first
  void* proxy_parts;   // backward: [chunks][batch][proxy_image]
  void* weight_parts;  // backward: [batch][blocks][weight_size], as `packed` but with a vector for each shared tap
  int64_t weight_size;
};

}  // namespace gspn
