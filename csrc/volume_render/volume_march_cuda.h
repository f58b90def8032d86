// What the CUDA renderer's passes share: tiles of rays, and the march along a ray.
//
// A warp takes a tile of 8 x 4 pixels, whose samples share cache lines, and a block four of them,
// two by two. Lanes hop over empty space on their own and meet again at every sample.
#pragma once

#include "common/cuda_reduce.h"
#include "volume_render/volume_render_cuda.h"

namespace latentdem {

constexpr int kRenderThreads = 128;

struct TilePixel {
  int64_t view, row, column;
  bool inside;  // the image, which need not be a multiple of the tile

  template <class T>
  __device__ TilePixel(const RenderParams<T>& p, const RenderTiles& tiles, int64_t tile)
      : view(tile / tiles.per_view()),
        row(tile % tiles.per_view() / tiles.columns * RenderTiles::kHeight),
        column(tile % tiles.columns * RenderTiles::kWidth) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    row += warp / 2 * 4 + lane / 8;
    column += warp % 2 * 8 + lane % 8;
    inside = row < p.height && column < p.width;
  }
  // Of plane `channel` among `channels`, in [N,channels,h,w].
  template <class T>
  __device__ int64_t index(const RenderParams<T>& p, int64_t channel, int64_t channels) const {
    return ((view * channels + channel) * p.height + row) * p.width + column;
  }
};

// A ray on its way through the grid: before sample k of `end`.
template <class T>
struct March {
  Segment<T> segment{};
  Cell<T> cell{};
  int32_t k = 0, end = 0;
  int64_t occupied = -1;  // the last block known to be

  // The cell that holds sample k. Rounding may lead outside, by less than a voxel unless the
  // grid is absurdly long, never to memory outside.
  __device__ void find_cell(const int64_t* size) {
    const Four<T> position = segment.entry + static_cast<T>(k) * segment.step;
    cell.corner = truncate<T>(position);
    for (int i = 0; i < 3; ++i) {
      const auto last = static_cast<int32_t>(size[i]);
      cell.corner[i] = cell.corner[i] < 0 ? 0 : cell.corner[i] > last ? last : cell.corner[i];
    }
    cell.fraction = position - convert<T>(cell.corner);
  }

  // Goes on to the next sample that is not in an empty block; false at the end.
  __device__ bool seek(const RenderParams<T>& p) {
    while (k < end) {
      find_cell(p.volume.size);
      if (p.occupied == nullptr) return true;
      const int64_t block = BlockGrid(p.volume.size).index(cell.corner);
      if (block == occupied) return true;
      if (p.occupied[block] != 0) {
        occupied = block;
        return true;
      }
      const int32_t run = samples_in_block(segment, cell);
      k = run < end - k ? k + run : end;
    }
    return false;
  }
};

// Loads and stores of 16 bytes.
__device__ inline Four<float> load_four(const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Four<double> load_four(const double* from) {
  const auto* pair = reinterpret_cast<const double2*>(from);
  const double2 low = pair[0], high = pair[1];
  return {{low.x, low.y, high.x, high.y}};
}
__device__ inline void store_four(float* to, const Four<float>& v) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ inline void store_four(double* to, const Four<double>& v) {
  auto* pair = reinterpret_cast<double2*>(to);
  pair[0] = make_double2(v[0], v[1]);
  pair[1] = make_double2(v[2], v[3]);
}

// Offset of the lowest corner in the padded grid, in voxels.
template <class T>
__device__ inline int64_t padded_offset(const int64_t* size, const Cell<T>& cell) {
  return (cell.corner[2] * (size[1] + 2) + cell.corner[1]) * (size[0] + 2) + cell.corner[0];
}

// The corners of the cell whose lowest one is voxel `at` of the packed grid.
template <class T>
__device__ inline Corners<T> load_packed_corners(const int64_t* size, const T* voxels, int64_t at) {
  const int64_t row = size[0] + 2, plane = row * (size[1] + 2);
  Corners<T> corners;
  for (int i = 0; i < 4; ++i) {
    const T* left = voxels + 4 * (at + (i & 1) * row + (i >> 1) * plane);
    corners.pair[i] = join<T>(load_four(left), load_four(left + 4));
  }
  return corners;
}

}  // namespace latentdem
