// CUDA kernels of Richardson-Lucy: one pass between transforms, which also folds, extends and
// updates the image.
#include "common/cuda_planes.h"
#include "deconv/deconv_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    lucy_ratio(LucyGrid<T> p, T scale, bool weights, T* grid) {
  const BlurShape& s = p.s;
  const int64_t size = p.g.n * p.g.m, ho = s.output_height(), wo = s.output_width();
  for (int64_t plane = first_plane(); plane < s.planes(); plane += plane_step()) {
    const int64_t source =
        plane / s.channels * p.mask_stride_b + plane % s.channels * p.mask_stride_c;
    for (int64_t i = thread_index(); i < size; i += thread_count()) {
      const int64_t y = i / p.g.m, x = i - y * p.g.m;
      T value = 0;
      if (y < ho && x < wo) {
        value = 1;
        if (!weights) {
          const T prediction = scale * grid[plane * size + i];
          value = p.observation[(plane * ho + y) * wo + x] /
                  (prediction < p.floor ? p.floor : prediction);
        }
        if (p.mask != nullptr) value *= p.mask[(source * ho + y) * wo + x];
      }
      grid[plane * size + i] = value;
    }
  }
}

// What pixel (y, x) collects from its places on the grid.
template <class T>
__device__ T folded(const LucyGrid<T>& p, const T* grid, int64_t y, int64_t x) {
  if (p.wraps) return grid[y * p.g.m + x];
  const Preimages rows = preimages(y, p.s.height, p.s.kernel_height, p.s.boundary);
  const Preimages columns = preimages(x, p.s.width, p.s.kernel_width, p.s.boundary);
  T total = 0;
  for (int64_t a = 0; a < rows.size(); ++a)
    for (int64_t b = 0; b < columns.size(); ++b) total += grid[rows[a] * p.g.m + columns[b]];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    lucy_inverse(LucyGrid<T> p, T scale, T least, const T* grid, T* inverse) {
  const int64_t w = p.s.width, pixels = p.s.height * w, size = p.g.n * p.g.m;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step())
    for (int64_t i = thread_index(); i < pixels; i += thread_count()) {
      const T weight = scale * folded(p, grid + plane * size, i / w, i % w);
      inverse[plane * pixels + i] = weight > least ? 1 / weight : T(0);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) lucy_step(LucyGrid<T> p, LucyStep<T> step) {
  const int64_t h = p.s.height, w = p.s.width, pixels = h * w, size = p.g.n * p.g.m;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step())
    for (int64_t i = thread_index(); i < pixels; i += thread_count()) {
      const int64_t y = i / w, x = i % w;
      const T* here = step.image + plane * pixels + i;
      const T inverse = step.inverse[plane * pixels + i];
      T value = *here;
      if (inverse != 0) {
        const T correction = step.scale * folded(p, step.correction + plane * size, y, x);
        value *= (correction < 0 ? T(0) : correction) * inverse;
      }
      if (step.total_variation != 0) {
        const int64_t north = y > 0 ? -w : 0, south = y + 1 < h ? w : 0;
        const int64_t west = x > 0 ? -1 : 0, east = x + 1 < w ? 1 : 0;
        const T bend = curvature(here[0], here[east], here[south], here[west], here[south + west],
                                 here[north], here[north + east], p.floor);
        value /= 1 - step.total_variation * bend;
      }
      step.output[plane * pixels + i] = value;
      if (step.next == nullptr) continue;
      // Every place on the grid shows one pixel, so that no two threads write it.
      const Preimages rows = preimages(y, h, p.s.kernel_height, p.s.boundary);
      const Preimages columns = preimages(x, w, p.s.kernel_width, p.s.boundary);
      for (int64_t a = 0; a < rows.size(); ++a)
        for (int64_t b = 0; b < columns.size(); ++b)
          step.next[plane * size + rows[a] * p.g.m + columns[b]] = value;
    }
}

}  // namespace

template <class T>
void lucy_ratio_cuda(const LucyGrid<T>& p, T scale, bool weights, T* grid, cudaStream_t stream) {
  LDEM_LAUNCH(lucy_ratio<T>, plane_grid(p.s.planes(), p.g.n * p.g.m, kThreads), kThreads, 0, stream,
              p, scale, weights, grid);
}

template <class T>
void lucy_inverse_cuda(const LucyGrid<T>& p, T scale, T least, const T* grid, T* inverse,
                       cudaStream_t stream) {
  LDEM_LAUNCH(lucy_inverse<T>, plane_grid(p.s.planes(), p.s.height * p.s.width, kThreads), kThreads,
              0, stream, p, scale, least, grid, inverse);
}

template <class T>
void lucy_step_cuda(const LucyGrid<T>& p, const LucyStep<T>& step, cudaStream_t stream) {
  LDEM_LAUNCH(lucy_step<T>, plane_grid(p.s.planes(), p.s.height * p.s.width, kThreads), kThreads, 0,
              stream, p, step);
}

#define LATENTDEM_INSTANTIATE(T)                                                            \
  template void lucy_ratio_cuda<T>(const LucyGrid<T>&, T, bool, T*, cudaStream_t);          \
  template void lucy_inverse_cuda<T>(const LucyGrid<T>&, T, T, const T*, T*, cudaStream_t); \
  template void lucy_step_cuda<T>(const LucyGrid<T>&, const LucyStep<T>&, cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
