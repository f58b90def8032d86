// CUDA kernels of the spectral blur: on and off the FFT grid, and one pointwise pass between the
// batched transforms.
#include "blur/blur_cuda.h"
#include "common/cuda_launch.h"
#include "common/cuda_reduce.h"
#include "common/wrap.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;
static_assert(kBinBlock == kThreads, "a thread per bin");

template <class T>
__global__ void __launch_bounds__(kThreads)
    image_to_grid(BlurShape s, SpectralGrid g, bool extend, const T* image, T* grid) {
  const int64_t height = extend ? s.extended_height() : s.height;
  const int64_t width = extend ? s.extended_width() : s.width;
  const int64_t above = extend ? extension_before(s.kernel_height) : 0;
  const int64_t left = extend ? extension_before(s.kernel_width) : 0;
  for (int64_t at = thread_index(); at < s.planes() * g.n * g.m; at += thread_count()) {
    const int64_t plane = at / (g.n * g.m), i = at / g.m % g.n, j = at % g.m;
    T value = 0;
    if (i < height && j < width) {
      const int64_t y = source_index(i - above, s.height, s.boundary);
      const int64_t x = source_index(j - left, s.width, s.boundary);
      if (y >= 0 && x >= 0) value = image[(plane * s.height + y) * s.width + x];
    }
    grid[at] = value;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_to_grid(BlurShape s, SpectralGrid g, const T* residual, T* grid) {
  const int64_t ho = s.output_height(), wo = s.output_width();
  for (int64_t at = thread_index(); at < s.planes() * g.n * g.m; at += thread_count()) {
    const int64_t plane = at / (g.n * g.m), i = at / g.m % g.n, j = at % g.m;
    grid[at] = i < ho && j < wo ? residual[(plane * ho + i) * wo + j] : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    grid_to_image(BlurShape s, SpectralGrid g, const T* grid, T* image) {
  for (int64_t at = thread_index(); at < s.planes() * s.height * s.width; at += thread_count()) {
    const int64_t plane = at / (s.height * s.width);
    const Preimages rows =
        preimages(at / s.width % s.height, s.height, s.kernel_height, s.boundary);
    const Preimages columns = preimages(at % s.width, s.width, s.kernel_width, s.boundary);
    const T* in = grid + plane * g.n * g.m;
    T total = 0;
    for (int64_t i = 0; i < rows.size(); ++i)
      for (int64_t j = 0; j < columns.size(); ++j) total += in[rows[i] * g.m + columns[j]];
    image[at] = total;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    kernel_to_grid(BlurShape s, SpectralGrid g, const T* kernel, T* grid) {
  const int64_t count = s.kernel_batch() * s.kernel_channels();
  for (int64_t at = thread_index(); at < count * g.n * g.m; at += thread_count()) {
    const int64_t index = at / (g.n * g.m);
    const int64_t i = (at / g.m % g.n + g.origin_y) % g.n, j = (at % g.m + g.origin_x) % g.m;
    const bool inside = i < s.kernel_height && j < s.kernel_width;
    grid[at] = inside ? kernel[(index * s.kernel_height + i) * s.kernel_width + j] : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    grid_to_kernel(BlurShape s, SpectralGrid g, const T* grid, T* kernel) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  const int64_t count = s.kernel_batch() * s.kernel_channels();
  for (int64_t at = thread_index(); at < count * taps; at += thread_count()) {
    const int64_t i = at / s.kernel_width % s.kernel_height, j = at % s.kernel_width;
    kernel[at] = grid[(at / taps * g.n + wrap_index(i - g.origin_y, g.n)) * g.m +
                      wrap_index(j - g.origin_x, g.m)];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) grid_residual(GridResidual<T> p) {
  __shared__ double scratch[32];
  const BlurShape& s = p.s;
  const int64_t ho = s.output_height(), wo = s.output_width(), size = p.g.n * p.g.m;
  const int64_t chunks = loss_chunks(p.g);
  for (int64_t item = blockIdx.x; item < s.planes() * chunks; item += gridDim.x) {
    const int64_t plane = item / chunks, begin = item % chunks * kLossChunk;
    const int64_t end = begin + kLossChunk < size ? begin + kLossChunk : size;
    const int64_t mask_plane = plane / s.channels * p.observed.mask_stride_b +
                               plane % s.channels * p.observed.mask_stride_c;
    T* prediction = p.prediction + plane * size;
    double loss = 0;
    for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
      const int64_t y = at / p.g.m, x = at % p.g.m;
      T value = 0;
      if (y < ho && x < wo) {
        const T difference = prediction[at] - p.observed.observation[(plane * ho + y) * wo + x];
        value = p.observed.mask == nullptr
                    ? difference
                    : p.observed.mask[(mask_plane * ho + y) * wo + x] * difference;
        loss += static_cast<double>(value) * difference;
      }
      if (p.keep_residual) prediction[at] = value;
    }
    loss = block_sum(loss, scratch);
    if (threadIdx.x == 0) p.losses[item] = loss;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    multiply_spectra(BlurShape s, SpectralGrid g, const Complex<T>* kernel, Complex<T>* image) {
  const int64_t bins = g.bins();
  for (int64_t at = thread_index(); at < s.planes() * bins; at += thread_count())
    image[at] = multiply(kernel[s.kernel_index(at / bins) * bins + at % bins], image[at]);
}

// A block owns kBinBlock bins of one kernel and of one group of the planes that share it.
template <class T>
__global__ void __launch_bounds__(kThreads) spectral_gradients(SpectralGradients<T> p) {
  __shared__ double scratch[32];
  const int64_t bins = p.g.bins(), blocks = bin_blocks(p.g);
  const int64_t kernels = p.s.kernel_batch() * p.s.kernel_channels();
  for (int64_t item = blockIdx.x; item < p.groups * kernels * blocks; item += gridDim.x) {
    const int64_t block = item % blocks, index = item / blocks % kernels;
    const int64_t group = item / blocks / kernels;
    const int64_t planes = p.s.sharing_planes();
    const int64_t share = (planes + p.groups - 1) / p.groups;
    const int64_t first = group * share;
    const int64_t last = first + share < planes ? first + share : planes;
    const int64_t bin = block * kBinBlock + threadIdx.x;
    const bool inside = bin < bins;
    const Complex<T> k =
        inside && p.kernel != nullptr ? p.kernel[index * bins + bin] : Complex<T>{T(0), T(0)};
    Complex<T> gradient{T(0), T(0)};
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = p.s.shared_plane(index, i) * bins + bin;
      double energy = 0;
      if (inside) {
        const Complex<T> x = p.image != nullptr ? p.image[at] : Complex<T>{T(0), T(0)};
        Complex<T> r = p.second[at];
        if (p.second_is_observation) {
          const Complex<T> prediction = multiply(k, x);
          r = {prediction.re - r.re, prediction.im - r.im};
          energy =
              static_cast<double>(squared_norm(r)) * spectrum_weight(bin % p.g.columns(), p.g.m);
        }
        if (p.kernel != nullptr) p.second[at] = multiply_conj(k, r);
        const Complex<T> term = multiply_conj(x, r);
        gradient = {gradient.re + term.re, gradient.im + term.im};
      }
      if (p.second_is_observation) {
        energy = block_sum(energy, scratch);
        // Parseval: a sum of n m bins of an unscaled transform.
        if (threadIdx.x == 0)
          p.losses[p.s.shared_plane(index, i) * blocks + block] =
              energy / (static_cast<double>(p.g.n) * static_cast<double>(p.g.m));
      }
    }
    if (inside && p.grad_kernel != nullptr)
      p.grad_kernel[(group * kernels + index) * bins + bin] = gradient;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_groups(int64_t groups, int64_t count, Complex<T>* partial) {
  for (int64_t at = thread_index(); at < count; at += thread_count()) {
    Complex<T> total = partial[at];
    for (int64_t group = 1; group < groups; ++group) {
      const Complex<T> term = partial[group * count + at];
      total = {total.re + term.re, total.im + term.im};
    }
    partial[at] = total;
  }
}

}  // namespace

// Enough blocks to fill a large GPU (about 132 multiprocessors of eight blocks), no more: every
// group costs a spectrum of memory.
int64_t group_count(const SpectralGrid& g, int64_t kernels, int64_t planes) {
  constexpr int64_t kBlocks = 1024;
  const int64_t wanted = (kBlocks + bin_blocks(g) * kernels - 1) / (bin_blocks(g) * kernels);
  return wanted < planes ? wanted : planes;
}

int64_t plane_groups(const BlurShape& s, const SpectralGrid& g) {
  const int64_t kernels = s.kernel_batch() * s.kernel_channels();
  return group_count(g, kernels, s.sharing_planes());
}

template <class T>
void image_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, bool extend, const T* image,
                        T* grid, cudaStream_t stream) {
  LDEM_LAUNCH(image_to_grid<T>, grid_size(s.planes() * g.n * g.m, kThreads), kThreads, 0, stream, s,
              g, extend, image, grid);
}

template <class T>
void residual_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, const T* residual, T* grid,
                           cudaStream_t stream) {
  LDEM_LAUNCH(residual_to_grid<T>, grid_size(s.planes() * g.n * g.m, kThreads), kThreads, 0, stream,
              s, g, residual, grid);
}

template <class T>
void grid_to_image_cuda(const BlurShape& s, const SpectralGrid& g, const T* grid, T* image,
                        cudaStream_t stream) {
  LDEM_LAUNCH(grid_to_image<T>, grid_size(s.planes() * s.height * s.width, kThreads), kThreads, 0,
              stream, s, g, grid, image);
}

template <class T>
void kernel_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, const T* kernel, T* grid,
                         cudaStream_t stream) {
  const int64_t count = s.kernel_batch() * s.kernel_channels() * g.n * g.m;
  LDEM_LAUNCH(kernel_to_grid<T>, grid_size(count, kThreads), kThreads, 0, stream, s, g, kernel,
              grid);
}

template <class T>
void grid_to_kernel_cuda(const BlurShape& s, const SpectralGrid& g, const T* grid, T* kernel,
                         cudaStream_t stream) {
  const int64_t count = s.kernel_batch() * s.kernel_channels() * s.kernel_height * s.kernel_width;
  LDEM_LAUNCH(grid_to_kernel<T>, grid_size(count, kThreads), kThreads, 0, stream, s, g, grid,
              kernel);
}

template <class T>
void grid_residual_cuda(const GridResidual<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(grid_residual<T>, grid_size(p.s.planes() * loss_chunks(p.g), 1), kThreads, 0, stream,
              p);
}

template <class T>
void multiply_spectra_cuda(const BlurShape& s, const SpectralGrid& g, const Complex<T>* kernel,
                           Complex<T>* image, cudaStream_t stream) {
  LDEM_LAUNCH(multiply_spectra<T>, grid_size(s.planes() * g.bins(), kThreads), kThreads, 0, stream,
              s, g, kernel, image);
}

template <class T>
void spectral_gradients_cuda(const SpectralGradients<T>& p, cudaStream_t stream) {
  const int64_t items = p.groups * p.s.kernel_batch() * p.s.kernel_channels() * bin_blocks(p.g);
  LDEM_LAUNCH(spectral_gradients<T>, grid_size(items, 1), kThreads, 0, stream, p);
}

template <class T>
void sum_groups_cuda(int64_t groups, int64_t count, Complex<T>* partial, cudaStream_t stream) {
  LDEM_LAUNCH(sum_groups<T>, grid_size(count, kThreads), kThreads, 0, stream, groups, count,
              partial);
}

#define LATENTDEM_INSTANTIATE(T)                                                                   \
  template void image_to_grid_cuda<T>(const BlurShape&, const SpectralGrid&, bool, const T*, T*,   \
                                      cudaStream_t);                                               \
  template void residual_to_grid_cuda<T>(const BlurShape&, const SpectralGrid&, const T*, T*,      \
                                         cudaStream_t);                                            \
  template void grid_to_image_cuda<T>(const BlurShape&, const SpectralGrid&, const T*, T*,         \
                                      cudaStream_t);                                               \
  template void kernel_to_grid_cuda<T>(const BlurShape&, const SpectralGrid&, const T*, T*,        \
                                       cudaStream_t);                                              \
  template void grid_to_kernel_cuda<T>(const BlurShape&, const SpectralGrid&, const T*, T*,        \
                                       cudaStream_t);                                              \
  template void grid_residual_cuda<T>(const GridResidual<T>&, cudaStream_t);                       \
  template void multiply_spectra_cuda<T>(const BlurShape&, const SpectralGrid&, const Complex<T>*, \
                                         Complex<T>*, cudaStream_t);                               \
  template void spectral_gradients_cuda<T>(const SpectralGradients<T>&, cudaStream_t);             \
  template void sum_groups_cuda<T>(int64_t, int64_t, Complex<T>*, cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
