// Where the grid has any density.
#include <algorithm>

#include "common/parallel.h"
#include "volume_render/volume_render.h"

namespace latentdem {

template <class T>
int64_t find_occupied_cpu(const Volume<T>& v, uint8_t* occupied) {
  constexpr int64_t n = BlockGrid::kBlock;
  const BlockGrid blocks(v.size);
  const int64_t layer = blocks.y * blocks.x, stride = v.density_stride[0];
  // Padded voxel i is voxel i - 1, and a corner of the cells of i / n and (i - 1) / n.
  parallel_for(blocks.z, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint8_t* out = occupied + block * layer;
      std::fill(out, out + layer, uint8_t{0});
      const int64_t z_end = std::min(v.size[2], block * n + n);
      for (int64_t z = std::max<int64_t>(block * n - 1, 0); z < z_end; ++z)
        for (int64_t y = 0; y < v.size[1]; ++y) {
          const T* row = v.density + z * v.density_stride[2] + y * v.density_stride[1];
          uint8_t* above = out + y / n * blocks.x;
          uint8_t* below = out + (y + 1) / n * blocks.x;
          for (int64_t x = 0; x < v.size[0]; ++x)
            if (row[x * stride] != T(0))
              above[x / n] = above[(x + 1) / n] = below[x / n] = below[(x + 1) / n] = 1;
        }
    }
  });
  return std::count(occupied, occupied + blocks.count(), uint8_t{1});
}

template int64_t find_occupied_cpu<float>(const Volume<float>&, uint8_t*);
template int64_t find_occupied_cpu<double>(const Volume<double>&, uint8_t*);

}  // namespace latentdem
