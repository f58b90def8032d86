// The forward pass of the CPU renderer; compiled once per instruction set (see common/isa.h).
#include <limits>

#include "common/parallel.h"
#include "volume_render/volume_march.h"
#include "volume_render/volume_window.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

template <class T>
void forward_tile(const RenderForward<T>& f, const PackedVolume<T>& packed, const Tile& tile) {
  const RenderParams<T>& p = f.params;
  const int64_t view = tile.view, pixels = p.height * p.width;
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
  for (int64_t slot = 0; slot < kRays; ++slot) {
    const Pixel at = tile.pixel(p, slot);
    if (!at.inside) continue;
    const Ray ray = make_ray(p.pose + 12 * view, p.intrinsics + 4 * view, at.row, at.column);
    Four<T> total{};  // depth, red, green, blue
    T transmittance = 1;
    if (is_finite(ray)) [[likely]] {
      const Segment<T> s = clip_ray<T>(p.volume.size, p.sampling, ray);
      for (int64_t k = 0; k < s.count; ++k) {
        const Cell<T> cell = locate(s, k);
        if (p.occupied != nullptr)
          if (const int64_t empty = empty_run(p, s, cell, k); empty > 0) {
            k += empty - 1;
            continue;
          }
        prefetch(packed, s, k + kAhead);
        const Four<T> voxel = interpolate<T>(load_corners(packed, cell), cell.fraction);
        const Sample<T> sample = composite<T>(voxel, s.distance(k, dt), dt, transmittance);
        total += sample.weight() * sample.value;
        transmittance = sample.beyond;
        if (transmittance < stop) break;
      }
    } else {
      transmittance = std::numeric_limits<T>::quiet_NaN();
      total += transmittance - Four<T>{};
    }
    const int64_t pixel = at.row * p.width + at.column;
    for (int c = 0; c < 3; ++c) f.out.color[(3 * view + c) * pixels + pixel] = total[c + 1];
    f.out.opacity[view * pixels + pixel] = 1 - transmittance;
    f.out.depth[view * pixels + pixel] = total[0];
  }
}

}  // namespace

template <class T>
void render_forward_cpu(const RenderForward<T>& f) {
  const RenderParams<T>& p = f.params;
  Window<T> window(p.volume);
  window.pack_everything();
  const int64_t rows = tile_count(p.height), columns = tile_count(p.width);
  parallel_tasks(p.views * rows * columns, [&](int64_t i) {
    forward_tile<T>(f, window.packed(), {i / (rows * columns), i / columns % rows, i % columns});
  });
}

template void render_forward_cpu<float>(const RenderForward<float>&);
template void render_forward_cpu<double>(const RenderForward<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
