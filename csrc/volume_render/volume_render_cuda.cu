// The CUDA renderer's forward pass, and the packed grid.
#include "common/cuda_launch.h"
#include "volume_render/volume_march_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) pack_grid(Volume<T> v, T* voxels) {
  const int64_t width = v.size[0] + 2, height = v.size[1] + 2, count = padded_count(v.size);
  for (int64_t i = thread_index(); i < count; i += thread_count())
    store_four(voxels + 4 * i, read_voxel(v, i % width, i / width % height, i / (width * height)));
}

// One warp per block of cells.
template <class T>
__global__ void __launch_bounds__(kThreads) find_occupied(Volume<T> v, uint8_t* occupied) {
  constexpr int side = BlockGrid::kBlock + 1;  // voxels
  const BlockGrid blocks(v.size);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t block = thread_index() / 32; block < blocks.count(); block += thread_count() / 32) {
    const int64_t left = block % blocks.x * BlockGrid::kBlock;
    const int64_t top = block / blocks.x % blocks.y * BlockGrid::kBlock;
    const int64_t front = block / (blocks.x * blocks.y) * BlockGrid::kBlock;
    bool found = false;
    for (int first = 0; first < side * side * side && !found; first += 32) {
      const int i = first + lane;
      const int64_t x = left + i % side, y = top + i / side % side, z = front + i / (side * side);
      bool filled = i < side * side * side && is_voxel(v.size, x, y, z);
      if (filled) {
        const int64_t* stride = v.density_stride;
        filled = v.density[(x - 1) * stride[0] + (y - 1) * stride[1] + (z - 1) * stride[2]] != T(0);
      }
      found = __any_sync(kFullWarp, filled) != 0;
    }
    if (lane == 0) occupied[block] = found ? 1 : 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kRenderThreads)
    render_forward(RenderParams<T> p, const T* voxels, RenderImages<T> out) {
  const RenderTiles tiles(p);
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const TilePixel at(p, tiles, tile);
    March<T> march;
    Four<T> total{};  // depth, red, green, blue
    T transmittance = 1;
    if (at.inside) {
      const Ray ray =
          make_ray(p.pose + 12 * at.view, p.intrinsics + 4 * at.view, at.row, at.column);
      if (is_finite(ray)) {
        march.segment = clip_ray<T>(p.volume.size, p.sampling, ray);
        march.end = static_cast<int32_t>(march.segment.count);
      } else {
        transmittance = static_cast<T>(NAN);
        for (int c = 0; c < 4; ++c) total[c] = transmittance;
      }
    }
    while (__any_sync(kFullWarp, march.seek(p))) {
      if (march.k >= march.end) continue;
      const Corners<T> corners =
          load_packed_corners(p.volume.size, voxels, padded_offset(p.volume.size, march.cell));
      const Four<T> voxel = interpolate<T>(corners, march.cell.fraction);
      const Sample<T> sample =
          composite<T>(voxel, march.segment.distance(march.k, dt), dt, transmittance);
      total += sample.weight() * sample.value;
      transmittance = sample.beyond;
      march.k = transmittance < stop ? march.end : march.k + 1;
    }
    if (!at.inside) continue;
    for (int c = 0; c < 3; ++c) out.color[at.index(p, c, 3)] = total[c + 1];
    out.opacity[at.index(p, 0, 1)] = 1 - transmittance;
    out.depth[at.index(p, 0, 1)] = total[0];
  }
}

}  // namespace

template <class T>
void pack_grid_cuda(const Volume<T>& v, T* voxels, cudaStream_t stream) {
  LDEM_LAUNCH(pack_grid<T>, grid_size(padded_count(v.size), kThreads), kThreads, 0, stream, v,
              voxels);
}

template <class T>
void find_occupied_cuda(const Volume<T>& v, uint8_t* occupied, cudaStream_t stream) {
  LDEM_LAUNCH(find_occupied<T>, grid_size(BlockGrid(v.size).count(), kThreads / 32), kThreads, 0,
              stream, v, occupied);
}

template <class T>
void render_forward_cuda(const RenderParams<T>& p, const T* voxels, const RenderImages<T>& out,
                         cudaStream_t stream) {
  LDEM_LAUNCH(render_forward<T>, grid_size(RenderTiles(p).count(), 1), kRenderThreads, 0, stream, p,
              voxels, out);
}

#define LATENTDEM_INSTANTIATE(T)                                                                 \
  template void pack_grid_cuda<T>(const Volume<T>&, T*, cudaStream_t);                           \
  template void find_occupied_cuda<T>(const Volume<T>&, uint8_t*, cudaStream_t);                 \
  template void render_forward_cuda<T>(const RenderParams<T>&, const T*, const RenderImages<T>&, \
                                       cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
