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
  const int64_t before = s.keeps_size() ? extension_before(s.kernel_width) : 0;
  std::vector<int64_t> columns(s.extended_width());
  for (int64_t x = 0; x < s.extended_width(); ++x)
    columns[x] = source_index(x - before, s.width, s.boundary);
  return columns;
}

template <class T>
T* row_of(const Strided<T>& t, const BlurShape& s, int64_t plane, int64_t y) {
  return t.plane(plane / s.channels, plane % s.channels) + y * t.row;
}

// A row as contiguous memory: itself, or gathered into the buffer.
template <class T>
const T* gather_row(const T* row, int64_t stride, int64_t count, std::vector<T>& buffer) {
  if (stride == 1) return row;
  buffer.resize(count);
  for (int64_t x = 0; x < count; ++x) buffer[x] = row[x * stride];
  return buffer.data();
}

// Contiguous memory for a row that is about to be summed, and its way into the real one.
template <class T>
T* open_row(const Strided<T>& t, T* row, int64_t count, std::vector<T>& buffer) {
  if (t.column != 1) buffer.resize(count);
  T* out = t.column == 1 ? row : buffer.data();
  std::fill(out, out + count, T(0));
  return out;
}
template <class T>
void close_row(const Strided<T>& t, T* row, int64_t count, const std::vector<T>& buffer) {
  if (t.column == 1) return;
  for (int64_t x = 0; x < count; ++x) row[x * t.column] = buffer[x];
}

}  // namespace

template <class T>
void extend_cpu(const BlurShape& s, const Strided<const T>& image, T* extended) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t before = s.keeps_size() ? extension_before(s.kernel_width) : 0;
  const int64_t above = s.keeps_size() ? extension_before(s.kernel_height) : 0;
  const auto columns = source_columns(s);
  parallel_for(s.planes() * he, kGrain / std::max<int64_t>(we, 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t y = source_index(row % he - above, s.height, s.boundary);
                   T* out = extended + row * we;
                   if (y < 0) {
                     std::fill(out, out + we, T(0));
                     continue;
                   }
                   const T* in = row_of(image, s, row / he, y);
                   const int64_t step = image.column;
                   const auto border = [&](int64_t x) {
                     out[x] = columns[x] < 0 ? T(0) : in[columns[x] * step];
                   };
                   for (int64_t x = 0; x < before; ++x) border(x);
                   if (step == 1)
                     std::copy(in, in + s.width, out + before);
                   else
                     for (int64_t x = 0; x < s.width; ++x) out[before + x] = in[x * step];
                   for (int64_t x = before + s.width; x < we; ++x) border(x);
                 }
               });
}

template <class T>
void fold_cpu(const BlurShape& s, const T* extended, const Strided<T>& image) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t before = extension_before(s.kernel_width);
  const int64_t above = extension_before(s.kernel_height);
  const auto columns = source_columns(s);
  // Rows that an image row is the source of: its own, then the border's in their order.
  std::vector<std::vector<int64_t>> sources(s.height);
  for (int64_t y = 0; y < s.height; ++y) sources[y].push_back(above + y);
  for (int64_t row = 0; row < he; ++row) {
    const int64_t y = source_index(row - above, s.height, s.boundary);
    if (y >= 0 && row != above + y) sources[y].push_back(row);
  }
  for_each_row(s.planes(), s.height, we, [&](int64_t plane, int64_t y) {
    T* out = row_of(image, s, plane, y);
    const int64_t step = image.column;
    bool first = true;
    for (const int64_t row : sources[y]) {
      const T* in = extended + (plane * he + row) * we;
      if (step == 1 && first)
        std::copy(in + before, in + before + s.width, out);
      else if (step == 1)
        for (int64_t x = 0; x < s.width; ++x) out[x] += in[before + x];
      else
        for (int64_t x = 0; x < s.width; ++x)
          out[x * step] = (first ? T(0) : out[x * step]) + in[before + x];
      for (int64_t x = 0; x < before; ++x)
        if (columns[x] >= 0) out[columns[x] * step] += in[x];
      for (int64_t x = before + s.width; x < we; ++x)
        if (columns[x] >= 0) out[columns[x] * step] += in[x];
      first = false;
    }
  });
}

template <class T>
void convolve_cpu(const BlurShape& s, const Strided<const T>& extended, const T* kernel,
                  const Strided<T>& output) {
  const int64_t ho = s.output_height(), wo = s.output_width(), we = s.extended_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t work = std::max<int64_t>(wo * kh * kw, 1);
  parallel_for(s.planes() * ho, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    std::vector<T> gathered, sum;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / ho, y = row % ho;
      const T* k = kernel + s.kernel_index(plane) * kh * kw;
      T* target = row_of(output, s, plane, y);
      T* out = open_row(output, target, wo, sum);
      for (int64_t i = 0; i < kh; ++i) {
        const T* in =
            gather_row(row_of(extended, s, plane, y + kh - 1 - i), extended.column, we, gathered) +
            kw - 1;
        for (int64_t j = 0; j < kw; ++j) {
          const T tap = k[i * kw + j];
          for (int64_t x = 0; x < wo; ++x) out[x] += tap * in[x - j];
        }
      }
      close_row(output, target, wo, sum);
    }
  });
}

template <class T>
void convolve_adjoint_cpu(const BlurShape& s, const Strided<const T>& residual, const T* kernel,
                          const Strided<T>& extended) {
  const int64_t he = s.extended_height(), we = s.extended_width();
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t work = std::max<int64_t>(we * kh * kw, 1);
  parallel_for(s.planes() * he, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    std::vector<T> gathered, sum;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / he;
      const T* k = kernel + s.kernel_index(plane) * kh * kw;
      T* target = row_of(extended, s, plane, row % he);
      T* out = open_row(extended, target, we, sum);
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t y = row % he - (kh - 1) + i;
        if (y < 0 || y >= ho) continue;
        const T* in = gather_row(row_of(residual, s, plane, y), residual.column, wo, gathered);
        for (int64_t j = 0; j < kw; ++j) {
          const T tap = k[i * kw + j];
          T* shifted = out + kw - 1 - j;
          for (int64_t x = 0; x < wo; ++x) shifted[x] += tap * in[x];
        }
      }
      close_row(extended, target, we, sum);
    }
  });
}

template <class T>
void convolve_kernel_cpu(const BlurShape& s, const Strided<const T>& extended,
                         const Strided<const T>& residual, T* kernel) {
  const int64_t ho = s.output_height(), wo = s.output_width(), we = s.extended_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  const int64_t kernels = s.kernel_batch() * s.kernel_channels();
  parallel_for(kernels * kh, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> gathered_in, gathered_r;
    std::vector<double> total(kw);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / kh, i = item % kh;
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t shared = 0; shared < s.planes() / kernels; ++shared) {
        const int64_t plane = s.shared_plane(index, shared);
        for (int64_t y = 0; y < ho; ++y) {
          const T* in = gather_row(row_of(extended, s, plane, y + kh - 1 - i), extended.column, we,
                                   gathered_in) +
                        kw - 1;
          const T* r = gather_row(row_of(residual, s, plane, y), residual.column, wo, gathered_r);
          for (int64_t j = 0; j < kw; ++j) {
            T row = 0;
            for (int64_t x = 0; x < wo; ++x) row += in[x - j] * r[x];
            total[j] += row;
          }
        }
      }
      for (int64_t j = 0; j < kw; ++j) kernel[item * kw + j] = static_cast<T>(total[j]);
    }
  });
}

template <class T>
void residual_cpu(const BlurShape& s, const ResidualParams<T>& p) {
  const int64_t ho = s.output_height(), wo = s.output_width();
  std::vector<double> rows(s.planes() * ho);
  for_each_row(s.planes(), ho, wo, [&](int64_t plane, int64_t y) {
    const T* prediction = row_of(p.prediction, s, plane, y);
    const T* observation = row_of(p.observation, s, plane, y);
    T* residual = row_of(p.residual, s, plane, y);
    const int64_t step = p.prediction.column, step_o = p.observation.column,
                  step_r = p.residual.column;
    double total = 0;
    if (p.mask.data == nullptr) {
      for (int64_t x = 0; x < wo; ++x) {
        const T d = prediction[x * step] - observation[x * step_o];
        residual[x * step_r] = d;
        total += static_cast<double>(d) * d;
      }
    } else {
      const T* mask = row_of(p.mask, s, plane, y);
      for (int64_t x = 0; x < wo; ++x) {
        const T d = prediction[x * step] - observation[x * step_o];
        const T weighted = mask[x * p.mask.column] * d;
        residual[x * step_r] = weighted;
        total += static_cast<double>(weighted) * d;
      }
    }
    rows[plane * ho + y] = total;
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
  template void extend_cpu<T>(const BlurShape&, const Strided<const T>&, T*);                      \
  template void fold_cpu<T>(const BlurShape&, const T*, const Strided<T>&);                        \
  template void convolve_cpu<T>(const BlurShape&, const Strided<const T>&, const T*,               \
                                const Strided<T>&);                                                \
  template void convolve_adjoint_cpu<T>(const BlurShape&, const Strided<const T>&, const T*,       \
                                        const Strided<T>&);                                        \
  template void convolve_kernel_cpu<T>(const BlurShape&, const Strided<const T>&,                  \
                                       const Strided<const T>&, T*);                               \
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
