// CPU kernels of the MAP estimate. Everything of image size runs in parallel; what has kernel
// size is small and stays on one thread, so that results never depend on the thread count.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/wrap.h"
#include "kernel_map/kernel_map.h"

namespace latentdem {
namespace {

constexpr int64_t kGrain = 1 << 14;

}  // namespace

template <class T>
void make_fields_cpu(const FieldShape& s, const Strided<const T>& image, const T* window,
                     T* fields) {
  const int64_t step = image.column;
  const int64_t h = s.height, w = s.width, per_image = s.fields();
  parallel_for(s.batch * per_image * h, kGrain / w + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / h, y = row % h;
      const int64_t b = plane / per_image, f = plane % per_image;
      const int64_t channel = f % s.channels;
      const bool vertical = f < s.channels;
      const T* here = image.plane(b, channel) + y * image.row;
      T* out = fields + row * w;
      if (!s.gradient) {
        for (int64_t x = 0; x < w; ++x) out[x] = here[x * step];
      } else if (vertical) {
        const T* below = image.plane(b, channel) + (y + 1) % h * image.row;
        for (int64_t x = 0; x < w; ++x) out[x] = below[x * step] - here[x * step];
      } else {
        for (int64_t x = 0; x + 1 < w; ++x) out[x] = here[(x + 1) * step] - here[x * step];
        out[w - 1] = here[0] - here[(w - 1) * step];
      }
      if (window != nullptr) {
        const T* weight = window + (b * s.window_stride_b * h + y) * w;
        for (int64_t x = 0; x < w; ++x) out[x] *= weight[x];
      }
    }
  });
}

template <class T>
void pool_spectra_cpu(int64_t batch, int64_t fields, int64_t bins, const Complex<T>* image,
                      const Complex<T>* observation, Complex<T>* power, Complex<T>* cross) {
  parallel_for(batch * bins, kGrain / fields + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i / bins * fields * bins + i % bins;
      Complex<T> p{0, 0}, c{0, 0};
      for (int64_t f = 0; f < fields; ++f) {
        const Complex<T> x = image[start + f * bins];
        const Complex<T> xy = multiply_conj(x, observation[start + f * bins]);
        p.re += squared_norm(x);
        c.re += xy.re;
        c.im += xy.im;
      }
      power[i] = p;
      cross[i] = c;
    }
  });
}

template <class T>
void full_grid_step_cpu(const FullGridStep<T>& p) {
  const int64_t columns = p.m / 2 + 1;
  const double step_y = 2 * M_PI / static_cast<double>(p.n);
  const double step_x = 2 * M_PI / static_cast<double>(p.m);
  parallel_for(p.batch * p.n, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double noise = p.noise[row / p.n];
      const double gy = 2 - 2 * std::cos(step_y * static_cast<double>(row % p.n));
      for (int64_t x = 0; x < columns; ++x) {
        const int64_t i = row * columns + x;
        const double filter =
            p.gradient ? gy + 2 - 2 * std::cos(step_x * static_cast<double>(x)) : 1;
        const T alpha = static_cast<T>(p.alpha);
        const T scale = 1 / (p.power[i].re + static_cast<T>(noise * filter) + alpha);
        p.z[i].re = (p.cross[i].re + alpha * p.z[i].re) * scale;
        p.z[i].im = (p.cross[i].im + alpha * p.z[i].im) * scale;
      }
    }
  });
}

template <class T>
void gather_wrapped_cpu(int64_t planes, int64_t n, int64_t m, int64_t rows, int64_t cols,
                        int64_t oy, int64_t ox, const T* in, T* out) {
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = in + (p * n + wrap_index(i - oy, n)) * m;
      for (int64_t j = 0; j < cols; ++j)
        out[(p * rows + i) * cols + j] = row[wrap_index(j - ox, m)];
    }
}

template <class T>
void scatter_wrapped_cpu(int64_t planes, int64_t n, int64_t m, int64_t rows, int64_t cols,
                         int64_t oy, int64_t ox, const T* in, T* out) {
  std::fill(out, out + planes * n * m, T(0));
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < rows; ++i) {
      T* row = out + (p * n + wrap_index(i - oy, n)) * m;
      for (int64_t j = 0; j < cols; ++j)
        row[wrap_index(j - ox, m)] += in[(p * rows + i) * cols + j];
    }
}

template <class T>
void cg_start_cpu(const ConjugateGradient<T>& cg, double alpha, const T* rhs, const T* target,
                  const T* product) {
  const T a = static_cast<T>(alpha);
  for (int64_t b = 0; b < cg.batch; ++b) {
    double energy = 0;
    for (int64_t i = b * cg.size; i < (b + 1) * cg.size; ++i) {
      cg.residual[i] = rhs[i] - product[i] + a * (target[i] - cg.solution[i]);
      cg.direction[i] = cg.residual[i];
      energy += static_cast<double>(cg.residual[i]) * cg.residual[i];
    }
    cg.energy[b] = energy;
  }
}

template <class T>
void cg_step_cpu(const ConjugateGradient<T>& cg, double alpha, const T* product) {
  const T a = static_cast<T>(alpha);
  for (int64_t b = 0; b < cg.batch; ++b) {
    const int64_t begin = b * cg.size, end = begin + cg.size;
    double curvature = 0;
    for (int64_t i = begin; i < end; ++i)
      curvature += static_cast<double>(cg.direction[i]) * (product[i] + a * cg.direction[i]);
    // The last solution would be a finite wrong answer to a system that is not finite.
    if (!std::isfinite(curvature) || !std::isfinite(cg.energy[b])) {
      std::fill(cg.solution + begin, cg.solution + end, std::numeric_limits<T>::quiet_NaN());
      continue;
    }
    // Converged, or rounding has eaten the curvature: any further step would only add noise.
    if (!(curvature > 0) || !(cg.energy[b] > 0)) continue;
    const T step = static_cast<T>(cg.energy[b] / curvature);
    double energy = 0;
    for (int64_t i = begin; i < end; ++i) {
      cg.solution[i] += step * cg.direction[i];
      cg.residual[i] -= step * (product[i] + a * cg.direction[i]);
      energy += static_cast<double>(cg.residual[i]) * cg.residual[i];
    }
    const T ratio = static_cast<T>(energy / cg.energy[b]);
    for (int64_t i = begin; i < end; ++i)
      cg.direction[i] = cg.residual[i] + ratio * cg.direction[i];
    cg.energy[b] = energy;
  }
}

template <class T>
void clamp_normalize_cpu(int64_t planes, int64_t size, const T* fallback, T* kernel) {
  for (int64_t p = 0; p < planes; ++p) {
    T* k = kernel + p * size;
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      k[i] = k[i] < 0 ? T(0) : k[i];  // keeps NaN
      sum += k[i];
    }
    if (sum == 0) {
      std::copy(fallback + p * size, fallback + (p + 1) * size, k);
    } else {
      const T scale = static_cast<T>(1 / sum);
      for (int64_t i = 0; i < size; ++i) k[i] *= scale;
    }
  }
}

template <class T>
void apply_prior_cpu(int64_t planes, int64_t size, KernelPrior prior, double regularization,
                     double penalty, T* kernel) {
  std::vector<T> before(kernel, kernel + planes * size);
  for (int64_t i = 0; i < planes * size; ++i)
    kernel[i] =
        prior_step(kernel[i], prior, static_cast<T>(regularization), static_cast<T>(penalty));
  clamp_normalize_cpu(planes, size, before.data(), kernel);
}

template <class T>
void project_simplex_cpu(int64_t planes, int64_t size, const T* in, T* out) {
  parallel_for(planes, kGrain / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sorted(size);
    for (int64_t p = begin; p < end; ++p) {
      std::copy(in + p * size, in + (p + 1) * size, sorted.begin());
      // NaN has no place in an order, and std::sort may run out of bounds looking for it.
      if (!std::all_of(sorted.begin(), sorted.end(), [](double v) { return std::isfinite(v); })) {
        std::fill(out + p * size, out + (p + 1) * size, std::numeric_limits<T>::quiet_NaN());
        continue;
      }
      std::sort(sorted.begin(), sorted.end(), std::greater<double>());
      // The projection does not see a constant; without it, large values keep their digits.
      const double top = sorted[0];
      double sum = 0, shift = 0;
      for (int64_t i = 0; i < size; ++i) {
        sum += sorted[i] - top;
        const double candidate = (sum - 1) / static_cast<double>(i + 1);
        if (sorted[i] - top > candidate) shift = candidate;
      }
      for (int64_t i = 0; i < size; ++i) {
        const double v = static_cast<double>(in[p * size + i]) - top - shift;
        out[p * size + i] = static_cast<T>(v > 0 ? v : 0);
      }
    }
  });
}

template <class T>
void recenter_kernel_cpu(int64_t planes, int64_t kh, int64_t kw, bool subpixel, const T* in,
                         T* out) {
  for (int64_t p = 0; p < planes; ++p) {
    const T* k = in + p * kh * kw;
    T* o = out + p * kh * kw;
    double sum = 0, sum_y = 0, sum_x = 0;
    for (int64_t i = 0; i < kh; ++i)
      for (int64_t j = 0; j < kw; ++j) {
        sum += k[i * kw + j];
        sum_y += static_cast<double>(k[i * kw + j]) * i;
        sum_x += static_cast<double>(k[i * kw + j]) * j;
      }
    std::copy(k, k + kh * kw, o);
    if (!(std::abs(sum) > 0)) continue;
    double dy = static_cast<double>(kh / 2) - sum_y / sum;
    double dx = static_cast<double>(kw / 2) - sum_x / sum;
    if (!(std::abs(dy) <= kh && std::abs(dx) <= kw)) continue;  // not a kernel, or not finite
    if (!subpixel) {
      dy = std::round(dy);
      dx = std::round(dx);
    }
    const auto fy = static_cast<int64_t>(std::floor(dy));
    const auto fx = static_cast<int64_t>(std::floor(dx));
    const double ty = dy - fy, tx = dx - fx;
    const auto at = [&](int64_t i, int64_t j) {
      return i >= 0 && i < kh && j >= 0 && j < kw ? static_cast<double>(k[i * kw + j]) : 0.0;
    };
    double moved = 0;
    std::vector<double> shifted(kh * kw);
    for (int64_t i = 0; i < kh; ++i)
      for (int64_t j = 0; j < kw; ++j) {
        const int64_t y = i - fy, x = j - fx;
        const double v = (1 - ty) * ((1 - tx) * at(y, x) + tx * at(y, x - 1)) +
                         ty * ((1 - tx) * at(y - 1, x) + tx * at(y - 1, x - 1));
        shifted[i * kw + j] = v;
        moved += v;
      }
    if (!(std::abs(moved) > 0)) continue;
    for (int64_t i = 0; i < kh * kw; ++i) o[i] = static_cast<T>(shifted[i] * (sum / moved));
  }
}

#define LATENTDEM_INSTANTIATE(T)                                                              \
  template void make_fields_cpu<T>(const FieldShape&, const Strided<const T>&, const T*, T*); \
  template void pool_spectra_cpu<T>(int64_t, int64_t, int64_t, const Complex<T>*,             \
                                    const Complex<T>*, Complex<T>*, Complex<T>*);             \
  template void full_grid_step_cpu<T>(const FullGridStep<T>&);                                \
  template void gather_wrapped_cpu<T>(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,   \
                                      int64_t, const T*, T*);                                 \
  template void scatter_wrapped_cpu<T>(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,  \
                                       int64_t, const T*, T*);                                \
  template void cg_start_cpu<T>(const ConjugateGradient<T>&, double, const T*, const T*,      \
                                const T*);                                                    \
  template void cg_step_cpu<T>(const ConjugateGradient<T>&, double, const T*);                \
  template void clamp_normalize_cpu<T>(int64_t, int64_t, const T*, T*);                       \
  template void apply_prior_cpu<T>(int64_t, int64_t, KernelPrior, double, double, T*);        \
  template void project_simplex_cpu<T>(int64_t, int64_t, const T*, T*);                       \
  template void recenter_kernel_cpu<T>(int64_t, int64_t, int64_t, bool, const T*, T*);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
