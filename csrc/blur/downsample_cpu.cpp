// CPU kernels of blur with downsampling. Rows are split into their `factor` phases (columns of
// equal remainder), along which the strided sums are contiguous and vectorise.
#include "blur/downsample.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace latentdem {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements worth a thread

// One row as [factor, length].
template <class T>
struct Phases {
  int64_t factor, length;
  std::vector<T> values;

  Phases(int64_t width, int64_t stride)
      : factor(stride), length((width + stride - 1) / stride), values(stride * length) {}

  T* from(int64_t column) { return values.data() + column % factor * length + column / factor; }

  void split(const T* row, int64_t width) {
    for (int64_t phase = 0; phase < factor; ++phase) {
      T* out = values.data() + phase * length;
      for (int64_t x = phase, i = 0; x < width; x += factor, ++i) out[i] = row[x];
    }
  }

  void join(T* row, int64_t width) const {
    for (int64_t phase = 0; phase < factor; ++phase) {
      const T* in = values.data() + phase * length;
      for (int64_t x = phase, i = 0; x < width; x += factor, ++i) row[x] = in[i];
    }
  }
};

}  // namespace

template <class T>
void convolve_strided_cpu(const DownsampleShape& s, const T* extended, const T* kernel, T* output) {
  const BlurShape& b = s.blur;
  const int64_t he = b.extended_height(), we = b.extended_width();
  const int64_t h = s.height(), w = s.width();
  const int64_t kh = b.kernel_height, kw = b.kernel_width;
  const int64_t work = std::max<int64_t>(w * kh * kw, 1);
  parallel_for(b.planes() * h, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    Phases<T> phases(we, s.factor);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / h, y = row % h * s.factor;
      const T* k = kernel + b.kernel_index(plane) * kh * kw;
      T* out = output + row * w;
      std::fill(out, out + w, T(0));
      for (int64_t i = 0; i < kh; ++i) {
        phases.split(extended + (plane * he + y + kh - 1 - i) * we, we);
        // Four taps at a time: the sums are loaded and stored a quarter as often.
        const T* tap = k + i * kw;
        int64_t j = 0;
        for (; j + 4 <= kw; j += 4) {
          const T t0 = tap[j], t1 = tap[j + 1], t2 = tap[j + 2], t3 = tap[j + 3];
          const T* in0 = phases.from(kw - 1 - j);
          const T* in1 = phases.from(kw - 2 - j);
          const T* in2 = phases.from(kw - 3 - j);
          const T* in3 = phases.from(kw - 4 - j);
          for (int64_t x = 0; x < w; ++x)
            out[x] += (t0 * in0[x] + t1 * in1[x]) + (t2 * in2[x] + t3 * in3[x]);
        }
        for (; j < kw; ++j) {
          const T* in = phases.from(kw - 1 - j);
          for (int64_t x = 0; x < w; ++x) out[x] += tap[j] * in[x];
        }
      }
    }
  });
}

template <class T>
void convolve_strided_adjoint_cpu(const DownsampleShape& s, const T* residual, const T* kernel,
                                  T* extended) {
  const BlurShape& b = s.blur;
  const int64_t he = b.extended_height(), we = b.extended_width();
  const int64_t h = s.height(), w = s.width();
  const int64_t kh = b.kernel_height, kw = b.kernel_width;
  const int64_t work = std::max<int64_t>(w * kh * kw / s.factor, 1);
  parallel_for(b.planes() * he, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    Phases<T> phases(we, s.factor);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / he, e = row % he;
      const T* k = kernel + b.kernel_index(plane) * kh * kw;
      std::fill(phases.values.begin(), phases.values.end(), T(0));
      // Output row y reads extended row y * factor + kh - 1 - i.
      const int64_t first = std::max<int64_t>(e - kh + 1 + s.factor - 1, 0) / s.factor;
      for (int64_t y = first; y < h && y * s.factor <= e; ++y) {
        const int64_t i = y * s.factor + kh - 1 - e;
        const T* in = residual + (plane * h + y) * w;
        for (int64_t j = 0; j < kw; ++j) {
          const T tap = k[i * kw + j];
          T* out = phases.from(kw - 1 - j);
          for (int64_t x = 0; x < w; ++x) out[x] += tap * in[x];
        }
      }
      phases.join(extended + row * we, we);
    }
  });
}

#define LATENTDEM_INSTANTIATE(T)                                                         \
  template void convolve_strided_cpu<T>(const DownsampleShape&, const T*, const T*, T*); \
  template void convolve_strided_adjoint_cpu<T>(const DownsampleShape&, const T*, const T*, T*);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
