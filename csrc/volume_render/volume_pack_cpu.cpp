// The grid as the renderer reads it: density and colour side by side, padded with zeros.
#include <algorithm>

#include "common/parallel.h"
#include "volume_render/volume_render.h"

namespace latentdem {

template <class T>
void pack_volume_cpu(const VolumeShape& s, const T* density, const T* color, T* voxels) {
  const int64_t volume = s.depth * s.height * s.width;
  parallel_for(s.depth + 3, 1, [&](int64_t begin, int64_t end) {
    for (int64_t z = begin; z < end; ++z) {
      T* plane = voxels + 4 * z * s.plane();
      if (z == 0 || z > s.depth) {
        T* stop = z == s.depth + 2 ? voxels + 4 * s.voxels() : plane + 4 * s.plane();
        std::fill(plane, stop, T(0));
        continue;
      }
      std::fill(plane, plane + 4 * (s.row() + 1), T(0));
      for (int64_t y = 0; y < s.height; ++y) {
        const int64_t from = ((z - 1) * s.height + y) * s.width;
        T* out = plane + 4 * ((y + 1) * s.row() + 1);
        const T *d = density + from, *r = color + from, *g = r + volume, *b = g + volume;
        for (int64_t x = 0; x < s.width; ++x) {
          out[4 * x] = d[x];
          out[4 * x + 1] = r[x];
          out[4 * x + 2] = g[x];
          out[4 * x + 3] = b[x];
        }
        // The end of this row and the start of the next are padding.
        std::fill(out + 4 * s.width, out + 4 * (s.width + 2), T(0));
      }
      std::fill(plane + 4 * (s.plane() - s.row() + 1), plane + 4 * s.plane(), T(0));
    }
  });
}

template <class T>
void unpack_volume_cpu(const VolumeShape& s, const T* voxels, T* density, T* color) {
  const int64_t volume = s.depth * s.height * s.width;
  parallel_for(s.depth, 1, [&](int64_t begin, int64_t end) {
    for (int64_t z = begin; z < end; ++z)
      for (int64_t y = 0; y < s.height; ++y) {
        const T* in = voxels + 4 * ((z + 1) * s.plane() + (y + 1) * s.row() + 1);
        const int64_t to = (z * s.height + y) * s.width;
        if (density != nullptr)
          for (int64_t x = 0; x < s.width; ++x) density[to + x] = in[4 * x];
        if (color == nullptr) continue;
        T *r = color + to, *g = r + volume, *b = g + volume;
        for (int64_t x = 0; x < s.width; ++x) {
          r[x] = in[4 * x + 1];
          g[x] = in[4 * x + 2];
          b[x] = in[4 * x + 3];
        }
      }
  });
}

template <class T>
int64_t find_occupied_cpu(const VolumeShape& s, const T* density, uint8_t* occupied) {
  constexpr int64_t n = VolumeShape::kBlock;
  const int64_t layer = s.blocks_y() * s.blocks_x();
  // Padded voxel v is unpadded voxel v - 1, and a corner of the cells of v / n and (v - 1) / n.
  parallel_for(s.blocks_z(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* out = occupied + block * layer;
      std::fill(out, out + layer, uint8_t{0});
      const int64_t z_end = std::min(s.depth, block * n + n);
      for (int64_t z = std::max<int64_t>(block * n - 1, 0); z < z_end; ++z)
        for (int64_t y = 0; y < s.height; ++y) {
          const T* row = density + (z * s.height + y) * s.width;
          uint8_t* above = out + y / n * s.blocks_x();
          uint8_t* below = out + (y + 1) / n * s.blocks_x();
          for (int64_t x = 0; x < s.width; ++x)
            if (row[x] != T(0))
              above[x / n] = above[(x + 1) / n] = below[x / n] = below[(x + 1) / n] = 1;
        }
    }
  });
  return std::count(occupied, occupied + s.blocks(), uint8_t{1});
}

#define LATENTDEM_INSTANTIATE(T)                                                \
  template void pack_volume_cpu<T>(const VolumeShape&, const T*, const T*, T*); \
  template void unpack_volume_cpu<T>(const VolumeShape&, const T*, T*, T*);     \
  template int64_t find_occupied_cpu<T>(const VolumeShape&, const T*, uint8_t*);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
