// The forward pass of the CPU renderer.
#include <limits>

#include "common/exp.h"
#include "common/parallel.h"
#include "volume_render/volume_march.h"

namespace latentdem {
namespace {

template <class T>
LATENTDEM_INLINE void forward_tile_inline(const RenderParams<T>& p, const RenderOutputs<T>& out,
                                          int64_t tile) {
  const TileGrid tiles(p);
  const int64_t view = tiles.view(tile), pixels = p.height * p.width;
  const int64_t row_stride = 4 * p.volume.row(), plane_stride = 4 * p.volume.plane();
  const T dt = static_cast<T>(p.step()), stop = static_cast<T>(p.early_stop);
  for (int64_t slot = 0; slot < kRays; ++slot) {
    const Pixel at = tiles.pixel(tile, slot);
    if (!at.inside) continue;
    const Ray ray = make_ray(p.pose + 12 * view, p.intrinsics + 4 * view, at.row, at.column);
    Four<T> total{};  // depth, red, green, blue
    T transmittance = 1;
    if (is_finite(ray)) [[likely]] {
      const Segment<T> s = clip_ray(p, ray);
      for (int64_t k = 0; k < s.count; ++k) {
        const Cell<T> cell = locate(s, k);
        if (p.occupied != nullptr) {
          const int64_t empty = empty_run(p, s, cell, k);
          if (empty > 0) {
            k += empty - 1;
            continue;
          }
        }
        prefetch(p.volume, p.voxels, s, k + kAhead);
        Four<T> value = interpolate(p.voxels + 4 * voxel_index(p.volume, cell), row_stride,
                                    plane_stride, cell.fraction);
        const T beyond = transmittance * inline_exp(-value[0] * dt);
        value[0] = s.near + static_cast<T>(k) * dt;
        total += (transmittance - beyond) * value;
        transmittance = beyond;
        if (transmittance < stop) break;
      }
    } else {
      transmittance = std::numeric_limits<T>::quiet_NaN();
      total += transmittance;
    }
    const int64_t pixel = at.row * p.width + at.column;
    for (int c = 0; c < 3; ++c) out.color[(3 * view + c) * pixels + pixel] = total[c + 1];
    out.opacity[view * pixels + pixel] = 1 - transmittance;
    out.depth[view * pixels + pixel] = total[0];
  }
}

template <class T>
void forward_tile(const RenderParams<T>& p, const RenderOutputs<T>& out, int64_t tile) {
  forward_tile_inline<T>(p, out, tile);
}
template <class T>
LATENTDEM_AVX2 void forward_tile_avx2(const RenderParams<T>& p, const RenderOutputs<T>& out,
                                      int64_t tile) {
  forward_tile_inline<T>(p, out, tile);
}

}  // namespace

template <class T>
void render_forward_cpu(const RenderParams<T>& p, const RenderOutputs<T>& out) {
  const bool avx2 = has_avx2();
  parallel_tasks(p.views * TileGrid(p).per_view(), [&](int64_t tile) {
    avx2 ? forward_tile_avx2<T>(p, out, tile) : forward_tile<T>(p, out, tile);
  });
}

template void render_forward_cpu<float>(const RenderParams<float>&, const RenderOutputs<float>&);
template void render_forward_cpu<double>(const RenderParams<double>&, const RenderOutputs<double>&);

}  // namespace latentdem
