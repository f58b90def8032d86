// The spectral parts on the CPU; compiled once per instruction set (see common/isa.h).
#include "common/fft.h"
#include "common/parallel.h"
#include "common/wrap.h"
#include "kernel_map/kernel_map_spectral.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

constexpr int64_t kGrain = 4;  // blocks worth a thread

// Whether a block of columns holds any of those that an array of `columns` starting at
// column -origin of the grid, wrapped round, covers.
template <class T>
bool covers(const RealGrid<T>& grid, int64_t block, int64_t columns, int64_t origin) {
  for (int64_t i = 0; i < kLanes<T>; ++i)
    if (wrap_index(block * kLanes<T> + i + origin, grid.m) < columns) return true;
  return false;
}

// Vertical half of the transform of one block of columns of a plane [height,width].
template <class T>
void transform_columns(const RealGrid<T>& grid, const T* plane, int64_t height, int64_t width,
                       int64_t block, ComplexVec<T>* spectrum, const Scratch<T>& scratch) {
  const int64_t available = width - block * kLanes<T>;
  if (available <= 0) return forward_zero_columns(grid, block, spectrum);
  const auto load = [&](int64_t y, int64_t x, int64_t count) {
    if (y >= height) return Vec<T>{};
    return load_columns(plane + y * width + x, count < available ? count : available);
  };
  forward_columns(grid, block, load, spectrum, scratch.a.get(), scratch.b.get());
}

template <class T>
class Correlator {
 public:
  explicit Correlator(const CorrelationParams<T>& p) : p_(p), grid_(p.n, p.m) {}

  void run() {
    parallel_for(p_.batch, p_.batch < max_threads() ? p_.batch : 1,
                 [&](int64_t begin, int64_t end) {
                   const int64_t size = grid_.spectrum_size();
                   const VectorBuffer<ComplexVec<T>> x(size), y(p_.spectra ? 0 : size), cross(size);
                   const VectorBuffer<Vec<T>> power(size);
                   for (int64_t b = begin; b < end; ++b) {
                     for (int64_t f = 0; f < p_.fields; ++f)
                       accumulate(b, f, x.get(), y.get(), power.get(), cross.get());
                     finish(b, x.get(), power.get(), cross.get());
                   }
                 });
  }

 private:
  using Spectrum = ComplexVec<T>*;

  void accumulate(int64_t b, int64_t f, Spectrum x, Spectrum y, Vec<T>* power, Spectrum cross) {
    const int64_t plane = b * p_.fields + f, offset = plane * p_.height * p_.width;
    const auto* prepared = reinterpret_cast<const ComplexVec<T>*>(
        p_.spectra ? p_.spectra + plane * spectrum_values<T>(p_.n, p_.m) : nullptr);
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        transform_columns(grid_, p_.image + offset, p_.height, p_.width, block, x, scratch);
        if (!p_.spectra)
          transform_columns(grid_, p_.observation + offset, p_.height, p_.width, block, y, scratch);
      }
    });
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * p_.m;
        const ComplexVec<T>* u = fft<false>(grid_.rows, x + start, scratch.a.get());
        const ComplexVec<T>* v =
            p_.spectra ? prepared + start : fft<false>(grid_.rows, y + start, scratch.b.get());
        for (int64_t i = 0; i < p_.m; ++i) {
          const Vec<T> energy = u[i].re * u[i].re + u[i].im * u[i].im;
          const ComplexVec<T> product = conj_times(u[i], v[i]);
          power[start + i] = f == 0 ? energy : power[start + i] + energy;
          cross[start + i] = f == 0 ? product : cross[start + i] + product;
        }
      }
    });
  }

  void finish(int64_t b, Spectrum work, const Vec<T>* power, Spectrum cross) {
    const int64_t kh = p_.kernel_height, kw = p_.kernel_width;
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * p_.m; i < end * p_.m; ++i) work[i] = {power[i], Vec<T>{}};
    });
    gather(work, 2 * kh - 1, 2 * kw - 1, kh - 1, kw - 1,
           p_.autocorrelation + b * (2 * kh - 1) * (2 * kw - 1));
    gather(cross, kh, kw, kh / 2, kw / 2, p_.crosscorrelation + b * kh * kw);
  }

  // Inverse transform of `spectrum`, of which `out` is the part around lag zero.
  void gather(Spectrum spectrum, int64_t rows, int64_t columns, int64_t origin_y, int64_t origin_x,
              T* out) {
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      for (int64_t block = begin; block < end; ++block) {
        ComplexVec<T>* const row = spectrum + block * p_.m;
        const ComplexVec<T>* done = fft<true>(grid_.rows, row, scratch.a.get());
        if (done != row) std::memcpy(row, done, p_.m * sizeof(ComplexVec<T>));
      }
    });
    const T scale = T(1) / (static_cast<T>(p_.n) * static_cast<T>(p_.m));
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      const auto store = [&](int64_t y, int64_t x, int64_t count, Vec<T> values) {
        // A lag that a small grid wraps onto another is that other one.
        for (int64_t i = wrap_index(y + origin_y, p_.n); i < rows; i += p_.n)
          for (int64_t lane = 0; lane < count; ++lane)
            for (int64_t j = wrap_index(x + lane + origin_x, p_.m); j < columns; j += p_.m)
              out[i * columns + j] = values[lane] * scale;
      };
      for (int64_t block = begin; block < end; ++block)
        if (covers(grid_, block, columns, origin_x))
          inverse_columns(grid_, block, spectrum, store, scratch.a.get(), scratch.b.get());
    });
  }

  const CorrelationParams<T>& p_;
  const RealGrid<T> grid_;
};

// Conjugate gradients with products of the Toeplitz matrix of the lags by transforms. A vector
// of kernel size fills a quarter of their grid, and the rest is never transformed or stored.
template <class T>
class SupportSolver {
 public:
  explicit SupportSolver(const SupportLoopParams<T>& p)
      : p_(p),
        size_(p.kernel_height * p.kernel_width),
        grid_(p.n, p.m, p.kernel_width),
        symbol_(grid_.row_blocks() * p.m),
        spectrum_(grid_.spectrum_size()),
        product_(size_),
        residual_(size_),
        direction_(size_) {}

  void run(int64_t b) {
    const int64_t kh = p_.kernel_height, kw = p_.kernel_width;
    make_symbol(p_.autocorrelation + b * (2 * kh - 1) * (2 * kw - 1));
    const T* rhs = p_.rhs + b * size_;
    T* split = p_.split + b * size_;
    T* solution = p_.solution + b * size_;
    for (int64_t i = 0; i < p_.iterations; ++i) {
      solve(rhs, split, solution);
      if (!p_.project) continue;
      clamp_normalize_cpu<T>(1, size_, split, solution);
      std::memcpy(split, solution, size_ * sizeof(T));
      apply_prior_cpu<T>(1, size_, p_.prior, p_.regularization, p_.penalty, split);
    }
  }

 private:
  void make_symbol(const T* lags) {
    const int64_t rows = 2 * p_.kernel_height - 1, columns = 2 * p_.kernel_width - 1;
    const RealGrid<T> whole(p_.n, p_.m);
    const VectorBuffer<ComplexVec<T>> spectrum(whole.spectrum_size());
    const Scratch<T> scratch(whole);
    const auto load = [&](int64_t y, int64_t x, int64_t count) {
      Vec<T> values{};
      const int64_t i = wrap_index(y + p_.kernel_height - 1, p_.n);
      if (i >= rows) return values;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t j = wrap_index(x + lane + p_.kernel_width - 1, p_.m);
        if (j < columns) values[lane] = lags[i * columns + j];
      }
      return values;
    };
    for (int64_t block = 0; block < whole.column_blocks(); ++block)
      forward_columns(whole, block, load, spectrum.get(), scratch.a.get(), scratch.b.get());
    // Symmetric lags have a real spectrum; the transforms' scale goes into it.
    const T scale = T(1) / (static_cast<T>(p_.n) * static_cast<T>(p_.m));
    for (int64_t block = 0; block < whole.row_blocks(); ++block) {
      const ComplexVec<T>* row =
          fft<false>(whole.rows, spectrum.get() + block * p_.m, scratch.a.get());
      for (int64_t i = 0; i < p_.m; ++i) symbol_.get()[block * p_.m + i] = row[i].re * scale;
    }
  }

  void multiply(const T* in) {
    const int64_t kh = p_.kernel_height, kw = p_.kernel_width;
    ComplexVec<T>* const spectrum = spectrum_.get();
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      const auto load = [&](int64_t y, int64_t x, int64_t count) {
        return y < kh ? load_columns(in + y * kw + x, count) : Vec<T>{};
      };
      for (int64_t block = begin; block < end; ++block)
        forward_columns(grid_, block, load, spectrum, scratch.a.get(), scratch.b.get());
    });
    parallel_for(grid_.row_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      ComplexVec<T>* const a = scratch.a.get();
      ComplexVec<T>* const b = scratch.b.get();
      for (int64_t block = begin; block < end; ++block) {
        ComplexVec<T>* const row = spectrum + block * kw;
        const Vec<T>* symbol = symbol_.get() + block * p_.m;
        std::memcpy(a, row, kw * sizeof(ComplexVec<T>));
        for (int64_t i = kw; i < p_.m; ++i) a[i] = ComplexVec<T>{};
        ComplexVec<T>* done = fft<false>(grid_.rows, a, b);
        for (int64_t i = 0; i < p_.m; ++i)
          done[i] = {done[i].re * symbol[i], done[i].im * symbol[i]};
        const ComplexVec<T>* back = fft<true>(grid_.rows, done, done == a ? b : a);
        std::memcpy(row, back, kw * sizeof(ComplexVec<T>));
      }
    });
    T* const product = product_.get();
    parallel_for(grid_.column_blocks(), kGrain, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(grid_);
      const auto store = [&](int64_t y, int64_t x, int64_t count, Vec<T> values) {
        if (y >= kh) return;
        for (int64_t lane = 0; lane < count; ++lane) product[y * kw + x + lane] = values[lane];
      };
      for (int64_t block = begin; block < end; ++block)
        inverse_columns(grid_, block, spectrum, store, scratch.a.get(), scratch.b.get());
    });
  }

  void solve(const T* rhs, const T* target, T* solution) {
    double energy = 0;
    const ConjugateGradient<T> cg{1, size_, solution, residual_.get(), direction_.get(), &energy};
    multiply(solution);
    cg_start_cpu<T>(cg, p_.alpha, rhs, target, product_.get());
    for (int64_t i = 0; i < p_.steps; ++i) {
      multiply(direction_.get());
      cg_step_cpu<T>(cg, p_.alpha, product_.get());
    }
  }

  const SupportLoopParams<T>& p_;
  const int64_t size_;
  const RealGrid<T> grid_;
  const VectorBuffer<Vec<T>> symbol_;
  const VectorBuffer<ComplexVec<T>> spectrum_;
  const VectorBuffer<T> product_, residual_, direction_;
};

}  // namespace

template <class T>
void transform_planes_cpu(const TransformParams<T>& p) {
  const RealGrid<T> grid(p.n, p.m);
  parallel_for(p.planes, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(grid);
    for (int64_t plane = begin; plane < end; ++plane) {
      auto* spectrum =
          reinterpret_cast<ComplexVec<T>*>(p.spectra + plane * spectrum_values<T>(p.n, p.m));
      for (int64_t block = 0; block < grid.column_blocks(); ++block)
        transform_columns(grid, p.images + plane * p.height * p.width, p.height, p.width, block,
                          spectrum, scratch);
      for (int64_t block = 0; block < grid.row_blocks(); ++block) {
        ComplexVec<T>* const row = spectrum + block * p.m;
        const ComplexVec<T>* done = fft<false>(grid.rows, row, scratch.a.get());
        if (done != row) std::memcpy(row, done, p.m * sizeof(ComplexVec<T>));
      }
    }
  });
}

template <class T>
void correlations_cpu(const CorrelationParams<T>& p) {
  Correlator<T>(p).run();
}

template <class T>
void support_loop_cpu(const SupportLoopParams<T>& p) {
  parallel_for(p.batch, p.batch < max_threads() ? p.batch : 1, [&](int64_t begin, int64_t end) {
    SupportSolver<T> solver(p);
    for (int64_t b = begin; b < end; ++b) solver.run(b);
  });
}

template void transform_planes_cpu<float>(const TransformParams<float>&);
template void transform_planes_cpu<double>(const TransformParams<double>&);
template void correlations_cpu<float>(const CorrelationParams<float>&);
template void correlations_cpu<double>(const CorrelationParams<double>&);
template void support_loop_cpu<float>(const SupportLoopParams<float>&);
template void support_loop_cpu<double>(const SupportLoopParams<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
