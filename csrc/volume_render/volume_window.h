// The part of the grid that a batch of rays needs, packed (see PackedVolume): a rectangle of
// every plane. For the files under LATENTDEM_ISA_SOURCES only.
#pragma once

#include <algorithm>
#include <limits>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/vector_buffer.h"
#include "volume_render/volume_render.h"

namespace latentdem {
namespace LATENTDEM_ISA {

// Padded voxels x0 <= x < x1, y0 <= y < y1.
struct Rectangle {
  int32_t x0, x1, y0, y1;
};

constexpr int64_t kGroup = 8;  // planes whose rectangles are alike
constexpr Rectangle kNowhere{std::numeric_limits<int32_t>::max(), 0,
                             std::numeric_limits<int32_t>::max(), 0};

LATENTDEM_HD Rectangle join(const Rectangle& a, const Rectangle& b) {
  return {std::min(a.x0, b.x0), std::max(a.x1, b.x1), std::min(a.y0, b.y0), std::max(a.y1, b.y1)};
}

// A sample on the far border, at size + 1, reads the voxel behind it.
LATENTDEM_HD int64_t padded(int64_t size) { return size + 3; }
LATENTDEM_HD int64_t group_count(const int64_t* size) { return padded(size[2]) / kGroup + 1; }

template <class T>
class Window {
 public:
  explicit Window(const Volume<T>& volume)
      : volume_(volume), planes_(padded(volume.size[2])), voxels_(0) {}

  PackedVolume<T> packed() const { return {voxels_.get(), planes_.get()}; }

  void pack_everything() {
    const auto width = static_cast<int32_t>(padded(volume_.size[0]));
    const auto height = static_cast<int32_t>(padded(volume_.size[1]));
    pack([&](int64_t) { return Rectangle{0, width, 0, height}; });
  }

  // rectangle(group) for every group of planes.
  template <class Function>
  void pack(const Function& rectangle) {
    const int64_t depth = padded(volume_.size[2]);
    int64_t voxels = 0;
    for (int64_t z = 0; z < depth; ++z) {
      const Rectangle r = rectangle(z / kGroup);
      if (r.x0 >= r.x1) continue;
      const int64_t row = r.x1 - r.x0;
      planes_.get()[z] = {voxels - r.y0 * row - r.x0, row};
      voxels += row * (r.y1 - r.y0);
    }
    if (voxels_.reserve(4 * voxels)) prefer_huge_pages(voxels_.get(), 4 * voxels * sizeof(T));
    parallel_for(depth, 1, [&](int64_t begin, int64_t end) {
      for (int64_t z = begin; z < end; ++z) {
        const Rectangle r = rectangle(z / kGroup);
        for (int64_t y = r.y0; y < r.y1; ++y) {
          const Plane plane = planes_.get()[z];
          pack_row(r.x0, r.x1, y, z, voxels_.get() + 4 * (plane.start + y * plane.row + r.x0));
        }
      }
    });
  }

 private:
  void pack_row(int64_t x0, int64_t x1, int64_t y, int64_t z, T* out) const {
    const Volume<T>& v = volume_;
    const auto zero = [](T* from, T* to) {
      for (; from < to; ++from) *from = 0;
    };
    const bool exists = y >= 1 && y <= v.size[1] && z >= 1 && z <= v.size[2];
    const int64_t begin = std::max<int64_t>(x0, 1), end = std::min<int64_t>(x1, v.size[0] + 1);
    if (!exists || begin >= end) return zero(out, out + 4 * (x1 - x0));
    zero(out, out + 4 * (begin - x0));
    zero(out + 4 * (end - x0), out + 4 * (x1 - x0));
    const auto from = [&](const T* base, const int64_t* stride) {
      return base + (begin - 1) * stride[0] + (y - 1) * stride[1] + (z - 1) * stride[2];
    };
    const T* d = from(v.density, v.density_stride);
    const T* r = from(v.color, v.color_stride);
    const T *g = r + v.channel_stride, *b = g + v.channel_stride;
    const auto copy = [&](int64_t density_step, int64_t color_step) {
      T* to = out + 4 * (begin - x0);
      for (int64_t x = 0; x < end - begin; ++x) {
        to[4 * x] = d[x * density_step];
        to[4 * x + 1] = r[x * color_step];
        to[4 * x + 2] = g[x * color_step];
        to[4 * x + 3] = b[x * color_step];
      }
    };
    v.density_stride[0] == 1 && v.color_stride[0] == 1
        ? copy(1, 1)
        : copy(v.density_stride[0], v.color_stride[0]);
  }

  Volume<T> volume_;
  VectorBuffer<Plane> planes_;
  VectorBuffer<T> voxels_;
};

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
