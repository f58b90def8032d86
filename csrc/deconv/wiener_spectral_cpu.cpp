// The Wiener step on the CPU; compiled once per instruction set (see common/isa.h).
#include "blur/spectral_plane.h"
#include "deconv/deconv_spectral.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

// The planes of one range, one after another; what neighbours share is kept.
template <class T>
class WienerPlanes {
 public:
  WienerPlanes(const WienerSpectral<T>& p, const RealGrid<T>& grid, const GridReader<T>& reader,
               const KernelSpectra<T>& kernels)
      : p_(p),
        grid_(grid),
        reader_(reader),
        kernels_(kernels),
        scale_(T(1) / (static_cast<T>(p.g.n) * static_cast<T>(p.g.m))),
        spectrum_(grid.spectrum_size()),
        target_(p.mask.data ? 0 : grid.spectrum_size()),
        inverse_(grid.spectrum_size()),
        misfit_(p.mask.data ? grid.column_blocks() * grid.n : 0) {}

  void run(int64_t plane) {
    k_ = kernels_.get(p_.s.kernel_index(plane));
    fill_inverse(plane);
    const auto estimate = plane_of(p_.estimate, p_.s, plane);
    columns([&](int64_t block, const Scratch<T>& scratch) {
      reader_.transform(grid_, estimate, block, spectrum_.get(), scratch);
    });
    const PlaneWriter<T> writer{
        plane_of(p_.output, p_.s, plane), p_.s.height, p_.s.width, 0, 0, scale_};
    if (p_.mask.data == nullptr) {
      solve(plane);
      columns([&](int64_t block, const Scratch<T>& scratch) {
        writer.inverse(grid_, block, spectrum_.get(), scratch);
      });
      return;
    }
    rows([&](int64_t i, ComplexVec<T> x) { return k_[i] * x; });
    start_misfit(plane);
    for (int64_t pass = 1; pass < p_.passes; ++pass) {
      rows([&](int64_t i, ComplexVec<T> x) {
        const Vec<T> echo = power(k_[i]) * inverse_.get()[i];
        return ComplexVec<T>{x.re * echo, x.im * echo};
      });
      impute(plane);
    }
    rows([&](int64_t i, ComplexVec<T> x) {
      const ComplexVec<T> back = conj_times(k_[i], x);
      return ComplexVec<T>{back.re * inverse_.get()[i], back.im * inverse_.get()[i]};
    });
    columns([&](int64_t block, const Scratch<T>& scratch) {
      const auto add = [&](int64_t y, int64_t x, int64_t count, Vec<T> change) {
        writer.put(y, x, count, reader_.load(estimate, y, x) + change * scale_);
      };
      inverse_columns(grid_, block, spectrum_.get(), add, scratch.a.get(), scratch.b.get());
    });
  }

 private:
  template <class Body>
  void columns(const Body& body) const {
    for_each_block(grid_, grid_.column_blocks(), body);
  }
  // `filter` is given bins of the whole spectrum.
  template <class Filter>
  void rows(const Filter& filter) const {
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const int64_t start = block * p_.g.m;
      filter_rows(grid_, block, spectrum_.get(), scratch,
                  [&](int64_t i, ComplexVec<T> x) { return filter(start + i, x); });
    });
  }

  static Vec<T> power(ComplexVec<T> k) { return k.re * k.re + k.im * k.im; }

  // 1 / (|K|^2 + ratio) of every bin.
  void fill_inverse(int64_t plane) {
    const T* ratio = p_.ratio + plane / p_.s.channels * p_.ratio_stride_b +
                     plane % p_.s.channels * p_.ratio_stride_c;
    if (ratio == known_ratio_ && k_ == known_kernel_) return;
    known_ratio_ = ratio;
    known_kernel_ = k_;
    const int64_t m = p_.g.m;
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>&) {
      for (int64_t i = 0; i < m; ++i) {
        const Vec<T> square = power(k_[block * m + i]);
        Vec<T>& inverse = inverse_.get()[block * m + i];
        if (p_.ratio_stride_bin == 0) {
          inverse = T(1) / (square + *ratio);
          continue;
        }
        Vec<T> own{}, mirrored{};
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          const int64_t row = block * kLanes<T> + lane;
          own[lane] = row <= grid_.half() ? ratio_at(ratio, row, i) : T(1);
          mirrored[lane] = row <= grid_.half() ? ratio_at(ratio, -row, -i) : T(1);
        }
        // In the two columns that are their own mirror images both bins have a ratio, and a real
        // result takes the mean; elsewhere these are the same number.
        inverse = (T(1) / (square + own) + T(1) / (square + mirrored)) * T(0.5);
      }
    });
  }

  // The ratio that the bin (row, column) or else its mirror image has.
  T ratio_at(const T* ratio, int64_t row, int64_t column) const {
    const int64_t n = p_.g.n, m = p_.g.m;
    row = row < 0 ? row + n : row;
    column = column < 0 ? column + m : column;
    if (column > m / 2) {
      row = row == 0 ? 0 : n - row;
      column = m - column;
    }
    return ratio[(row * p_.g.columns() + column) * p_.ratio_stride_bin];
  }

  // X += conj(K) (Y - K X) / (|K|^2 + ratio)
  void solve(int64_t plane) {
    const auto observation = plane_of(p_.observation, p_.s, plane);
    const bool fresh = observation.data != known_target_;
    known_target_ = observation.data;
    if (fresh) {
      columns([&](int64_t block, const Scratch<T>& scratch) {
        reader_.transform(grid_, observation, block, target_.get(), scratch);
      });
      for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
        transform_rows<false>(grid_, block, target_.get(), scratch);
      });
    }
    rows([&](int64_t i, ComplexVec<T> x) {
      const ComplexVec<T> step = conj_times(k_[i], target_.get()[i] - k_[i] * x);
      const Vec<T> inverse = inverse_.get()[i];
      return ComplexVec<T>{x.re + step.re * inverse, x.im + step.im * inverse};
    });
  }

  // Columns back from the spectrum, through `change(y, x, values)`, and there again.
  template <class Change>
  void through_columns(const Change& change) const {
    columns([&](int64_t block, const Scratch<T>& scratch) {
      const int64_t x = block * kLanes<T>;
      ComplexVec<T>*const a = scratch.a.get(), *const b = scratch.b.get();
      ComplexVec<T>* const z = inverse_block(grid_, block, spectrum_.get(), a, b);
      for (int64_t j = 0; j < grid_.half(); ++j) {
        z[j].re = change(2 * j, x, z[j].re * scale_);
        z[j].im = change(2 * j + 1, x, z[j].im * scale_);
      }
      forward_block(grid_, block, z, z == a ? b : a, spectrum_.get());
    });
  }

  Vec<T>& misfit(int64_t y, int64_t x) const { return misfit_.get()[x / kLanes<T> * grid_.n + y]; }

  // mask * (y - k * x_hat), kept for the imputations
  void start_misfit(int64_t plane) const {
    const auto observation = plane_of(p_.observation, p_.s, plane);
    const auto mask = plane_of(p_.mask, p_.s, plane);
    through_columns([&](int64_t y, int64_t x, Vec<T> prediction) {
      return misfit(y, x) =
                 reader_.load(mask, y, x) * (reader_.load(observation, y, x) - prediction);
    });
  }

  // What is not observed is replaced by what the change so far predicts.
  void impute(int64_t plane) const {
    const auto mask = plane_of(p_.mask, p_.s, plane);
    through_columns([&](int64_t y, int64_t x, Vec<T> echo) {
      return misfit(y, x) + (T(1) - reader_.load(mask, y, x)) * echo;
    });
  }

  const WienerSpectral<T>& p_;
  const RealGrid<T>& grid_;
  const GridReader<T>& reader_;
  const KernelSpectra<T>& kernels_;
  const T scale_;
  const VectorBuffer<ComplexVec<T>> spectrum_, target_;
  const VectorBuffer<Vec<T>> inverse_, misfit_;  // misfit: a block of columns after another
  const ComplexVec<T>* k_ = nullptr;
  const ComplexVec<T>* known_kernel_ = nullptr;
  const T* known_ratio_ = nullptr;
  const T* known_target_ = nullptr;
};

}  // namespace

template <class T>
void wiener_spectral_cpu(const WienerSpectral<T>& p) {
  const RealGrid<T> grid(p.g.n, p.g.m);
  const GridReader<T> reader(grid, p.s.height, p.s.width);
  const KernelSpectra<T> kernels(grid, p.s, p.g, p.kernel);
  parallel_planes(p.s.planes(), [&](int64_t begin, int64_t end) {
    WienerPlanes<T> planes(p, grid, reader, kernels);
    // Images that share an observation in turn.
    const bool shared = p.observation.batch == 0;
    for (int64_t i = begin; i < end; ++i)
      planes.run(shared ? i % p.s.batch * p.s.channels + i / p.s.batch : i);
  });
}

template void wiener_spectral_cpu<float>(const WienerSpectral<float>&);
template void wiener_spectral_cpu<double>(const WienerSpectral<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
