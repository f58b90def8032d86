// What both passes of the CPU renderer share: tiles of rays, and lookups along a ray.
//
// A trilinear lookup is four loads of eight numbers, since the two corners along x are
// neighbours in memory. Rays go in tiles of 8 x 8 pixels, whose samples share cache lines.
#pragma once

#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "volume_render/volume_render.h"

namespace latentdem {

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

// The samples of a ray that lie in the grid: number k at padded voxel entry + k step.
template <class T>
struct Segment {
  Four<T> entry, step;
  int64_t count = 0;
  T near;  // distance of sample 0
};

template <class T>
LATENTDEM_INLINE Segment<T> clip_ray(const RenderParams<T>& p, const Ray& ray) {
  const int64_t size[3] = {p.volume.width, p.volume.height, p.volume.depth};
  const double dt = p.step(), t = p.near + 0.5 * dt;
  double start[3], step[3];
  for (int i = 0; i < 3; ++i) {
    const double scale = voxel_scale(size[i]);
    start[i] = scale * (ray.origin[i] + t * ray.direction[i]) + voxel_offset(size[i]);
    step[i] = scale * dt * ray.direction[i];
  }
  const SampleRange range = clip_samples(start, step, size, p.samples);
  const auto first = static_cast<double>(range.first);
  Segment<T> s;
  s.entry = s.step = Four<T>{};
  for (int i = 0; i < 3; ++i) {
    s.entry[i] = static_cast<T>(start[i] + first * step[i]);
    s.step[i] = static_cast<T>(step[i]);
  }
  s.count = range.last - range.first;
  s.near = static_cast<T>(t + first * dt);
  return s;
}

template <class T>
struct Cell {
  Four<T> fraction;
  Int4 corner;
};

template <class T>
LATENTDEM_INLINE Cell<T> locate(const Segment<T>& s, int64_t k) {
  const Four<T> position = s.entry + static_cast<T>(k) * s.step;
  const Int4 corner = __builtin_convertvector(position, Int4);  // none is negative
  return {position - __builtin_convertvector(corner, Four<T>), corner};
}

template <class T>
LATENTDEM_INLINE int64_t voxel_index(const VolumeShape& s, const Cell<T>& c) {
  return c.corner[2] * s.plane() + c.corner[1] * s.row() + c.corner[0];
}

// Asks for the corners that sample k will read. Past the end of a ray the address may lie
// anywhere; a prefetch does not fault.
template <class T>
LATENTDEM_INLINE void prefetch(const VolumeShape& shape, const T* voxels, const Segment<T>& s,
                               int64_t k) {
  const T* corner = voxels + 4 * voxel_index(shape, locate(s, k));
  const int64_t row = 4 * shape.row(), plane = 4 * shape.plane();
  __builtin_prefetch(corner);
  __builtin_prefetch(corner + row);
  __builtin_prefetch(corner + plane);
  __builtin_prefetch(corner + plane + row);
}

template <class T>
LATENTDEM_INLINE Four<T> interpolate(const T* corner, int64_t row, int64_t plane,
                                     const Four<T>& f) {
  using E = Eight<T>;
  const E a = load<E>(corner), b = load<E>(corner + row);
  const E c = load<E>(corner + plane), d = load<E>(corner + plane + row);
  const E top = a + f[1] * (b - a), bottom = c + f[1] * (d - c);
  const E edge = top + f[2] * (bottom - top);
  return low_half<T>(edge) + f[0] * (high_half<T>(edge) - low_half<T>(edge));
}

// The same, with the slopes per voxel along x, y and z.
template <class T>
LATENTDEM_INLINE Four<T> interpolate_slopes(const T* corner, int64_t row, int64_t plane,
                                            const Four<T>& f, Four<T>* slope) {
  using E = Eight<T>;
  const E a = load<E>(corner), b = load<E>(corner + row);
  const E c = load<E>(corner + plane), d = load<E>(corner + plane + row);
  const E ba = b - a, dc = d - c;
  const E top = a + f[1] * ba, bottom = c + f[1] * dc;
  const E z = bottom - top, y = ba + f[2] * (dc - ba), edge = top + f[2] * z;
  slope[0] = high_half<T>(edge) - low_half<T>(edge);
  slope[1] = low_half<T>(y) + f[0] * (high_half<T>(y) - low_half<T>(y));
  slope[2] = low_half<T>(z) + f[0] * (high_half<T>(z) - low_half<T>(z));
  return low_half<T>(edge) + f[0] * slope[0];
}

// The transpose of interpolate: adds the weighted gradient to the eight corners.
template <class T>
LATENTDEM_INLINE void scatter(T* corner, int64_t row, int64_t plane, const Four<T>& f,
                              const Four<T>& gradient) {
  using E = Eight<T>;
  const Four<T> right = f[0] * gradient, left = gradient - right;
  const E both = __builtin_shufflevector(left, right, 0, 1, 2, 3, 4, 5, 6, 7);
  const E bottom = f[2] * both, top = both - bottom;
  const E top_far = f[1] * top, bottom_far = f[1] * bottom;
  store(corner, load<E>(corner) + (top - top_far));
  store(corner + row, load<E>(corner + row) + top_far);
  store(corner + plane, load<E>(corner + plane) + (bottom - bottom_far));
  store(corner + plane + row, load<E>(corner + plane + row) + bottom_far);
}

// How many samples from k on, at least 0, certainly lie in the same empty block.
template <class T>
LATENTDEM_INLINE int64_t empty_run(const RenderParams<T>& p, const Segment<T>& s,
                                   const Cell<T>& cell, int64_t k) {
  constexpr int kBits = VolumeShape::kBlockBits;
  const Int4 block = cell.corner >> kBits;
  const auto& v = p.volume;
  if (p.occupied[(block[2] * v.blocks_y() + block[1]) * v.blocks_x() + block[0]] != 0) return 0;
  T samples = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < 3; ++i) {
    if (s.step[i] == 0) continue;
    const int32_t wall = (block[i] + (s.step[i] > 0 ? 1 : 0)) << kBits;
    const T here = static_cast<T>(cell.corner[i]) + cell.fraction[i];
    samples = std::min(samples, (static_cast<T>(wall) - here) / s.step[i]);
  }
  return std::min(s.count - k, std::max<int64_t>(static_cast<int64_t>(samples), 1));
}

}  // namespace latentdem
