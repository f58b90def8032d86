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

struct TileGrid {
  int64_t height, width, rows, columns;

  template <class T>
  explicit TileGrid(const RenderParams<T>& p)
      : height(p.height),
        width(p.width),
        rows((p.height + kTile - 1) / kTile),
        columns((p.width + kTile - 1) / kTile) {}

  int64_t per_view() const { return rows * columns; }
  int64_t view(int64_t tile) const { return tile / per_view(); }
  Pixel pixel(int64_t tile, int64_t slot) const {
    const int64_t row = tile % per_view() / columns * kTile + slot / kTile;
    const int64_t column = tile % columns * kTile + slot % kTile;
    return {row, column, row < height && column < width};
  }
};

constexpr int64_t kAhead = 8;  // samples between asking for memory and reading it

// Asks for the corners that sample k will read. Past the end of a ray the address may lie
// anywhere; a prefetch does not fault.
template <class T>
inline void prefetch(const Volume<T>& v, const Segment<T>& s, int64_t k) {
  const Int4 corner = locate(s, k).corner;
  const auto at = [](const T* p, int64_t elements) {
    return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + elements * sizeof(T));
  };
  const auto rows = [](const char* p, const int64_t* stride) {
    const int64_t y = stride[1] * static_cast<int64_t>(sizeof(T));
    const int64_t z = stride[2] * static_cast<int64_t>(sizeof(T));
    __builtin_prefetch(p);
    __builtin_prefetch(p + y);
    __builtin_prefetch(p + z);
    __builtin_prefetch(p + y + z);
  };
  rows(at(v.density, voxel_offset(v.density_stride, corner)), v.density_stride);
  const char* red = at(v.color, voxel_offset(v.color_stride, corner));
  const int64_t channel = v.channel_stride * static_cast<int64_t>(sizeof(T));
  for (int c = 0; c < 3; ++c) rows(red + c * channel, v.color_stride);
}

// Not inlined: seldom needed.
template <class T>
[[gnu::noinline]] void load_border(const Volume<T>& v, const Cell<T>& cell, Corners<T>& out) {
  out = load_border_corners(v, cell);
}

template <class T>
inline Corners<T> load(const Volume<T>& v, const Cell<T>& cell) {
  if (is_inside(v.size, cell)) [[likely]]
    return load_corners(v, cell);
  Corners<T> corners;
  load_border(v, cell, corners);
  return corners;
}

// How many samples from k on, at least 0, certainly lie in the same empty block.
template <class T>
inline int64_t empty_run(const RenderParams<T>& p, const Segment<T>& s, const Cell<T>& cell,
                         int64_t k) {
  if (p.occupied[BlockGrid(p.volume.size).index(cell.corner)] != 0) return 0;
  return std::min<int64_t>(s.count - k, samples_in_block(s, cell));
}

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
