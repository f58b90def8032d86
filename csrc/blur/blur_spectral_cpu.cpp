// The spectral path on the CPU; compiled once per instruction set (see common/isa.h).
#include "blur/blur_spectral.h"
#include "common/fft.h"
#include "common/parallel.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

template <class T>
class Pipeline {
 public:
  explicit Pipeline(const SpectralBlur<T>& p)
      : p_(p), grid_(p.g.n, p.g.m), losses_(p.loss ? p.s.planes() * grid_.row_blocks() : 0) {}

  void run() {
    const int64_t kernels = p_.s.kernel_batch() * p_.s.kernel_channels();
    // Kernels side by side if there are enough of them; else the blocks of one plane.
    parallel_for(kernels, kernels < max_threads() ? kernels : 1, [&](int64_t begin, int64_t end) {
      const Spectra spectra(p_, grid_.spectrum_size());
      for (int64_t index = begin; index < end; ++index) run_kernel(index, spectra);
    });
    if (p_.loss == nullptr) return;
    const int64_t parts = p_.s.channels * grid_.row_blocks();
    for (int64_t b = 0; b < p_.s.batch; ++b) {
      double total = 0;
      for (int64_t i = 0; i < parts; ++i) total += losses_.get()[b * parts + i];
      p_.loss[b] = static_cast<T>(total / (2.0 * static_cast<double>(p_.g.n) * p_.g.m));
    }
  }

 private:
  using Spectrum = ComplexVec<T>*;

  struct Spectra {
    VectorBuffer<ComplexVec<T>> image, second, kernel, grad_kernel;
    Spectra(const SpectralBlur<T>& p, int64_t size)
        : image(p.image ? size : 0),
          second(p.second ? size : 0),
          kernel(p.kernel ? size : 0),
          grad_kernel(p.grad_kernel ? size : 0) {}
  };

  void run_kernel(int64_t index, const Spectra& spectra) {
    if (p_.kernel) transform_kernel(index, spectra.kernel.get());
    bool first = true;
    for (int64_t b = 0; b < p_.s.batch; ++b)
      for (int64_t c = 0; c < p_.s.channels; ++c) {
        const int64_t plane = b * p_.s.channels + c;
        if (p_.s.kernel_index(plane) != index) continue;
        run_plane(plane, first, spectra);
        first = false;
      }
    if (p_.grad_kernel) gather_kernel(index, spectra.grad_kernel.get());
  }

  void run_plane(int64_t plane, bool first, const Spectra& spectra) {
    const Spectrum x = spectra.image.get(), second = spectra.second.get();
    const Spectrum result = p_.image ? x : second;
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        if (p_.image)
          load_plane(p_.image + plane * p_.image_rows * p_.image_columns, p_.image_rows,
                     p_.image_columns, block, x, scratch);
        if (p_.second)
          load_plane(p_.second + plane * p_.second_rows * p_.second_columns, p_.second_rows,
                     p_.second_columns, block, second, scratch);
      }
    });
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      for (int64_t block = begin; block < end; ++block)
        combine(plane, block, first, spectra, result, scratch);
    });
    if (p_.output == nullptr) return;
    T* output = p_.output + plane * p_.output_rows * p_.output_columns;
    const T scale = T(1) / (static_cast<T>(p_.g.n) * static_cast<T>(p_.g.m));
    const int64_t blocks = (p_.output_columns + kLanes<T> - 1) / kLanes<T>;
    parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      const auto store = [&](int64_t y, int64_t column, int64_t count, Vec<T> values) {
        if (y >= p_.output_rows) return;
        values *= scale;
        T* row = output + y * p_.output_columns + column;
        if (count > p_.output_columns - column) count = p_.output_columns - column;
        if (count == kLanes<T>)
          std::memcpy(row, &values, sizeof(values));
        else
          for (int64_t i = 0; i < count; ++i) row[i] = values[i];
      };
      for (int64_t block = begin; block < end; ++block)
        inverse_columns(grid_, block, result, store, scratch.a.get(), scratch.b.get());
    });
  }

  struct Scratch {
    VectorBuffer<ComplexVec<T>> a, b;
    explicit Scratch(const RealGrid<T>& grid) : a(grid.scratch_size()), b(grid.scratch_size()) {}
  };

  void load_plane(const T* plane, int64_t rows, int64_t columns, int64_t block, Spectrum spectrum,
                  const Scratch& scratch) const {
    const int64_t available = columns - block * kLanes<T>;
    if (available <= 0) return forward_zero_columns(grid_, block, spectrum);
    const auto load = [&](int64_t y, int64_t x, int64_t count) {
      if (y >= rows) return Vec<T>{};
      return load_columns(plane + y * columns + x, count < available ? count : available);
    };
    forward_columns(grid_, block, load, spectrum, scratch.a.get(), scratch.b.get());
  }

  // Horizontal transforms of one block of rows, the arithmetic between, and the way back.
  void combine(int64_t plane, int64_t block, bool first, const Spectra& spectra, Spectrum result,
               const Scratch& scratch) {
    const int64_t m = p_.g.m;
    const ComplexVec<T>*x = nullptr, *second = nullptr;
    if (p_.image) x = fft<false>(grid_.rows, spectra.image.get() + block * m, scratch.a.get());
    if (p_.second)
      second = fft<false>(grid_.rows, spectra.second.get() + block * m, scratch.b.get());
    const ComplexVec<T>* k = p_.kernel ? spectra.kernel.get() + block * m : nullptr;
    ComplexVec<T>* grad = p_.grad_kernel ? spectra.grad_kernel.get() + block * m : nullptr;
    // So that the last pass of the inverse transform writes where the result belongs.
    ComplexVec<T>* const home = result + block * m;
    const bool even = grid_.rows.stage_count % 2 == 0;
    ComplexVec<T>* const spare = p_.image ? scratch.a.get() : scratch.b.get();
    ComplexVec<T>* const out = even ? home : spare;
    if (p_.predict) {
      for (int64_t i = 0; i < m; ++i) out[i] = k[i] * x[i];
    } else if (p_.second_is_observation) {
      Vec<T> weight;
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        const int64_t row = block * kLanes<T> + i;
        weight[i] = row == 0 || row == grid_.half() ? T(1) : T(2);
      }
      double total = 0;
      for (int64_t begin = 0; begin < m; begin += kChunk) {
        const int64_t end = begin + kChunk < m ? begin + kChunk : m;
        Vec<T> energy{};
        for (int64_t i = begin; i < end; ++i) {
          const ComplexVec<T> r = k[i] * x[i] - second[i];
          energy += r.re * r.re + r.im * r.im;
          const ComplexVec<T> g = conj_times(x[i], r);
          grad[i] = first ? g : grad[i] + g;
          out[i] = conj_times(k[i], r);
        }
        energy *= weight;
        for (int64_t i = 0; i < kLanes<T>; ++i) total += energy[i];
      }
      losses_.get()[plane * grid_.row_blocks() + block] = total;
    } else {
      for (int64_t i = 0; i < m; ++i) {
        const ComplexVec<T> r = second[i];
        if (grad) {
          const ComplexVec<T> g = conj_times(x[i], r);
          grad[i] = first ? g : grad[i] + g;
        }
        if (k) out[i] = conj_times(k[i], r);
      }
    }
    if (p_.output) fft<true>(grid_.rows, out, even ? spare : home);
  }

  bool holds_taps(int64_t block) const {
    for (int64_t i = 0; i < kLanes<T>; ++i)
      if ((block * kLanes<T> + i + p_.g.origin_x) % p_.g.m < p_.s.kernel_width) return true;
    return false;
  }

  void transform_kernel(int64_t index, Spectrum spectrum) const {
    const T* taps = p_.kernel + index * p_.s.kernel_height * p_.s.kernel_width;
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      const auto load = [&](int64_t y, int64_t x, int64_t count) {
        Vec<T> values{};
        const int64_t i = (y + p_.g.origin_y) % p_.g.n;
        if (i >= p_.s.kernel_height) return values;
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t j = (x + lane + p_.g.origin_x) % p_.g.m;
          if (j < p_.s.kernel_width) values[lane] = taps[i * p_.s.kernel_width + j];
        }
        return values;
      };
      for (int64_t block = begin; block < end; ++block) {
        if (holds_taps(block))
          forward_columns(grid_, block, load, spectrum, scratch.a.get(), scratch.b.get());
        else
          forward_zero_columns(grid_, block, spectrum);
      }
    });
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        ComplexVec<T>* const row = spectrum + block * p_.g.m;
        const ComplexVec<T>* done = fft<false>(grid_.rows, row, scratch.a.get());
        if (done != row) std::memcpy(row, done, p_.g.m * sizeof(ComplexVec<T>));
      }
    });
  }

  void gather_kernel(int64_t index, Spectrum spectrum) const {
    T* taps = p_.grad_kernel + index * p_.s.kernel_height * p_.s.kernel_width;
    const T scale = T(1) / (static_cast<T>(p_.g.n) * static_cast<T>(p_.g.m));
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        ComplexVec<T>* const row = spectrum + block * p_.g.m;
        const ComplexVec<T>* done = fft<true>(grid_.rows, row, scratch.a.get());
        if (done != row) std::memcpy(row, done, p_.g.m * sizeof(ComplexVec<T>));
      }
    });
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch scratch(grid_);
      const auto store = [&](int64_t y, int64_t x, int64_t count, Vec<T> values) {
        const int64_t i = (y + p_.g.origin_y) % p_.g.n;
        if (i >= p_.s.kernel_height) return;
        for (int64_t lane = 0; lane < count; ++lane) {
          const int64_t j = (x + lane + p_.g.origin_x) % p_.g.m;
          if (j < p_.s.kernel_width) taps[i * p_.s.kernel_width + j] = values[lane] * scale;
        }
      };
      for (int64_t block = begin; block < end; ++block)
        if (holds_taps(block))
          inverse_columns(grid_, block, spectrum, store, scratch.a.get(), scratch.b.get());
    });
  }

  static constexpr int64_t kChunk = 32;  // terms that are summed in T before double takes over
  static constexpr int64_t kGrain = 4;   // blocks worth a thread

  const SpectralBlur<T>& p_;
  const RealGrid<T> grid_;
  VectorBuffer<double> losses_;
};

}  // namespace

template <class T>
void spectral_blur_cpu(const SpectralBlur<T>& p) {
  Pipeline<T>(p).run();
}

template void spectral_blur_cpu<float>(const SpectralBlur<float>&);
template void spectral_blur_cpu<double>(const SpectralBlur<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
