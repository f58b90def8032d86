// The CUDA renderer's forward pass, and the packed grid.
#include "common/cuda_launch.h"
#include "volume_render/volume_march_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;

struct Size {
  int64_t n[3];  // W, H, D
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_grid(Size size, const T* density, const T* color, T* voxels) {
  const int64_t width = size.n[0] + 2, height = size.n[1] + 2, depth = size.n[2] + 2;
  const int64_t channel = size.n[0] * size.n[1] * size.n[2];
  for (int64_t i = thread_index(); i < width * height * depth; i += thread_count()) {
    const int64_t x = i % width - 1, y = i / width % height - 1, z = i / (width * height) - 1;
    Four<T> voxel{};
    if (x >= 0 && x < size.n[0] && y >= 0 && y < size.n[1] && z >= 0 && z < size.n[2]) {
      const int64_t at = (z * size.n[1] + y) * size.n[0] + x;
      voxel[0] = density[at];
      for (int c = 0; c < 3; ++c) voxel[c + 1] = color[c * channel + at];
    }
    store_four(voxels + 4 * i, voxel);
  }
}

// One warp per block of cells.
template <class T>
__global__ void __launch_bounds__(kThreads)
    find_occupied(Size size, const T* density, uint8_t* occupied) {
  constexpr int side = BlockGrid::kBlock + 1;  // voxels
  const BlockGrid blocks(size.n);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t block = thread_index() / 32; block < blocks.count(); block += thread_count() / 32) {
    const int64_t left = block % blocks.x * BlockGrid::kBlock - 1;
    const int64_t top = block / blocks.x % blocks.y * BlockGrid::kBlock - 1;
    const int64_t front = block / (blocks.x * blocks.y) * BlockGrid::kBlock - 1;
    bool found = false;
    for (int first = 0; first < side * side * side && !found; first += 32) {
      const int i = first + lane;
      const int64_t x = left + i % side, y = top + i / side % side, z = front + i / (side * side);
      const bool exists = i < side * side * side && x >= 0 && x < size.n[0] && y >= 0 &&
                          y < size.n[1] && z >= 0 && z < size.n[2];
      found = __any_sync(kFullWarp,
                         exists && density[(z * size.n[1] + y) * size.n[0] + x] != T(0)) != 0;
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
void pack_grid_cuda(const int64_t* size, const T* density, const T* color, T* voxels,
                    cudaStream_t stream) {
  const Size s{{size[0], size[1], size[2]}};
  LDEM_LAUNCH(pack_grid<T>, grid_size(padded_count(size), kThreads), kThreads, 0, stream, s,
              density, color, voxels);
}

template <class T>
void find_occupied_cuda(const int64_t* size, const T* density, uint8_t* occupied,
                        cudaStream_t stream) {
  const Size s{{size[0], size[1], size[2]}};
  LDEM_LAUNCH(find_occupied<T>, grid_size(BlockGrid(size).count(), kThreads / 32), kThreads, 0,
              stream, s, density, occupied);
}

template <class T>
void render_forward_cuda(const RenderParams<T>& p, const T* voxels, const RenderImages<T>& out,
                         cudaStream_t stream) {
  LDEM_LAUNCH(render_forward<T>, grid_size(RenderTiles(p).count(), 1), kRenderThreads, 0, stream, p,
              voxels, out);
}

#define LATENTDEM_INSTANTIATE(T)                                                                 \
  template void pack_grid_cuda<T>(const int64_t*, const T*, const T*, T*, cudaStream_t);         \
  template void find_occupied_cuda<T>(const int64_t*, const T*, uint8_t*, cudaStream_t);         \
  template void render_forward_cuda<T>(const RenderParams<T>&, const T*, const RenderImages<T>&, \
                                       cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
