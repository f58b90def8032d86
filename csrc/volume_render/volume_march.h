// What both passes of the CPU renderer share: tiles of rays, and lookups along a ray.
//
// Rays go in tiles of 8 x 8 pixels, whose samples share cache lines. For the files under
// LATENTDEM_ISA_SOURCES only.
#pragma once

#include <algorithm>

#include "volume_render/volume_render.h"

namespace latentdem {
namespace LATENTDEM_ISA {

constexpr int64_t kTile = 8;              // pixels
constexpr int64_t kRays = kTile * kTile;  // of a tile

struct Pixel {
  int64_t row, column;
  bool inside;  // the image, which need not be a multiple of the tile
};

struct Tile {
  int64_t view, row, column;  // of the tile

  template <class T>
  Pixel pixel(const RenderParams<T>& p, int64_t slot) const {
    const int64_t y = row * kTile + slot / kTile, x = column * kTile + slot % kTile;
    return {y, x, y < p.height && x < p.width};
  }
};

LATENTDEM_HD int64_t tile_count(int64_t pixels) { return (pixels + kTile - 1) / kTile; }

constexpr int64_t kAhead = 8;  // samples between asking for memory and reading it

// Asks for the corners that sample k will read. Past the end of a ray the address may lie
// anywhere; a prefetch does not fault. (Always inlined: GCC drops calls that only prefetch.)
template <class T>
LATENTDEM_HD void prefetch(const PackedVolume<T>& v, const Segment<T>& s, int64_t k) {
  const Int4 corner = locate(s, std::min(k, s.count - 1)).corner;
  const Plane near = v.planes[corner[2]], far = v.planes[corner[2] + 1];
  const T *a = v.at(near, corner), *b = v.at(far, corner);
  __builtin_prefetch(a);
  __builtin_prefetch(a + 4 * near.row);
  __builtin_prefetch(b);
  __builtin_prefetch(b + 4 * far.row);
}

// How many samples from k on, at least 0, certainly lie in the same empty block.
template <class T>
LATENTDEM_HD int64_t empty_run(const RenderParams<T>& p, const Segment<T>& s, const Cell<T>& cell,
                               int64_t k) {
  if (p.occupied[BlockGrid(p.volume.size).index(cell.corner)] != 0) return 0;
  return std::min<int64_t>(s.count - k, samples_in_block(s, cell));
}

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
