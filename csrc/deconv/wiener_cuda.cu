// CUDA kernels of the Wiener step: one pointwise pass between transforms.
#include "blur/blur_cuda.h"
#include "common/cuda_planes.h"
#include "deconv/deconv_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;
static_assert(kBinBlock == kThreads, "a thread per bin");

template <class T>
__device__ const T* ratio_of(const WienerGrid<T>& p, int64_t plane) {
  const WienerParams<T>& f = p.filter;
  return f.ratio + plane / p.s.channels * f.ratio_stride_b +
         plane % p.s.channels * f.ratio_stride_c;
}

template <class T>
__device__ const Complex<T>* kernel_of(const WienerGrid<T>& p, int64_t plane) {
  return p.filter.kernel + p.s.kernel_index(plane) * p.g.bins();
}

// The plane of an observation that may serve the whole batch.
__device__ inline int64_t observed_plane(const BlurShape& s, int64_t stride_b, int64_t plane) {
  return plane / s.channels * stride_b * s.channels + plane % s.channels;
}

template <class T>
__device__ const T* mask_of(const WienerGrid<T>& p, const MaskParams<T>& m, int64_t plane) {
  return m.mask + plane / p.s.channels * m.stride_b * p.g.n * p.g.m;
}

template <class T>
__global__ void __launch_bounds__(kThreads) apply_transfer(TransferParams<T> p) {
  const int64_t bins = p.g.bins();
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const Complex<T>* k = p.kernel + p.s.kernel_index(plane) * bins;
    const Complex<T>* in = p.input + plane * bins;
    Complex<T>* out = p.output + plane * bins;
    for (int64_t i = thread_index(); i < bins; i += thread_count())
      out[i] = scale(p.conjugate ? multiply_conj(k[i], in[i]) : multiply(k[i], in[i]), p.factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    wiener_solve_bins(WienerGrid<T> p, const Complex<T>* observation, int64_t observation_stride_b,
                      Complex<T>* image) {
  const int64_t bins = p.g.bins(), step = p.filter.ratio_stride_bin;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const Complex<T>* k = kernel_of(p, plane);
    const Complex<T>* y = observation + observed_plane(p.s, observation_stride_b, plane) * bins;
    const T* ratio = ratio_of(p, plane);
    Complex<T>* x = image + plane * bins;
    for (int64_t i = thread_index(); i < bins; i += thread_count())
      x[i] = scale(wiener_solve(k[i], x[i], y[i], ratio[i * step]), p.scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    wiener_correct(WienerGrid<T> p, const Complex<T>* image, Complex<T>* misfit) {
  const int64_t bins = p.g.bins(), step = p.filter.ratio_stride_bin;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const Complex<T>* k = kernel_of(p, plane);
    const Complex<T>* x = image + plane * bins;
    const T* ratio = ratio_of(p, plane);
    Complex<T>* out = misfit + plane * bins;
    for (int64_t i = thread_index(); i < bins; i += thread_count())
      out[i] = scale(add(x[i], wiener_filter(WienerFilter::kGain, k[i], out[i], ratio[i * step])),
                     p.scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    wiener_filter_bins(WienerGrid<T> p, WienerFilterPass<T> pass) {
  const int64_t bins = p.g.bins(), step = p.filter.ratio_stride_bin;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const Complex<T>* k = kernel_of(p, plane);
    const T* ratio = ratio_of(p, plane);
    for (int64_t i = thread_index(); i < bins; i += thread_count()) {
      const int64_t at = plane * bins + i;
      const Complex<T> value = pass.spectrum[at];
      if (pass.echo != nullptr) {
        const T term = multiply_conj(pass.misfit[at], value).re;
        pass.echo[at] = pass.accumulate ? pass.echo[at] + term : term;
      }
      pass.spectrum[at] = wiener_filter(pass.filter, k[i], value, ratio[i * step]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_misfit(WienerGrid<T> p, MaskParams<T> m, const T* observation,
                  int64_t observation_stride_b, T* prediction) {
  const int64_t size = p.g.n * p.g.m;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const T* mask = mask_of(p, m, plane);
    const T* y = observation + observed_plane(p.s, observation_stride_b, plane) * size;
    T* out = prediction + plane * size;
    for (int64_t i = thread_index(); i < size; i += thread_count())
      out[i] = mask[i] * (y[i] - p.scale * out[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    impute(WienerGrid<T> p, MaskParams<T> m, const T* misfit, T* change) {
  const int64_t size = p.g.n * p.g.m;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const T* mask = mask_of(p, m, plane);
    const T* seen = misfit + plane * size;
    T* out = change + plane * size;
    for (int64_t i = thread_index(); i < size; i += thread_count())
      out[i] = seen[i] + (1 - mask[i]) * (p.scale * out[i]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    impute_transposed(WienerGrid<T> p, MaskParams<T> m, bool first, bool last, T* total, T* grad) {
  const int64_t size = p.g.n * p.g.m;
  for (int64_t plane = first_plane(); plane < p.s.planes(); plane += plane_step()) {
    const T* mask = mask_of(p, m, plane);
    for (int64_t i = thread_index(); i < size; i += thread_count()) {
      const int64_t at = plane * size + i;
      const T value = p.scale * grad[at], sum = first ? value : total[at] + value;
      total[at] = last ? mask[i] * sum : sum;
      if (!last) grad[at] = (1 - mask[i]) * value;
    }
  }
}

// A block owns kBinBlock bins of one kernel and of one group of the planes that share it.
template <class T>
__global__ void __launch_bounds__(kThreads) wiener_backward(WienerGrid<T> p, WienerBackward<T> b) {
  const int64_t bins = p.g.bins(), blocks = bin_blocks(p.g);
  const int64_t kernels = p.s.kernel_batch() * p.s.kernel_channels();
  const bool filter = b.grad_kernel != nullptr || b.grad_ratio != nullptr;
  for (int64_t item = blockIdx.x; item < b.groups * kernels * blocks; item += gridDim.x) {
    const int64_t index = item / blocks % kernels, group = item / blocks / kernels;
    const int64_t planes = p.s.sharing_planes();
    const int64_t share = (planes + b.groups - 1) / b.groups, first = group * share;
    const int64_t last = first + share < planes ? first + share : planes;
    const int64_t bin = item % blocks * kBinBlock + threadIdx.x;
    if (bin >= bins) continue;
    const Complex<T> k = p.filter.kernel[index * bins + bin];
    Complex<T> total{T(0), T(0)};
    for (int64_t i = first; i < last; ++i) {
      const int64_t plane = p.s.shared_plane(index, i), at = plane * bins + bin;
      const T ratio = ratio_of(p, plane)[bin * p.filter.ratio_stride_bin];
      const Complex<T> g = b.grad[at];
      const Complex<T> o = b.observed != nullptr
                               ? b.observed[at]
                               : wiener_filter(WienerFilter::kGainTransposed, k, g, ratio);
      if (filter) {
        const Complex<T> x = b.image[at];
        const Complex<T> misfit =
            b.misfit != nullptr
                ? b.misfit[at]
                : subtract(b.observation[observed_plane(p.s, b.observation_stride_b, plane) * bins +
                                         bin],
                           multiply(k, x));
        const WienerGradient<T> d = wiener_gradient(k, multiply_conj(misfit, g),
                                                    b.echo != nullptr ? b.echo[at] : T(0), ratio);
        if (b.grad_ratio != nullptr)
          b.grad_ratio[at] = d.ratio * p.scale * spectrum_weight(bin % p.g.columns(), p.g.m);
        // The gradient in the prediction K X is -O.
        total = add(total, subtract(d.kernel, multiply_conj(x, o)));
      }
      if (b.grad_observation != nullptr) b.grad_observation[at] = scale(o, p.scale);
      b.grad[at] = scale(subtract(g, multiply_conj(k, o)), p.scale);
    }
    if (b.grad_kernel != nullptr)
      b.grad_kernel[(group * kernels + index) * bins + bin] = scale(total, p.scale);
  }
}

}  // namespace

template <class T>
void apply_transfer_cuda(const TransferParams<T>& p, cudaStream_t stream) {
  LDEM_LAUNCH(apply_transfer<T>, plane_grid(p.s.planes(), p.g.bins(), kThreads), kThreads, 0,
              stream, p);
}

template <class T>
void wiener_solve_cuda(const WienerGrid<T>& p, const Complex<T>* observation,
                       int64_t observation_stride_b, Complex<T>* image, cudaStream_t stream) {
  LDEM_LAUNCH(wiener_solve_bins<T>, plane_grid(p.s.planes(), p.g.bins(), kThreads), kThreads, 0,
              stream, p, observation, observation_stride_b, image);
}

template <class T>
void wiener_correct_cuda(const WienerGrid<T>& p, const Complex<T>* image, Complex<T>* misfit,
                         cudaStream_t stream) {
  LDEM_LAUNCH(wiener_correct<T>, plane_grid(p.s.planes(), p.g.bins(), kThreads), kThreads, 0,
              stream, p, image, misfit);
}

template <class T>
void wiener_filter_cuda(const WienerGrid<T>& p, const WienerFilterPass<T>& pass,
                        cudaStream_t stream) {
  LDEM_LAUNCH(wiener_filter_bins<T>, plane_grid(p.s.planes(), p.g.bins(), kThreads), kThreads, 0,
              stream, p, pass);
}

template <class T>
void masked_misfit_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, const T* observation,
                        int64_t observation_stride_b, T* prediction, cudaStream_t stream) {
  LDEM_LAUNCH(masked_misfit<T>, plane_grid(p.s.planes(), p.g.n * p.g.m, kThreads), kThreads, 0,
              stream, p, m, observation, observation_stride_b, prediction);
}

template <class T>
void impute_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, const T* misfit, T* change,
                 cudaStream_t stream) {
  LDEM_LAUNCH(impute<T>, plane_grid(p.s.planes(), p.g.n * p.g.m, kThreads), kThreads, 0, stream, p,
              m, misfit, change);
}

template <class T>
void impute_transposed_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, bool first, bool last,
                            T* total, T* grad, cudaStream_t stream) {
  LDEM_LAUNCH(impute_transposed<T>, plane_grid(p.s.planes(), p.g.n * p.g.m, kThreads), kThreads, 0,
              stream, p, m, first, last, total, grad);
}

template <class T>
void wiener_backward_cuda(const WienerGrid<T>& p, const WienerBackward<T>& b, cudaStream_t stream) {
  const int64_t items = b.groups * p.s.kernel_batch() * p.s.kernel_channels() * bin_blocks(p.g);
  LDEM_LAUNCH(wiener_backward<T>, grid_size(items, 1), kThreads, 0, stream, p, b);
}

#define LATENTDEM_INSTANTIATE(T)                                                                  \
  template void apply_transfer_cuda<T>(const TransferParams<T>&, cudaStream_t);                   \
  template void wiener_solve_cuda<T>(const WienerGrid<T>&, const Complex<T>*, int64_t,            \
                                     Complex<T>*, cudaStream_t);                                  \
  template void wiener_correct_cuda<T>(const WienerGrid<T>&, const Complex<T>*, Complex<T>*,      \
                                       cudaStream_t);                                             \
  template void wiener_filter_cuda<T>(const WienerGrid<T>&, const WienerFilterPass<T>&,           \
                                      cudaStream_t);                                              \
  template void masked_misfit_cuda<T>(const WienerGrid<T>&, const MaskParams<T>&, const T*,       \
                                      int64_t, T*, cudaStream_t);                                 \
  template void impute_cuda<T>(const WienerGrid<T>&, const MaskParams<T>&, const T*, T*,          \
                               cudaStream_t);                                                     \
  template void impute_transposed_cuda<T>(const WienerGrid<T>&, const MaskParams<T>&, bool, bool, \
                                          T*, T*, cudaStream_t);                                  \
  template void wiener_backward_cuda<T>(const WienerGrid<T>&, const WienerBackward<T>&,           \
                                        cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
