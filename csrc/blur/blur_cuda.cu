// CUDA kernels of the direct blur: tiles of the image in shared memory, so that neither the
// extended image nor its gradient is ever written.
#include "blur/blur_cuda.h"
#include "common/cuda_launch.h"
#include "common/cuda_reduce.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // of a tile per thread: rows 4 t to 4 t + 3, so that loads are shared
constexpr int kPad = kRows - 1;
static_assert(kTile * kTile == kThreads * kRows, "threads cover the tile");

// Taps in shared memory as columns with kPad zeros before and after, flipped or not.
template <class T>
__device__ void load_taps(const BlurShape& s, const T* kernel, bool flip, T* taps) {
  const int64_t kh = s.kernel_height, kw = s.kernel_width, pitch = kh + 2 * kPad;
  for (int64_t at = threadIdx.x; at < kw * pitch; at += kThreads) {
    const int64_t j = at / pitch, i = at % pitch - kPad;
    const bool inside = i >= 0 && i < kh;
    taps[at] = !inside ? T(0) : flip ? kernel[(kh - 1 - i) * kw + kw - 1 - j] : kernel[i * kw + j];
  }
}

// A tile with a halo: rows top .. top + kTile + kh - 2 of the extended image.
template <class T>
__device__ void load_extended(const BlurShape& s, const T* plane, int64_t top, int64_t left,
                              T* tile) {
  const int64_t rows = kTile + s.kernel_height - 1, columns = kTile + s.kernel_width - 1;
  const int64_t above = s.keeps_size() ? extension_before(s.kernel_height) : 0;
  const int64_t before = s.keeps_size() ? extension_before(s.kernel_width) : 0;
  for (int64_t at = threadIdx.x; at < rows * columns; at += kThreads) {
    const int64_t e = top + at / columns, f = left + at % columns;
    T value = 0;
    if (e < s.extended_height() && f < s.extended_width()) {
      const int64_t y = source_index(e - above, s.height, s.boundary);
      const int64_t x = source_index(f - before, s.width, s.boundary);
      if (y >= 0 && x >= 0) value = plane[y * s.width + x];
    }
    tile[at] = value;
  }
}

// The same of the residual, which is zero outside.
template <class T>
__device__ void load_residual(const BlurShape& s, const T* plane, int64_t top, int64_t left,
                              T* tile) {
  const int64_t rows = kTile + s.kernel_height - 1, columns = kTile + s.kernel_width - 1;
  for (int64_t at = threadIdx.x; at < rows * columns; at += kThreads) {
    const int64_t y = top + at / columns, x = left + at % columns;
    const bool inside = y >= 0 && y < s.output_height() && x >= 0 && x < s.output_width();
    tile[at] = inside ? plane[y * s.output_width() + x] : T(0);
  }
}

// sums[q] = sum_tu taps[t,u] tile[row + q + t, column + u]
template <class T>
__device__ void convolve_tile(const BlurShape& s, const T* tile, const T* taps, int row, int column,
                              T (&sums)[kRows]) {
  const int kh = static_cast<int>(s.kernel_height), kw = static_cast<int>(s.kernel_width);
  const int pitch = static_cast<int>(kTile) + kw - 1, tap_pitch = kh + 2 * kPad;
  for (int q = 0; q < kRows; ++q) sums[q] = 0;
  for (int u = 0; u < kw; ++u) {
    const T* in = tile + row * pitch + column + u;
    const T* tap = taps + u * tap_pitch + kPad;
    T window[kRows] = {};  // taps r, r - 1, r - 2, r - 3
    for (int r = 0; r < kh + kPad; ++r) {
      for (int q = kRows - 1; q > 0; --q) window[q] = window[q - 1];
      window[0] = tap[r];
      const T value = in[r * pitch];
      for (int q = 0; q < kRows; ++q) sums[q] += window[q] * value;
    }
  }
}

struct TilePlace {
  int64_t plane, top, left;
};
__device__ inline TilePlace tile_place(int64_t tile, int64_t height, int64_t width) {
  const int64_t across = (width + kTile - 1) / kTile, down = (height + kTile - 1) / kTile;
  return {tile / (across * down), tile / across % down * kTile, tile % across * kTile};
}

size_t taps_size(const BlurShape& s) {
  return static_cast<size_t>(s.kernel_width * (s.kernel_height + 2 * kPad));
}
size_t halo_size(const BlurShape& s) {
  return static_cast<size_t>((kTile + s.kernel_height - 1) * (kTile + s.kernel_width - 1));
}

template <class T>
__global__ void __launch_bounds__(kThreads) direct_forward(DirectForward<T> p) {
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
    load_extended(s, p.image + at.plane * s.height * s.width, at.top, at.left, tile);
    __syncthreads();
    T sums[kRows];
    convolve_tile(s, tile, taps, row, column, sums);
    const int64_t x = at.left + column;
    const int64_t mask_plane = at.plane / s.channels * p.observed.mask_stride_b +
                               at.plane % s.channels * p.observed.mask_stride_c;
    double loss = 0;
    for (int q = 0; q < kRows; ++q) {
      const int64_t y = at.top + row + q;
      if (y >= ho || x >= wo) continue;
      const int64_t pixel = (at.plane * ho + y) * wo + x;
      T value = sums[q];
      if (p.has_observation) {
        const T difference = value - p.observed.observation[pixel];
        value = p.observed.mask == nullptr
                    ? difference
                    : p.observed.mask[(mask_plane * ho + y) * wo + x] * difference;
        loss += static_cast<double>(value) * difference;
      }
      if (p.output != nullptr) p.output[pixel] = value;
    }
    if (p.has_observation) {
      loss = block_sum(loss, scratch);
      if (threadIdx.x == 0) p.losses[t] = loss;
    }
    __syncthreads();  // the tile is loaded anew
  }
}

// Pixels near the border collect from further places of the residual.
template <class T>
__device__ T other_preimages(const BlurShape& s, const T* residual, const T* kernel,
                             const Preimages& rows, const Preimages& columns) {
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  T total = 0;
  for (int64_t a = 0; a < rows.size(); ++a)
    for (int64_t b = a == 0 ? 1 : 0; b < columns.size(); ++b)
#pragma unroll 1
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t y = rows[a] - (kh - 1) + i;
        if (y < 0 || y >= ho) continue;
        for (int64_t j = 0; j < kw; ++j) {
          const int64_t x = columns[b] - (kw - 1) + j;
          if (x >= 0 && x < wo) total += kernel[i * kw + j] * residual[y * wo + x];
        }
      }
  return total;
}

// Adds what the tiles leave out; a kernel of its own, or the rare case would cost the common one
// its registers. Not for the zero and the valid boundary.
template <class T>
__global__ void __launch_bounds__(kThreads) border_gradients(DirectGradients<T> p) {
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
__global__ void __launch_bounds__(kThreads) direct_gradients(DirectGradients<T> p) {
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
      load_extended(s, p.image + at.plane * s.height * s.width, at.top, at.left, image);
    __syncthreads();
    if (p.grad_image != nullptr) {
      T sums[kRows];
      convolve_tile(s, residual, taps, row, column, sums);
      const int64_t x = at.left + column;
      T* out = p.grad_image + at.plane * s.height * s.width + x;
      for (int q = 0; q < kRows; ++q) {
        const int64_t y = at.top + row + q;
        if (y < s.height && x < s.width) out[y * s.width] = sums[q];
      }
    }
    if (p.grad_taps != nullptr) {
      // A warp per tap, its lanes along the rows of the tile.
      const int lane = threadIdx.x % 32;
      const T* r = residual + (kh - 1 - above) * pitch + (kw - 1 - before) + lane;
      for (int64_t tap = threadIdx.x / 32; tap < kh * kw; tap += kThreads / 32) {
        const T* x = image + (kh - 1 - tap / kw) * pitch + (kw - 1 - tap % kw) + lane;
        T total = 0;
#pragma unroll 8
        for (int y = 0; y < kTile; ++y) total += x[y * pitch] * r[y * pitch];
        total = warp_sum(total);
        if (lane == 0) p.grad_taps[t * kh * kw + tap] = total;
      }
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_losses(int64_t batch, int64_t count, const double* losses, T* loss) {
  __shared__ double scratch[32];
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) total += losses[b * count + i];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) loss[b] = static_cast<T>(0.5 * total);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_taps(BlurShape s, int64_t tiles, const T* grad_taps, T* grad_kernel) {
  __shared__ double scratch[32];
  const int64_t taps = s.kernel_height * s.kernel_width;
  for (int64_t item = blockIdx.x; item < s.kernel_batch() * s.kernel_channels() * taps;
       item += gridDim.x) {
    const int64_t index = item / taps;
    double total = 0;
    for (int64_t i = threadIdx.x; i < s.sharing_planes() * tiles; i += kThreads)
      total +=
          grad_taps[(s.shared_plane(index, i / tiles) * tiles + i % tiles) * taps + item % taps];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) grad_kernel[item] = static_cast<T>(total);
  }
}

// One thread per output pixel; neighbours share their reads through the first-level cache.
template <class T>
__global__ void __launch_bounds__(kThreads)
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
__global__ void __launch_bounds__(kThreads)
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
  LDEM_LAUNCH(direct_forward<T>, block_count(p.s.planes() * tiles), kThreads,
              (taps_size(p.s) + halo_size(p.s)) * sizeof(T), stream, p);
}

template <class T>
void direct_gradients_cuda(const DirectGradients<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(direct_gradients<T>,
              block_count(p.s.planes() * tiles_per_plane(p.s.height, p.s.width)), kThreads,
              (taps_size(p.s) + 2 * halo_size(p.s)) * sizeof(T), stream, p);
  const bool folds = p.s.boundary != Boundary::kZero && p.s.boundary != Boundary::kValid;
  if (p.grad_image != nullptr && folds)
    LDEM_LAUNCH(border_gradients<T>, grid_size(p.s.planes() * p.s.height * p.s.width, kThreads),
                kThreads, 0, stream, p);
}

template <class T>
void sum_losses_cuda(int64_t batch, int64_t count, const double* losses, T* loss,
                     cudaStream_t stream) {
  LDEM_LAUNCH(sum_losses<T>, block_count(batch), kThreads, 0, stream, batch, count, losses, loss);
}

template <class T>
void sum_taps_cuda(const BlurShape& s, int64_t tiles, const T* grad_taps, T* grad_kernel,
                   cudaStream_t stream) {
  const int64_t items = s.kernel_batch() * s.kernel_channels() * s.kernel_height * s.kernel_width;
  LDEM_LAUNCH(sum_taps<T>, block_count(items), kThreads, 0, stream, s, tiles, grad_taps,
              grad_kernel);
}

template <class T>
void convolve_strided_cuda(const DownsampleShape& s, const T* image, const T* kernel, T* output,
                           cudaStream_t stream) {
  LDEM_LAUNCH(convolve_strided<T>, grid_size(s.blur.planes() * s.height() * s.width(), kThreads),
              kThreads, 0, stream, s, image, kernel, output);
}

template <class T>
void convolve_strided_adjoint_cuda(const DownsampleShape& s, const T* residual, const T* kernel,
                                   T* grad_image, cudaStream_t stream) {
  LDEM_LAUNCH(convolve_strided_adjoint<T>,
              grid_size(s.blur.planes() * s.blur.height * s.blur.width, kThreads), kThreads, 0,
              stream, s, residual, kernel, grad_image);
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
