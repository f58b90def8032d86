// CUDA kernels of the spectral spatially varying blur: weights on and off the grids, and sums over
// patches and over planes in one pass between the batched transforms.
#include "common/cuda_planes.h"
#include "varying_blur/varying_blur_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;  // per multiprocessor: what the registers must allow for, no more
static_assert(kBinBlock == kThreads, "a thread per bin");

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cut_patches(PatchShape p, SpectralGrid g, bool extend, const T* image, const T* weights,
                T* grids) {
  const BlurShape& s = p.blur;
  const int64_t height = extend ? s.extended_height() : s.height;
  const int64_t width = extend ? s.extended_width() : s.width;
  const int64_t above = extend ? extension_before(s.kernel_height) : 0;
  const int64_t left = extend ? extension_before(s.kernel_width) : 0;
  const int64_t pixels = s.height * s.width, size = g.n * g.m;
  for (int64_t plane = first_plane(); plane < s.planes() * p.patches; plane += plane_step()) {
    const T* in = image + plane / p.patches * pixels;
    const T* weight = weights + plane % p.patches * pixels;
    for (int64_t at = thread_index(); at < size; at += thread_count()) {
      const int64_t i = at / g.m, j = at - i * g.m;
      T value = 0;
      if (i < height && j < width) {
        const int64_t y = source_index(i - above, s.height, s.boundary);
        const int64_t x = source_index(j - left, s.width, s.boundary);
        const int64_t pixel = y * s.width + x;
        if (y >= 0 && x >= 0 && weight[pixel] != 0) value = weight[pixel] * in[pixel];
      }
      grids[plane * size + at] = value;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_patches(PatchShape p, SpectralGrid g, T scale, const Complex<T>* image,
                const Complex<T>* kernels, Complex<T>* output) {
  const int64_t bins = g.bins();
  for (int64_t plane = first_plane(); plane < p.blur.planes(); plane += plane_step()) {
    const Complex<T>* x = image + plane * p.patches * bins;
    const Complex<T>* k = kernels + p.first_kernel(plane) * bins;
    for (int64_t bin = thread_index(); bin < bins; bin += thread_count()) {
      Complex<T> total{T(0), T(0)};
      for (int64_t patch = 0; patch < p.patches; ++patch) {
        const Complex<T> term = multiply(k[patch * bins + bin], x[patch * bins + bin]);
        total = {total.re + term.re, total.im + term.im};
      }
      output[plane * bins + bin] = {scale * total.re, scale * total.im};
    }
  }
}

// A block owns kBinBlock bins of one kernel and of one group of the planes that share it.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) patch_gradients(PatchGradients<T> p) {
  const int64_t bins = p.g.bins(), blocks = bin_blocks(p.g), kernels = p.s.kernels();
  const int64_t patches = p.s.patches, planes = p.s.shared_planes();
  const int64_t share = (planes + p.groups - 1) / p.groups;
  for (int64_t item = blockIdx.x; item < p.groups * kernels * blocks; item += gridDim.x) {
    const int64_t index = item / blocks % kernels, group = item / blocks / kernels;
    const int64_t patch = index % patches, base = index / patches * p.s.blur.channels;
    const int64_t first = base + group * share;
    const int64_t last = group * share + share < planes ? first + share : base + planes;
    const int64_t bin = item % blocks * kBinBlock + threadIdx.x;
    if (bin >= bins) continue;
    const Complex<T> k =
        p.patches != nullptr ? p.kernels[index * bins + bin] : Complex<T>{T(0), T(0)};
    Complex<T> total{T(0), T(0)};
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t at = (plane * patches + patch) * bins + bin;
      const Complex<T> r = p.residual[plane * bins + bin];
      if (p.grad_kernels != nullptr) {
        const Complex<T> term = multiply_conj(p.image[at], r);
        total = {total.re + term.re, total.im + term.im};
      }
      if (p.patches != nullptr) {
        const Complex<T> back = multiply_conj(k, r);
        p.patches[at] = {p.scale * back.re, p.scale * back.im};
      }
    }
    if (p.grad_kernels != nullptr)
      p.grad_kernels[(group * kernels + index) * bins + bin] = {p.scale * total.re,
                                                                p.scale * total.im};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fold_patches(PatchShape p, SpectralGrid g, bool extend, const T* grids, const T* weights,
                 T* image) {
  const BlurShape& s = p.blur;
  const int64_t pixels = s.height * s.width, size = g.n * g.m;
  for (int64_t plane = first_plane(); plane < s.planes(); plane += plane_step())
    for (int64_t pixel = thread_index(); pixel < pixels; pixel += thread_count()) {
      const int64_t y = pixel / s.width, x = pixel % s.width;
      const Boundary boundary = extend ? s.boundary : Boundary::kValid;
      const Preimages rows = preimages(y, s.height, s.kernel_height, boundary);
      const Preimages columns = preimages(x, s.width, s.kernel_width, boundary);
      T total = 0;
      for (int64_t patch = 0; patch < p.patches; ++patch) {
        const T weight = weights[patch * pixels + pixel];
        if (weight == 0) continue;
        const T* in = grids + (plane * p.patches + patch) * size;
        T sum = 0;
        for (int64_t a = 0; a < rows.size(); ++a)
          for (int64_t b = 0; b < columns.size(); ++b) sum += in[rows[a] * g.m + columns[b]];
        total += weight * sum;
      }
      image[plane * pixels + pixel] = total;
    }
}

}  // namespace

template <class T>
void cut_patches_cuda(const PatchShape& s, const SpectralGrid& g, bool extend, const T* image,
                      const T* weights, T* grids, cudaStream_t stream) {
  LDEM_LAUNCH(cut_patches<T>, plane_grid(s.blur.planes() * s.patches, g.n * g.m, kThreads),
              kThreads, 0, stream, s, g, extend, image, weights, grids);
}

template <class T>
void sum_patches_cuda(const PatchShape& s, const SpectralGrid& g, T scale, const Complex<T>* image,
                      const Complex<T>* kernels, Complex<T>* output, cudaStream_t stream) {
  LDEM_LAUNCH(sum_patches<T>, plane_grid(s.blur.planes(), g.bins(), kThreads), kThreads, 0, stream,
              s, g, scale, image, kernels, output);
}

template <class T>
void patch_gradients_cuda(const PatchGradients<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(patch_gradients<T>, grid_size(p.groups * p.s.kernels() * bin_blocks(p.g), 1),
              kThreads, 0, stream, p);
}

template <class T>
void fold_patches_cuda(const PatchShape& s, const SpectralGrid& g, bool extend, const T* grids,
                       const T* weights, T* image, cudaStream_t stream) {
  LDEM_LAUNCH(fold_patches<T>, plane_grid(s.blur.planes(), s.blur.height * s.blur.width, kThreads),
              kThreads, 0, stream, s, g, extend, grids, weights, image);
}

#define LATENTDEM_INSTANTIATE(T)                                                                  \
  template void cut_patches_cuda<T>(const PatchShape&, const SpectralGrid&, bool, const T*,       \
                                    const T*, T*, cudaStream_t);                                  \
  template void sum_patches_cuda<T>(const PatchShape&, const SpectralGrid&, T, const Complex<T>*, \
                                    const Complex<T>*, Complex<T>*, cudaStream_t);                \
  template void patch_gradients_cuda<T>(const PatchGradients<T>&, cudaStream_t);                  \
  template void fold_patches_cuda<T>(const PatchShape&, const SpectralGrid&, bool, const T*,      \
                                     const T*, T*, cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
