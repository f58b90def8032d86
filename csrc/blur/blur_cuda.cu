// CUDA kernels of the direct blur: tiles of the image in shared memory, so that neither the
// extended image nor its gradient is ever written.
#include "blur/blur_cuda.h"
#include "blur/blur_tile_cuda.h"
#include "common/cuda_launch.h"
#include "common/cuda_reduce.h"

namespace latentdem {
namespace {

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks) direct_forward(DirectForward<T> p) {
  __shared__ double scratch[32];
  const BlurShape& s = p.s;
  const int64_t ho = s.output_height(), wo = s.output_width();
  T* taps = dynamic_shared<T>();
  T* tile = taps + s.kernel_width * (s.kernel_height + 2 * kPad);
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile * kRows;
  for (int64_t t = blockIdx.x; t < s.planes() * tiles_per_plane(ho, wo); t += gridDim.x) {
    const TilePlace at = tile_place(t, ho, wo);
    load_taps(s, p.kernel + s.kernel_index(at.plane) * s.kernel_height * s.kernel_width, true,
              taps);
    load_extended(s, p.image + at.plane * s.height * s.width, static_cast<const T*>(nullptr),
                  at.top, at.left, tile);
    __syncthreads();
    T sums[kRows] = {};
    convolve_tile(s, tile, taps, row, column, sums);
    double loss = store_rows(s, at, row, column, sums, p.has_observation, p.observed, p.output);
    if (p.has_observation) {
      loss = block_sum(loss, scratch);
      if (threadIdx.x == 0) p.losses[t] = loss;
    }
    __syncthreads();  // the tile is loaded anew
  }
}

// Adds what the tiles leave out; a kernel of its own, or the rare case would cost the common one
// its registers. Not for the zero and the valid boundary.
template <class T>
__global__ void __launch_bounds__(kTileThreads) border_gradients(DirectGradients<T> p) {
  const BlurShape& s = p.s;
  for (int64_t at = thread_index(); at < s.planes() * s.height * s.width; at += thread_count()) {
    const int64_t plane = at / (s.height * s.width);
    const Preimages rows =
        preimages(at / s.width % s.height, s.height, s.kernel_height, s.boundary);
    const Preimages columns = preimages(at % s.width, s.width, s.kernel_width, s.boundary);
    if (rows.size() * columns.size() == 1) continue;
    p.grad_image[at] += other_preimages(
        s, p.residual + plane * s.output_height() * s.output_width(),
        p.kernel + s.kernel_index(plane) * s.kernel_height * s.kernel_width, rows, columns);
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    direct_gradients(DirectGradients<T> p) {
  const BlurShape& s = p.s;
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t above = s.keeps_size() ? extension_before(kh) : 0;
  const int64_t before = s.keeps_size() ? extension_before(kw) : 0;
  T* taps = dynamic_shared<T>();
  T* residual = taps + kw * (kh + 2 * kPad);
  T* image = residual + (kTile + kh - 1) * (kTile + kw - 1);
  const int pitch = static_cast<int>(kTile + kw - 1);
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile * kRows;
  const int64_t tiles = s.planes() * tiles_per_plane(s.height, s.width);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const TilePlace at = tile_place(t, s.height, s.width);
    const T* plane = p.residual + at.plane * s.output_height() * s.output_width();
    // Pixel (y, x) of the image stands at (y + above, x + before) of the extended one, which the
    // residual reaches from kh - 1 rows above on.
    load_residual(s, plane, at.top + above - (kh - 1), at.left + before - (kw - 1), residual);
    if (p.grad_image != nullptr)
      load_taps(s, p.kernel + s.kernel_index(at.plane) * kh * kw, false, taps);
    if (p.grad_taps != nullptr)
      load_extended(s, p.image + at.plane * s.height * s.width, static_cast<const T*>(nullptr),
                    at.top, at.left, image);
    __syncthreads();
    if (p.grad_image != nullptr) {
      T sums[kRows] = {};
      convolve_tile(s, residual, taps, row, column, sums);
      const int64_t x = at.left + column;
      T* out = p.grad_image + at.plane * s.height * s.width + x;
      for (int q = 0; q < kRows; ++q) {
        const int64_t y = at.top + row + q;
        if (y < s.height && x < s.width) out[y * s.width] = sums[q];
      }
    }
    if (p.grad_taps != nullptr) {
      correlate_tile(s, image, residual + (kh - 1 - above) * pitch + (kw - 1 - before), pitch,
                     p.grad_taps + t * kh * kw);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    sum_losses(int64_t batch, int64_t count, const double* losses, T* loss) {
  __shared__ double scratch[32];
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < count; i += kTileThreads) total += losses[b * count + i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) loss[b] = static_cast<T>(0.5 * total);
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    sum_taps(BlurShape s, int64_t tiles, const T* grad_taps, T* grad_kernel) {
  __shared__ double scratch[32];
  const int64_t taps = s.kernel_height * s.kernel_width;
  for (int64_t item = blockIdx.x; item < s.kernel_batch() * s.kernel_channels() * taps;
       item += gridDim.x) {
    const int64_t index = item / taps;
    double total = 0;
    for (int64_t i = threadIdx.x; i < s.sharing_planes() * tiles; i += kTileThreads)
      total +=
          grad_taps[(s.shared_plane(index, i / tiles) * tiles + i % tiles) * taps + item % taps];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) grad_kernel[item] = static_cast<T>(total);
  }
}

// One thread per output pixel; neighbours share their reads through the first-level cache.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    convolve_strided(DownsampleShape s, const T* image, const T* kernel, T* output) {
  const BlurShape& b = s.blur;
  const int64_t h = s.height(), w = s.width(), kh = b.kernel_height, kw = b.kernel_width;
  const int64_t above = b.keeps_size() ? extension_before(kh) : 0;
  const int64_t left = b.keeps_size() ? extension_before(kw) : 0;
  for (int64_t item = thread_index(); item < b.planes() * h * w; item += thread_count()) {
    const int64_t plane = item / (h * w), y = item / w % h, x = item % w;
    const T* in = image + plane * b.height * b.width;
    const T* k = kernel + b.kernel_index(plane) * kh * kw;
    T total = 0;
    for (int64_t i = 0; i < kh; ++i) {
      const int64_t row = source_index(y * s.factor + kh - 1 - i - above, b.height, b.boundary);
      if (row < 0) continue;
      for (int64_t j = 0; j < kw; ++j) {
        const int64_t column = source_index(x * s.factor + kw - 1 - j - left, b.width, b.boundary);
        if (column >= 0) total += k[i * kw + j] * in[row * b.width + column];
      }
    }
    output[item] = total;
  }
}

// What one extended pixel collects: only every factor-th tap of a column reaches an output.
template <class T>
__device__ T strided_adjoint_at(const DownsampleShape& s, const T* residual, const T* kernel,
                                int64_t e, int64_t f) {
  const int64_t kh = s.blur.kernel_height, kw = s.blur.kernel_width;
  const int64_t first_y = e < kh - 1 ? 0 : (e - (kh - 1) + s.factor - 1) / s.factor;
  const int64_t first_x = f < kw - 1 ? 0 : (f - (kw - 1) + s.factor - 1) / s.factor;
  T total = 0;
  for (int64_t y = first_y; y < s.height() && y * s.factor <= e; ++y)
    for (int64_t x = first_x; x < s.width() && x * s.factor <= f; ++x)
      total += kernel[(y * s.factor + kh - 1 - e) * kw + x * s.factor + kw - 1 - f] *
               residual[y * s.width() + x];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    convolve_strided_adjoint(DownsampleShape s, const T* residual, const T* kernel, T* grad_image) {
  const BlurShape& b = s.blur;
  for (int64_t item = thread_index(); item < b.planes() * b.height * b.width;
       item += thread_count()) {
    const int64_t plane = item / (b.height * b.width);
    const Preimages rows =
        preimages(item / b.width % b.height, b.height, b.kernel_height, b.boundary);
    const Preimages columns = preimages(item % b.width, b.width, b.kernel_width, b.boundary);
    const T* r = residual + plane * s.height() * s.width();
    const T* k = kernel + b.kernel_index(plane) * b.kernel_height * b.kernel_width;
    T total = 0;
    for (int64_t i = 0; i < rows.size(); ++i)
      for (int64_t j = 0; j < columns.size(); ++j)
        total += strided_adjoint_at(s, r, k, rows[i], columns[j]);
    grad_image[item] = total;
  }
}

unsigned block_count(int64_t count) { return grid_size(count, 1); }

}  // namespace

template <class T>
void direct_forward_cuda(const DirectForward<T>& p, cudaStream_t stream) {
  const int64_t tiles = tiles_per_plane(p.s.output_height(), p.s.output_width());
  LDEM_LAUNCH(direct_forward<T>, block_count(p.s.planes() * tiles), kTileThreads,
              (taps_size(p.s) + halo_size(p.s)) * sizeof(T), stream, p);
}

template <class T>
void direct_gradients_cuda(const DirectGradients<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(direct_gradients<T>,
              block_count(p.s.planes() * tiles_per_plane(p.s.height, p.s.width)), kTileThreads,
              (taps_size(p.s) + 2 * halo_size(p.s)) * sizeof(T), stream, p);
  const bool folds = p.s.boundary != Boundary::kZero && p.s.boundary != Boundary::kValid;
  if (p.grad_image != nullptr && folds)
    LDEM_LAUNCH(border_gradients<T>, grid_size(p.s.planes() * p.s.height * p.s.width, kTileThreads),
                kTileThreads, 0, stream, p);
}

template <class T>
void sum_losses_cuda(int64_t batch, int64_t count, const double* losses, T* loss,
                     cudaStream_t stream) {
  LDEM_LAUNCH(sum_losses<T>, block_count(batch), kTileThreads, 0, stream, batch, count, losses,
              loss);
}

template <class T>
void sum_taps_cuda(const BlurShape& s, int64_t tiles, const T* grad_taps, T* grad_kernel,
                   cudaStream_t stream) {
  const int64_t items = s.kernel_batch() * s.kernel_channels() * s.kernel_height * s.kernel_width;
  LDEM_LAUNCH(sum_taps<T>, block_count(items), kTileThreads, 0, stream, s, tiles, grad_taps,
              grad_kernel);
}

template <class T>
void convolve_strided_cuda(const DownsampleShape& s, const T* image, const T* kernel, T* output,
                           cudaStream_t stream) {
  LDEM_LAUNCH(convolve_strided<T>,
              grid_size(s.blur.planes() * s.height() * s.width(), kTileThreads), kTileThreads, 0,
              stream, s, image, kernel, output);
}

template <class T>
void convolve_strided_adjoint_cuda(const DownsampleShape& s, const T* residual, const T* kernel,
                                   T* grad_image, cudaStream_t stream) {
  LDEM_LAUNCH(convolve_strided_adjoint<T>,
              grid_size(s.blur.planes() * s.blur.height * s.blur.width, kTileThreads), kTileThreads,
              0, stream, s, residual, kernel, grad_image);
}

#define LATENTDEM_INSTANTIATE(T)                                                                 \
  template void direct_forward_cuda<T>(const DirectForward<T>&, cudaStream_t);                   \
  template void direct_gradients_cuda<T>(const DirectGradients<T>&, cudaStream_t);               \
  template void sum_losses_cuda<T>(int64_t, int64_t, const double*, T*, cudaStream_t);           \
  template void sum_taps_cuda<T>(const BlurShape&, int64_t, const T*, T*, cudaStream_t);         \
  template void convolve_strided_cuda<T>(const DownsampleShape&, const T*, const T*, T*,         \
                                         cudaStream_t);                                          \
  template void convolve_strided_adjoint_cuda<T>(const DownsampleShape&, const T*, const T*, T*, \
                                                 cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
