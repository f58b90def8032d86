// CUDA kernels of the direct spatially varying blur: tiles as in blur_cuda.cu, patch after patch.
#include "varying_blur/varying_blur_cuda.h"

#include "blur/blur_tile_cuda.h"
#include "common/cuda_planes.h"

namespace latentdem {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) varying_forward(VaryingForward<T> p) {
  __shared__ double scratch[32];
  const BlurShape& s = p.s.blur;
  const int64_t ho = s.output_height(), wo = s.output_width(), pixels = s.height * s.width;
  const int64_t kernel_size = s.kernel_height * s.kernel_width;
  T* taps = dynamic_shared<T>();
  T* tile = taps + s.kernel_width * (s.kernel_height + 2 * kPad);
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile * kRows;
  for (int64_t t = blockIdx.x; t < s.planes() * tiles_per_plane(ho, wo); t += gridDim.x) {
    const TilePlace at = tile_place(t, ho, wo);
    const T* kernels = p.kernels + p.s.first_kernel(at.plane) * kernel_size;
    T sums[kRows] = {};
    for (int64_t patch = 0; patch < p.s.patches; ++patch) {
      const bool found = load_extended(s, p.image + at.plane * pixels, p.weights + patch * pixels,
                                       at.top, at.left, tile);
      if (!__syncthreads_or(found)) continue;
      load_taps(s, kernels + patch * kernel_size, true, taps);
      __syncthreads();
      convolve_tile(s, tile, taps, row, column, sums);
      __syncthreads();  // tile and taps are loaded anew
    }
    double loss = store_rows(s, at, row, column, sums, p.has_observation, p.observed, p.output);
    if (p.has_observation) {
      loss = block_sum(loss, scratch);
      if (threadIdx.x == 0) p.losses[t] = loss;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) varying_adjoint(VaryingAdjoint<T> p) {
  const BlurShape& s = p.s.blur;
  const int64_t kh = s.kernel_height, kw = s.kernel_width, pixels = s.height * s.width;
  const int64_t above = s.keeps_size() ? extension_before(kh) : 0;
  const int64_t before = s.keeps_size() ? extension_before(kw) : 0;
  T* taps = dynamic_shared<T>();
  T* residual = taps + kw * (kh + 2 * kPad);
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile * kRows;
  const int64_t tiles = s.planes() * tiles_per_plane(s.height, s.width);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const TilePlace at = tile_place(t, s.height, s.width);
    // As in direct_gradients.
    load_residual(s, p.residual + at.plane * s.output_height() * s.output_width(),
                  at.top + above - (kh - 1), at.left + before - (kw - 1), residual);
    const int64_t x = at.left + column;
    T total[kRows] = {};
    for (int64_t patch = 0; patch < p.s.patches; ++patch) {
      T weight[kRows];
      bool found = false;
      for (int q = 0; q < kRows; ++q) {
        const int64_t y = at.top + row + q;
        const bool inside = y < s.height && x < s.width;
        weight[q] = inside ? p.weights[patch * pixels + y * s.width + x] : T(0);
        found = found || weight[q] != 0;
      }
      if (!__syncthreads_or(found)) continue;
      load_taps(s, p.kernels + (p.s.first_kernel(at.plane) + patch) * kh * kw, false, taps);
      __syncthreads();
      T sums[kRows] = {};
      convolve_tile(s, residual, taps, row, column, sums);
      for (int q = 0; q < kRows; ++q) total[q] += weight[q] * sums[q];
    }
    T* out = p.grad_image + at.plane * pixels + x;
    for (int q = 0; q < kRows; ++q) {
      const int64_t y = at.top + row + q;
      if (y < s.height && x < s.width) out[y * s.width] = total[q];
    }
    __syncthreads();  // the residual is loaded anew
  }
}

// As border_gradients.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) varying_border(VaryingAdjoint<T> p) {
  const BlurShape& s = p.s.blur;
  const int64_t pixels = s.height * s.width, kernel_size = s.kernel_height * s.kernel_width;
  for (int64_t plane = first_plane(); plane < s.planes(); plane += plane_step()) {
    const T* residual = p.residual + plane * s.output_height() * s.output_width();
    const T* kernels = p.kernels + p.s.first_kernel(plane) * kernel_size;
    for (int64_t pixel = thread_index(); pixel < pixels; pixel += thread_count()) {
      const int64_t y = pixel / s.width, x = pixel - y * s.width;
      const Preimages rows = preimages(y, s.height, s.kernel_height, s.boundary);
      const Preimages columns = preimages(x, s.width, s.kernel_width, s.boundary);
      if (rows.size() * columns.size() == 1) continue;
      T total = 0;
#pragma unroll 1
      for (int64_t patch = 0; patch < p.s.patches; ++patch) {
        const T weight = p.weights[patch * pixels + pixel];
        if (weight != 0)
          total +=
              weight * other_preimages(s, residual, kernels + patch * kernel_size, rows, columns);
      }
      p.grad_image[plane * pixels + pixel] += total;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) varying_taps(VaryingTaps<T> p) {
  const BlurShape& s = p.s.blur;
  const int64_t ho = s.output_height(), wo = s.output_width(), pixels = s.height * s.width;
  const int64_t kernel_size = s.kernel_height * s.kernel_width;
  T* residual = dynamic_shared<T>();
  T* image = residual + kTile * kTile;
  const int64_t items = s.planes() * tiles_per_plane(ho, wo) * p.s.patches;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t patch = item % p.s.patches;
    const TilePlace at = tile_place(item / p.s.patches, ho, wo);
    const bool found = load_extended(s, p.image + at.plane * pixels, p.weights + patch * pixels,
                                     at.top, at.left, image);
    for (int i = threadIdx.x; i < kTile * kTile; i += kTileThreads) {
      const int64_t y = at.top + i / kTile, x = at.left + i % kTile;
      residual[i] = y < ho && x < wo ? p.residual[(at.plane * ho + y) * wo + x] : T(0);
    }
    T* taps = p.grad_taps + item * kernel_size;
    if (__syncthreads_or(found))
      correlate_tile(s, image, residual, static_cast<int>(kTile), taps);
    else
      for (int64_t i = threadIdx.x; i < kernel_size; i += kTileThreads) taps[i] = 0;
    __syncthreads();
  }
}

// A warp's lanes read 32 columns of a row; the warps share out the rows.
template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    sum_rows(int64_t count, int64_t rows, int64_t columns, const T* matrices, T* sums) {
  constexpr int kWarps = kTileThreads / 32;
  __shared__ double partial[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strips = (columns + 31) / 32;
  for (int64_t item = blockIdx.x; item < count * strips; item += gridDim.x) {
    const int64_t index = item / strips, column = item % strips * 32 + lane;
    double total = 0;
    if (column < columns)
      for (int64_t row = warp; row < rows; row += kWarps)
        total += matrices[(index * rows + row) * columns + column];
    partial[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && column < columns) {
      for (int other = 1; other < kWarps; ++other) total += partial[other][lane];
      sums[index * columns + column] = static_cast<T>(total);
    }
    __syncthreads();
  }
}

}  // namespace

template <class T>
void varying_forward_cuda(const VaryingForward<T>& p, cudaStream_t stream) {
  const BlurShape& s = p.s.blur;
  const int64_t tiles = s.planes() * tiles_per_plane(s.output_height(), s.output_width());
  LDEM_LAUNCH(varying_forward<T>, grid_size(tiles, 1), kTileThreads,
              (taps_size(s) + halo_size(s)) * sizeof(T), stream, p);
}

template <class T>
void varying_adjoint_cuda(const VaryingAdjoint<T>& p, cudaStream_t stream) {
  const BlurShape& s = p.s.blur;
  LDEM_LAUNCH(varying_adjoint<T>, grid_size(s.planes() * tiles_per_plane(s.height, s.width), 1),
              kTileThreads, (taps_size(s) + halo_size(s)) * sizeof(T), stream, p);
  if (s.boundary != Boundary::kZero && s.boundary != Boundary::kValid)
    LDEM_LAUNCH(varying_border<T>, plane_grid(s.planes(), s.height * s.width, kTileThreads),
                kTileThreads, 0, stream, p);
}

template <class T>
void varying_taps_cuda(const VaryingTaps<T>& p, cudaStream_t stream) {
  const BlurShape& s = p.s.blur;
  const int64_t tiles = s.planes() * tiles_per_plane(s.output_height(), s.output_width());
  LDEM_LAUNCH(varying_taps<T>, grid_size(tiles * p.s.patches, 1), kTileThreads,
              (static_cast<size_t>(kTile * kTile) + halo_size(s)) * sizeof(T), stream, p);
}

template <class T>
void sum_rows_cuda(int64_t count, int64_t rows, int64_t columns, const T* matrices, T* sums,
                   cudaStream_t stream) {
  LDEM_LAUNCH(sum_rows<T>, grid_size(count * ((columns + 31) / 32), 1), kTileThreads, 0, stream,
              count, rows, columns, matrices, sums);
}

#define LATENTDEM_INSTANTIATE(T)                                                 \
  template void varying_forward_cuda<T>(const VaryingForward<T>&, cudaStream_t); \
  template void varying_adjoint_cuda<T>(const VaryingAdjoint<T>&, cudaStream_t); \
  template void varying_taps_cuda<T>(const VaryingTaps<T>&, cudaStream_t);       \
  template void sum_rows_cuda<T>(int64_t, int64_t, int64_t, const T*, T*, cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
