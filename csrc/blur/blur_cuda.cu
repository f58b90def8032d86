// CUDA kernels of the blur operators.
#include "blur/blur_cuda.h"
#include "common/cuda_launch.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;

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

}  // namespace

template <class T>
void convolve_strided_cuda(const DownsampleShape& s, const T* image, const T* kernel, T* output,
                           cudaStream_t stream) {
  const unsigned blocks = grid_size(s.blur.planes() * s.height() * s.width(), kThreads);
  LDEM_LAUNCH(convolve_strided<T>, blocks, kThreads, 0, stream, s, image, kernel, output);
}

#define LATENTDEM_INSTANTIATE(T)                                                         \
  template void convolve_strided_cuda<T>(const DownsampleShape&, const T*, const T*, T*, \
                                         cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
