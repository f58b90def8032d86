// CPU kernels of the blur operators. Inner loops run along contiguous rows so that the
// compiler vectorises them; every sum has a fixed order, so results are reproducible.
#include <algorithm>
#include <vector>

#include "blur/blur.h"
#include "common/parallel.h"

namespace latentdem {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

int64_t wrap(int64_t i, int64_t n) { return i < 0 ? i + n : i; }

// The columns of one extended row, as source columns of the image.
std::vector<int64_t> source_columns(const BlurShape& s) {
  std::vector<int64_t> columns(s.extended_width());
  for (int64_t x = 0; x < s.extended_width(); ++x)
    columns[x] = source_index(x - extension_before(s.kernel_width), s.width, s.boundary);
  return columns;
}

// Calls body(plane) for the planes of the image that share one kernel.
template <class Body>
void for_each_shared_plane(const BlurShape& s, int64_t kernel, const Body& body) {
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c)
      if (s.kernel_index(b * s.channels + c) == kernel) body(b * s.channels + c);
}

}  // namespace

template <class T>
void extend_cpu(const BlurShape& s, const T* image, T* extended) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t before = extension_before(s.kernel_width);
  const auto columns = source_columns(s);
  parallel_for(
      s.planes() * he, kGrain / std::max<int64_t>(we, 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t plane = row / he;
          const int64_t y =
              source_index(row % he - extension_before(s.kernel_height), s.height, s.boundary);
          T* out = extended + row * we;
          if (y < 0) {
            std::fill(out, out + we, T(0));
            continue;
          }
          const T* in = image + (plane * s.height + y) * s.width;
          for (int64_t x = 0; x < before; ++x) out[x] = columns[x] < 0 ? T(0) : in[columns[x]];
          std::copy(in, in + s.width, out + before);
          for (int64_t x = before + s.width; x < we; ++x)
            out[x] = columns[x] < 0 ? T(0) : in[columns[x]];
        }
      });
}

template <class T>
void fold_cpu(const BlurShape& s, const T* extended, T* image) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t before = extension_before(s.kernel_width);
  const auto columns = source_columns(s);
  parallel_for(s.planes(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      T* out_plane = image + plane * s.height * s.width;
      std::fill(out_plane, out_plane + s.height * s.width, T(0));
      for (int64_t row = 0; row < he; ++row) {
        const int64_t y =
            source_index(row - extension_before(s.kernel_height), s.height, s.boundary);
        if (y < 0) continue;
        const T* in = extended + (plane * he + row) * we;
        T* out = out_plane + y * s.width;
        for (int64_t x = 0; x < s.width; ++x) out[x] += in[before + x];
        for (int64_t x = 0; x < before; ++x)
          if (columns[x] >= 0) out[columns[x]] += in[x];
        for (int64_t x = before + s.width; x < we; ++x)
          if (columns[x] >= 0) out[columns[x]] += in[x];
      }
    }
  });
}

template <class T>
void convolve_cpu(const BlurShape& s, const T* extended, const T* kernel, T* output) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t work = std::max<int64_t>(wo * kh * kw, 1);
  parallel_for(s.planes() * ho, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / ho, y = row % ho;
      const T* k = kernel + s.kernel_index(plane) * kh * kw;
      T* out = output + row * wo;
      std::fill(out, out + wo, T(0));
      for (int64_t i = 0; i < kh; ++i) {
        const T* in = extended + (plane * he + y + kh - 1 - i) * we + kw - 1;
        for (int64_t j = 0; j < kw; ++j) {
          const T tap = k[i * kw + j];
          for (int64_t x = 0; x < wo; ++x) out[x] += tap * in[x - j];
        }
      }
    }
  });
}

template <class T>
void convolve_adjoint_cpu(const BlurShape& s, const T* residual, const T* kernel, T* extended) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t work = std::max<int64_t>(we * kh * kw, 1);
  parallel_for(s.planes() * he, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / he;
      const T* k = kernel + s.kernel_index(plane) * kh * kw;
      T* out = extended + row * we;
      std::fill(out, out + we, T(0));
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t y = row % he - (kh - 1) + i;
        if (y < 0 || y >= ho) continue;
        const T* in = residual + (plane * ho + y) * wo;
        for (int64_t j = 0; j < kw; ++j) {
          const T tap = k[i * kw + j];
          T* shifted = out + kw - 1 - j;
          for (int64_t x = 0; x < wo; ++x) shifted[x] += tap * in[x];
        }
      }
    }
  });
}

template <class T>
void convolve_kernel_cpu(const BlurShape& s, const T* extended, const T* residual, T* kernel) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t kernels = s.kernel_batch() * s.kernel_channels();
  parallel_for(kernels * kh, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / kh, i = item % kh;
      for (int64_t j = 0; j < kw; ++j) {
        double total = 0;
        for_each_shared_plane(s, index, [&](int64_t plane) {
          for (int64_t y = 0; y < ho; ++y) {
            const T* in = extended + (plane * he + y + kh - 1 - i) * we + kw - 1 - j;
            const T* r = residual + (plane * ho + y) * wo;
            T row = 0;
            for (int64_t x = 0; x < wo; ++x) row += in[x] * r[x];
            total += row;
          }
        });
        kernel[item * kw + j] = static_cast<T>(total);
      }
    }
  });
}

template <class T>
void residual_cpu(const BlurShape& s, const ResidualParams<T>& p) {
  const int64_t ho = s.output_height(), wo = s.output_width();
  std::vector<double> rows(s.planes() * ho);
  parallel_for(
      s.planes() * ho, kGrain / std::max<int64_t>(wo, 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t plane = row / ho, y = row % ho;
          const T* prediction = p.prediction + plane * p.plane + y * p.pitch;
          const T* observation = p.observation + row * wo;
          T* residual = p.residual + row * wo;
          double total = 0;
          if (p.mask == nullptr) {
            for (int64_t x = 0; x < wo; ++x) {
              const T d = prediction[x] - observation[x];
              residual[x] = d;
              total += static_cast<double>(d) * d;
            }
          } else {
            const int64_t mask_plane =
                plane / s.channels * p.mask_stride_b + plane % s.channels * p.mask_stride_c;
            const T* mask = p.mask + (mask_plane * ho + y) * wo;
            for (int64_t x = 0; x < wo; ++x) {
              const T d = prediction[x] - observation[x];
              residual[x] = mask[x] * d;
              total += static_cast<double>(residual[x]) * d;
            }
          }
          rows[row] = total;
        }
      });
  for (int64_t b = 0; b < s.batch; ++b) {
    double total = 0;
    for (int64_t r = 0; r < s.channels * ho; ++r) total += rows[b * s.channels * ho + r];
    p.loss[b] = static_cast<T>(0.5 * total);
  }
}

template <class T>
void embed_kernel_cpu(const BlurShape& s, const SpectralGrid& g, int64_t count, const T* kernel,
                      T* grid) {
  std::fill(grid, grid + count * g.n * g.m, T(0));
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < s.kernel_height; ++i)
      for (int64_t j = 0; j < s.kernel_width; ++j)
        grid[(p * g.n + wrap(i - g.origin_y, g.n)) * g.m + wrap(j - g.origin_x, g.m)] =
            kernel[(p * s.kernel_height + i) * s.kernel_width + j];
}

template <class T>
void gather_kernel_cpu(const BlurShape& s, const SpectralGrid& g, int64_t count, const T* grid,
                       T* kernel) {
  for (int64_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < s.kernel_height; ++i)
      for (int64_t j = 0; j < s.kernel_width; ++j)
        kernel[(p * s.kernel_height + i) * s.kernel_width + j] =
            grid[(p * g.n + wrap(i - g.origin_y, g.n)) * g.m + wrap(j - g.origin_x, g.m)];
}

template <class T>
void spectrum_multiply_cpu(const BlurShape& s, const SpectralGrid& g, const Complex<T>* kernel,
                           bool conjugate, Complex<T>* spectrum) {
  const int64_t columns = g.columns();
  parallel_for(s.planes() * g.n, kGrain / columns + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Complex<T>* k = kernel + (s.kernel_index(row / g.n) * g.n + row % g.n) * columns;
      Complex<T>* out = spectrum + row * columns;
      if (conjugate) {
        for (int64_t x = 0; x < columns; ++x) out[x] = multiply_conj(k[x], out[x]);
      } else {
        for (int64_t x = 0; x < columns; ++x) out[x] = multiply(k[x], out[x]);
      }
    }
  });
}

#define LATENTDEM_INSTANTIATE(T)                                                                   \
  template void extend_cpu<T>(const BlurShape&, const T*, T*);                                     \
  template void fold_cpu<T>(const BlurShape&, const T*, T*);                                       \
  template void convolve_cpu<T>(const BlurShape&, const T*, const T*, T*);                         \
  template void convolve_adjoint_cpu<T>(const BlurShape&, const T*, const T*, T*);                 \
  template void convolve_kernel_cpu<T>(const BlurShape&, const T*, const T*, T*);                  \
  template void residual_cpu<T>(const BlurShape&, const ResidualParams<T>&);                       \
  template void embed_kernel_cpu<T>(const BlurShape&, const SpectralGrid&, int64_t, const T*, T*); \
  template void gather_kernel_cpu<T>(const BlurShape&, const SpectralGrid&, int64_t, const T*,     \
                                     T*);                                                          \
  template void spectrum_multiply_cpu<T>(const BlurShape&, const SpectralGrid&, const Complex<T>*, \
                                         bool, Complex<T>*);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
