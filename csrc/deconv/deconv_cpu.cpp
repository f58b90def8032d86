// CPU kernels of the deconvolutions: pointwise passes along contiguous rows.
#include "deconv/deconv.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace latentdem {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

template <class T>
const Complex<T>* kernel_row(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                             int64_t plane, int64_t y) {
  return p.kernel + (s.kernel_index(plane) * g.n + y) * g.columns();
}

template <class T>
const T* ratio_row(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                   int64_t plane, int64_t y) {
  return p.ratio + plane / s.channels * p.ratio_stride_b + plane % s.channels * p.ratio_stride_c +
         y * g.columns() * p.ratio_stride_bin;
}

template <WienerFilter filter, class T>
void filter_rows(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                 Complex<T>* spectrum) {
  const int64_t columns = g.columns(), step = p.ratio_stride_bin;
  for_each_row(s.planes(), g.n, columns, [&](int64_t plane, int64_t y) {
    const Complex<T>* k = kernel_row(s, g, p, plane, y);
    const T* ratio = ratio_row(s, g, p, plane, y);
    Complex<T>* out = spectrum + (plane * g.n + y) * columns;
    for (int64_t x = 0; x < columns; ++x)
      out[x] = wiener_filter(filter, k[x], out[x], ratio[x * step]);
  });
}

template <class T>
const T* mask_row(const BlurShape& s, const MaskParams<T>& m, int64_t plane, int64_t y) {
  return m.mask + (plane / s.channels * m.stride_b * s.height + y) * s.width;
}

}  // namespace

template <class T>
void wiener_solve_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                      const Complex<T>* observation, int64_t observation_stride_b,
                      Complex<T>* image) {
  const int64_t columns = g.columns(), step = p.ratio_stride_bin;
  for_each_row(s.planes(), g.n, columns, [&](int64_t plane, int64_t y) {
    const int64_t source =
        plane / s.channels * observation_stride_b * s.channels + plane % s.channels;
    const Complex<T>* k = kernel_row(s, g, p, plane, y);
    const T* ratio = ratio_row(s, g, p, plane, y);
    const Complex<T>* target = observation + (source * g.n + y) * columns;
    Complex<T>* out = image + (plane * g.n + y) * columns;
    for (int64_t x = 0; x < columns; ++x)
      out[x] = wiener_solve(k[x], out[x], target[x], ratio[x * step]);
  });
}

template <class T>
void wiener_filter_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                       WienerFilter filter, Complex<T>* spectrum) {
  if (filter == WienerFilter::kGain) return filter_rows<WienerFilter::kGain>(s, g, p, spectrum);
  if (filter == WienerFilter::kEcho) return filter_rows<WienerFilter::kEcho>(s, g, p, spectrum);
  filter_rows<WienerFilter::kGainTransposed>(s, g, p, spectrum);
}

template <class T>
void masked_misfit_cpu(const BlurShape& s, const MaskParams<T>& m, const T* observation,
                       int64_t observation_stride_b, T* prediction) {
  for_each_row(s.planes(), s.height, s.width, [&](int64_t plane, int64_t y) {
    const int64_t source =
        plane / s.channels * observation_stride_b * s.channels + plane % s.channels;
    const T* mask = mask_row(s, m, plane, y);
    const T* target = observation + (source * s.height + y) * s.width;
    T* out = prediction + (plane * s.height + y) * s.width;
    for (int64_t x = 0; x < s.width; ++x) out[x] = mask[x] * (target[x] - out[x]);
  });
}

template <class T>
void impute_cpu(const BlurShape& s, const MaskParams<T>& m, const T* misfit, T* change) {
  for_each_row(s.planes(), s.height, s.width, [&](int64_t plane, int64_t y) {
    const T* mask = mask_row(s, m, plane, y);
    const T* in = misfit + (plane * s.height + y) * s.width;
    T* out = change + (plane * s.height + y) * s.width;
    for (int64_t x = 0; x < s.width; ++x) out[x] = in[x] + (1 - mask[x]) * out[x];
  });
}

template <class T>
void impute_transposed_cpu(const BlurShape& s, const MaskParams<T>& m, T* total, T* grad) {
  for_each_row(s.planes(), s.height, s.width, [&](int64_t plane, int64_t y) {
    const T* mask = mask_row(s, m, plane, y);
    T* sum = total + (plane * s.height + y) * s.width;
    T* out = grad + (plane * s.height + y) * s.width;
    for (int64_t x = 0; x < s.width; ++x) {
      sum[x] += out[x];
      out[x] *= 1 - mask[x];
    }
  });
}

template <class T>
void apply_mask_cpu(const BlurShape& s, const MaskParams<T>& m, T* field) {
  for_each_row(s.planes(), s.height, s.width, [&](int64_t plane, int64_t y) {
    const T* mask = mask_row(s, m, plane, y);
    T* out = field + (plane * s.height + y) * s.width;
    for (int64_t x = 0; x < s.width; ++x) out[x] *= mask[x];
  });
}

template <class T>
void accumulate_echo_cpu(const BlurShape& s, const SpectralGrid& g, const Complex<T>* a,
                         const Complex<T>* b, T* echo) {
  const int64_t columns = g.columns();
  for_each_row(s.planes(), g.n, columns, [&](int64_t plane, int64_t y) {
    const int64_t offset = (plane * g.n + y) * columns;
    for (int64_t x = 0; x < columns; ++x)
      echo[offset + x] += multiply_conj(a[offset + x], b[offset + x]).re;
  });
}

template <class T>
void wiener_gradients_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& w,
                          const WienerGradientParams<T>& p) {
  const int64_t columns = g.columns(), bins = g.bins(), step = w.ratio_stride_bin;
  const int64_t kernels = s.kernel_batch() * s.kernel_channels();
  const T pixels = static_cast<T>(g.n * g.m);
  // Rows of the spectrum are independent; the planes that share a kernel are summed in order.
  parallel_for(g.n, kGrain / std::max<int64_t>(columns * s.planes(), 1) + 1,
               [&](int64_t begin, int64_t end) {
                 std::vector<Complex<T>> sum(kernels * columns);
                 for (int64_t y = begin; y < end; ++y) {
                   std::fill(sum.begin(), sum.end(), Complex<T>{0, 0});
                   for (int64_t plane = 0; plane < s.planes(); ++plane) {
                     const int64_t offset = plane * bins + y * columns;
                     const Complex<T>* k = kernel_row(s, g, w, plane, y);
                     const T* ratio = ratio_row(s, g, w, plane, y);
                     Complex<T>* total = sum.data() + s.kernel_index(plane) * columns;
                     for (int64_t x = 0; x < columns; ++x) {
                       const int64_t i = offset + x;
                       const auto gain = multiply_conj(p.misfit[i], p.grad[i]);
                       const auto d =
                           wiener_gradient(k[x], gain, p.echo ? p.echo[i] : T(0), ratio[x * step]);
                       if (p.grad_ratio)
                         p.grad_ratio[i] = d.ratio * (spectrum_weight(x, g.m) / pixels);
                       total[x] =
                           add(total[x],
                               add(d.kernel, multiply_conj(p.image[i], p.grad_prediction[i])));
                     }
                   }
                   if (p.grad_kernel)
                     for (int64_t index = 0; index < kernels; ++index)
                       std::copy(sum.begin() + index * columns, sum.begin() + (index + 1) * columns,
                                 p.grad_kernel + index * bins + y * columns);
                 }
               });
}

template <class T>
void invert_weight_cpu(int64_t count, T least, T* weight) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) weight[i] = weight[i] > least ? 1 / weight[i] : T(0);
  });
}

template <class T>
void lucy_update_cpu(const BlurShape& s, const LucyUpdateParams<T>& p) {
  const int64_t h = s.height, w = s.width;
  for_each_row(s.planes(), h, w, [&](int64_t plane, int64_t y) {
    const int64_t offset = (plane * h + y) * w;
    const T* here = p.image + offset;
    const T* correction = p.correction + offset;
    const T* inverse = p.inverse + offset;
    T* out = p.output + offset;
    for (int64_t x = 0; x < w; ++x) {
      const T factor = std::max(correction[x], T(0)) * inverse[x];
      out[x] = here[x] * (inverse[x] == 0 ? T(1) : factor);
    }
    if (p.total_variation == 0) return;
    const T* north = y > 0 ? here - w : here;
    const T* south = y + 1 < h ? here + w : here;
    for (int64_t x = 0; x < w; ++x) {
      const int64_t west = x > 0 ? x - 1 : x, east = x + 1 < w ? x + 1 : x;
      const T bend = curvature(here[x], here[east], south[x], here[west], south[west], north[x],
                               north[east], p.floor);
      out[x] /= 1 - p.total_variation * bend;
    }
  });
}

#define LATENTDEM_INSTANTIATE(T)                                                                   \
  template void wiener_solve_cpu<T>(const BlurShape&, const SpectralGrid&, const WienerParams<T>&, \
                                    const Complex<T>*, int64_t, Complex<T>*);                      \
  template void wiener_filter_cpu<T>(const BlurShape&, const SpectralGrid&,                        \
                                     const WienerParams<T>&, WienerFilter, Complex<T>*);           \
  template void masked_misfit_cpu<T>(const BlurShape&, const MaskParams<T>&, const T*, int64_t,    \
                                     T*);                                                          \
  template void impute_cpu<T>(const BlurShape&, const MaskParams<T>&, const T*, T*);               \
  template void impute_transposed_cpu<T>(const BlurShape&, const MaskParams<T>&, T*, T*);          \
  template void apply_mask_cpu<T>(const BlurShape&, const MaskParams<T>&, T*);                     \
  template void accumulate_echo_cpu<T>(const BlurShape&, const SpectralGrid&, const Complex<T>*,   \
                                       const Complex<T>*, T*);                                     \
  template void wiener_gradients_cpu<T>(const BlurShape&, const SpectralGrid&,                     \
                                        const WienerParams<T>&, const WienerGradientParams<T>&);   \
  template void invert_weight_cpu<T>(int64_t, T, T*);                                              \
  template void lucy_update_cpu<T>(const BlurShape&, const LucyUpdateParams<T>&);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
