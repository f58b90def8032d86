// CUDA kernels of the kernel estimate around its loop, and of the loop for kernels too large for
// support_loop_cuda.cu.
#include "common/cuda_reduce.h"
#include "common/wrap.h"
#include "kernel_map/kernel_map_cuda.h"
#include "kernel_map/support_solver_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;

// Calls function(row, column) for every column of every row; whole blocks take rows.
template <class Function>
__device__ void for_rows(int64_t rows, int64_t columns, const Function& function) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t column = threadIdx.x; column < columns; column += blockDim.x)
      function(row, column);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    make_fields(FieldShape s, int64_t n, int64_t m, const T* image, const T* window, T* fields) {
  const int64_t h = s.height, w = s.width, per_image = s.fields();
  for_rows(s.batch * per_image * n, m, [&](int64_t row, int64_t x) {
    const int64_t plane = row / n, y = row % n;
    if (y >= h || x >= w) {
      fields[row * m + x] = 0;
      return;
    }
    const int64_t b = plane / per_image, f = plane % per_image;
    const T* const in = image + (b * s.channels + f % s.channels) * h * w;
    T value = in[y * w + x];
    if (s.gradient) {
      const bool vertical = f < s.channels;
      const int64_t down = y + 1 < h ? y + 1 : 0, right = x + 1 < w ? x + 1 : 0;
      value = (vertical ? in[down * w + x] : in[y * w + right]) - value;
    }
    if (window != nullptr) value *= window[(b * s.window_stride_b * h + y) * w + x];
    fields[row * m + x] = value;
  });
}

// A block takes kThreads bins of one image at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pool_spectra(int64_t batch, int64_t fields, int64_t bins, const Complex<T>* image,
                 const Complex<T>* observation, Complex<T>* pooled) {
  const int64_t tiles = (bins + kThreads - 1) / kThreads;
  for (int64_t tile = blockIdx.x; tile < batch * tiles; tile += gridDim.x) {
    const int64_t b = tile / tiles, bin = tile % tiles * kThreads + threadIdx.x;
    if (bin >= bins) continue;
    Complex<T> power{0, 0}, cross{0, 0};
    for (int64_t f = 0; f < fields; ++f) {
      const Complex<T> x = image[(b * fields + f) * bins + bin];
      const Complex<T> xy = multiply_conj(x, observation[(b * fields + f) * bins + bin]);
      power.re += squared_norm(x);
      cross.re += xy.re;
      cross.im += xy.im;
    }
    pooled[b * bins + bin] = power;
    pooled[(batch + b) * bins + bin] = cross;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_lags(GatherLags<T> p) {
  const int64_t kh = p.kernel_height, kw = p.kernel_width, rows = 2 * kh - 1, columns = 2 * kw - 1;
  for_rows(p.batch * (rows + kh), columns, [&](int64_t row, int64_t j) {
    const int64_t b = row / (rows + kh), i = row % (rows + kh);
    if (i < rows) {
      const int64_t dy = i - kh + 1, dx = j - kw + 1;
      const T value = p.correlations[(b * p.n + wrap_index(dy, p.n)) * p.m + wrap_index(dx, p.m)];
      p.autocorrelation[(b * rows + i) * columns + j] =
          value + static_cast<T>(p.noise.of(b) * noise_autocorrelation(dy, dx, p.gradient));
    } else if (j < kw) {
      const int64_t y = wrap_index(i - rows - kh / 2, p.n), x = wrap_index(j - kw / 2, p.m);
      p.crosscorrelation[(b * kh + i - rows) * kw + j] =
          p.correlations[((p.batch + b) * p.n + y) * p.m + x];
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) full_grid_step(FullGridStepCuda<T> p) {
  const int64_t columns = p.m / 2 + 1;
  for (int64_t row = blockIdx.x; row < p.batch * p.n; row += gridDim.x) {
    const double noise = p.noise.of(row / p.n);
    const double fy = 2 - 2 * cospi(2.0 * static_cast<double>(row % p.n) / p.n);
    for (int64_t x = threadIdx.x; x < columns; x += blockDim.x) {
      const int64_t i = row * columns + x;
      const double filter = p.gradient ? fy + 2 - 2 * cospi(2.0 * static_cast<double>(x) / p.m) : 1;
      const T alpha = static_cast<T>(p.alpha);
      const T scale = 1 / (p.power[i].re + static_cast<T>(noise * filter) + alpha);
      const Complex<T> cross = p.cross[i], z = p.z[i];
      p.z[i] = {(cross.re + alpha * z.re) * scale, (cross.im + alpha * z.im) * scale};
    }
  }
}

// Element i of a vector of kernel size at (y - oy, x - ox) of grids that are wrapped round.
template <class T>
struct WrappedGrid {
  const T* product;
  T* grid;
  int n, m, width, oy, ox;
  __device__ int64_t index(int i) const {
    const int row = i / width, y = row - oy, x = i - row * width - ox;
    return static_cast<int64_t>(y < 0 ? y + n : y) * m + (x < 0 ? x + m : x);
  }
  __device__ T get(int i) const { return product[index(i)]; }
  __device__ void put(int i, T value) const { grid[index(i)] = value; }
};

template <class T>
__device__ SupportSolver<T, WrappedGrid<T>> solver_of(const SupportStep<T>& s, int64_t b, int oy,
                                                      int ox, double* scratch) {
  const SupportLoopParams<T>& p = s.loop;
  const int64_t size = p.kernel_height * p.kernel_width, first = b * size, plane = b * p.n * p.m;
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {p,
          narrow(size),
          p.solution + first,
          s.residual + first,
          s.direction + first,
          p.split + first,
          p.rhs + first,
          scratch,
          {s.product + plane, s.grid + plane, narrow(p.n), narrow(p.m), narrow(p.kernel_width), oy,
           ox}};
}

// One block an image.
template <class T>
__global__ void __launch_bounds__(kThreads) support_step(SupportStep<T> s, SupportPhase phase) {
  __shared__ double scratch[32];
  const int64_t b = blockIdx.x;
  const auto solver = solver_of(s, b, 0, 0, scratch);
  if (phase == SupportPhase::kStart) {
    const double energy = solver.start();
    if (threadIdx.x == 0) s.energy[b] = energy;
  } else if (phase == SupportPhase::kStep) {
    double energy = s.energy[b];
    __syncthreads();
    if (solver.step(energy) && threadIdx.x == 0) s.energy[b] = energy;
  } else {
    if (phase == SupportPhase::kProject) solver.project();
    solver.load();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) full_grid_project(SupportStep<T> s, bool load_only) {
  __shared__ double scratch[32];
  const auto middle = [](int64_t size) { return static_cast<int>(size / 2); };
  const auto solver =
      solver_of(s, blockIdx.x, middle(s.loop.kernel_height), middle(s.loop.kernel_width), scratch);
  if (!load_only) {
    solver.each([&](int i) { solver.solution[i] = solver.grid.get(i); });
    solver.project();
  }
  solver.each([&](int i) { solver.grid.put(i, solver.split[i]); });
}

template <class T>
__global__ void __launch_bounds__(kThreads) wrap_lags(SupportLoopParams<T> p, T* grid) {
  const int64_t rows = 2 * p.kernel_height - 1, columns = 2 * p.kernel_width - 1;
  for_rows(p.batch * p.n, p.m, [&](int64_t row, int64_t x) {
    const int64_t b = row / p.n, i = wrap_index(row % p.n + p.kernel_height - 1, p.n);
    const int64_t j = wrap_index(x + p.kernel_width - 1, p.m);
    grid[row * p.m + x] =
        i < rows && j < columns ? p.autocorrelation[(b * rows + i) * columns + j] : T(0);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_spectrum(int64_t count, const Complex<T>* symbol, Complex<T>* z) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    const T s = symbol[i].re;
    z[i] = {z[i].re * s, z[i].im * s};
  }
}

// Newton's method on sum max(v - shift, 0) = 1 from the left: each step drops elements for good,
// so it ends at the exact root. v is taken relative to its largest value, as in
// project_simplex_cpu.
template <class T>
__global__ void __launch_bounds__(kThreads)
    project_simplex(int64_t planes, int64_t size, const T* in, T* out) {
  __shared__ double scratch[32];
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    const T* const v = in + plane * size;
    T* const projected = out + plane * size;
    double top = -INFINITY, finite = 1;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      top = v[i] > top ? static_cast<double>(v[i]) : top;
      if (!isfinite(v[i])) finite = 0;
    }
    top = block_max(top, scratch);
    finite = -block_max(-finite, scratch);
    // The largest element is kept, and alone it would need -1.
    double shift = -1, before = 0;
    for (bool more = finite != 0; more;) {
      double sum = 0, count = 0;
      for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
        const double d = static_cast<double>(v[i]) - top;
        if (d > shift) sum += d, count += 1;
      }
      sum = block_sum(sum, scratch);
      count = block_sum(count, scratch);
      const double next = (sum - 1) / count;
      more = count != before && next > shift;
      before = count;
      if (next > shift) shift = next;
    }
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
      const double d = static_cast<double>(v[i]) - top - shift;
      projected[i] = finite == 0 ? static_cast<T>(NAN) : static_cast<T>(d > 0 ? d : 0.0);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    recenter_kernel(int64_t planes, int64_t kh, int64_t kw, bool subpixel, const T* in, T* out) {
  __shared__ double scratch[32];
  for (int64_t plane = blockIdx.x; plane < planes; plane += gridDim.x) {
    const T* const k = in + plane * kh * kw;
    double sum = 0, sum_y = 0, sum_x = 0;
    for (int64_t i = threadIdx.x; i < kh * kw; i += blockDim.x) {
      const double value = k[i];
      sum += value;
      sum_y += value * static_cast<double>(i / kw);
      sum_x += value * static_cast<double>(i % kw);
    }
    sum = block_sum(sum, scratch);
    const double shift_y = static_cast<double>(kh / 2) - block_sum(sum_y, scratch) / sum;
    const double shift_x = static_cast<double>(kw / 2) - block_sum(sum_x, scratch) / sum;
    // Else it is no kernel, or not finite.
    const bool centred = fabs(sum) > 0 && fabs(shift_y) <= kh && fabs(shift_x) <= kw;
    const double dy = !centred ? 0 : subpixel ? shift_y : round(shift_y);
    const double dx = !centred ? 0 : subpixel ? shift_x : round(shift_x);
    const auto fy = static_cast<int64_t>(floor(dy)), fx = static_cast<int64_t>(floor(dx));
    const double ty = dy - fy, tx = dx - fx;
    const auto at = [&](int64_t y, int64_t x) {
      return y >= 0 && y < kh && x >= 0 && x < kw ? static_cast<double>(k[y * kw + x]) : 0.0;
    };
    const auto moved = [&](int64_t i) {
      const int64_t y = i / kw - fy, x = i % kw - fx;
      return (1 - ty) * ((1 - tx) * at(y, x) + tx * at(y, x - 1)) +
             ty * ((1 - tx) * at(y - 1, x) + tx * at(y - 1, x - 1));
    };
    double kept = 0;
    for (int64_t i = threadIdx.x; i < kh * kw; i += blockDim.x) kept += moved(i);
    kept = block_sum(kept, scratch);
    const bool shifted = centred && fabs(kept) > 0;
    for (int64_t i = threadIdx.x; i < kh * kw; i += blockDim.x)
      out[plane * kh * kw + i] = shifted ? static_cast<T>(moved(i) * (sum / kept)) : k[i];
  }
}

}  // namespace

template <class T>
void make_fields_cuda(const FieldShape& s, int64_t n, int64_t m, const T* image, const T* window,
                      T* fields, cudaStream_t stream) {
  LDEM_LAUNCH(make_fields<T>, grid_size(s.batch * s.fields() * n, 1), kThreads, 0, stream, s, n, m,
              image, window, fields);
}

template <class T>
void pool_spectra_cuda(int64_t batch, int64_t fields, int64_t bins, const Complex<T>* image,
                       const Complex<T>* observation, Complex<T>* pooled, cudaStream_t stream) {
  const int64_t tiles = (bins + kThreads - 1) / kThreads;
  LDEM_LAUNCH(pool_spectra<T>, grid_size(batch * tiles, 1), kThreads, 0, stream, batch, fields,
              bins, image, observation, pooled);
}

template <class T>
void gather_lags_cuda(const GatherLags<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(gather_lags<T>, grid_size(p.batch * (3 * p.kernel_height - 1), 1), kThreads, 0,
              stream, p);
}

template <class T>
void full_grid_step_cuda(const FullGridStepCuda<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(full_grid_step<T>, grid_size(p.batch * p.n, 1), kThreads, 0, stream, p);
}

template <class T>
void support_step_cuda(const SupportStep<T>& p, SupportPhase phase, cudaStream_t stream) {
  LDEM_LAUNCH(support_step<T>, static_cast<unsigned>(p.loop.batch), kThreads, 0, stream, p, phase);
}

template <class T>
void full_grid_project_cuda(const SupportStep<T>& p, bool load_only, cudaStream_t stream) {
  LDEM_LAUNCH(full_grid_project<T>, static_cast<unsigned>(p.loop.batch), kThreads, 0, stream, p,
              load_only);
}

template <class T>
void wrap_lags_cuda(const SupportLoopParams<T>& p, T* grid, cudaStream_t stream) {
  LDEM_LAUNCH(wrap_lags<T>, grid_size(p.batch * p.n, 1), kThreads, 0, stream, p, grid);
}

template <class T>
void scale_spectrum_cuda(int64_t count, const Complex<T>* symbol, Complex<T>* z,
                         cudaStream_t stream) {
  LDEM_LAUNCH(scale_spectrum<T>, grid_size(count, kThreads), kThreads, 0, stream, count, symbol, z);
}

template <class T>
void project_simplex_cuda(int64_t planes, int64_t size, const T* in, T* out, cudaStream_t stream) {
  LDEM_LAUNCH(project_simplex<T>, grid_size(planes, 1), kThreads, 0, stream, planes, size, in, out);
}

template <class T>
void recenter_kernel_cuda(int64_t planes, int64_t kh, int64_t kw, bool subpixel, const T* in,
                          T* out, cudaStream_t stream) {
  LDEM_LAUNCH(recenter_kernel<T>, grid_size(planes, 1), kThreads, 0, stream, planes, kh, kw,
              subpixel, in, out);
}

#define LATENTDEM_INSTANTIATE(T)                                                                 \
  template void make_fields_cuda<T>(const FieldShape&, int64_t, int64_t, const T*, const T*, T*, \
                                    cudaStream_t);                                               \
  template void pool_spectra_cuda<T>(int64_t, int64_t, int64_t, const Complex<T>*,               \
                                     const Complex<T>*, Complex<T>*, cudaStream_t);              \
  template void gather_lags_cuda<T>(const GatherLags<T>&, cudaStream_t);                         \
  template void full_grid_step_cuda<T>(const FullGridStepCuda<T>&, cudaStream_t);                \
  template void support_step_cuda<T>(const SupportStep<T>&, SupportPhase, cudaStream_t);         \
  template void full_grid_project_cuda<T>(const SupportStep<T>&, bool, cudaStream_t);            \
  template void wrap_lags_cuda<T>(const SupportLoopParams<T>&, T*, cudaStream_t);                \
  template void scale_spectrum_cuda<T>(int64_t, const Complex<T>*, Complex<T>*, cudaStream_t);   \
  template void project_simplex_cuda<T>(int64_t, int64_t, const T*, T*, cudaStream_t);           \
  template void recenter_kernel_cuda<T>(int64_t, int64_t, int64_t, bool, const T*, T*,           \
                                        cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
