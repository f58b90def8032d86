// The spectral path on the CPU; compiled once per instruction set (see common/isa.h).
#include "blur/blur_spectral.h"

#include "blur/spectral_plane.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

template <class T>
class Pipeline {
 public:
  explicit Pipeline(const SpectralBlur<T>& p)
      : p_(p),
        grid_(p.g.n, p.g.m),
        kernel_transform_(grid_, p.s, p.g),
        image_(GridReader<T>::image(grid_, p.s, p.wraps)),
        second_(grid_, p.s.output_height(), p.s.output_width()),
        parseval_(p.task == SpectralTask::kGradients && p.wraps && p.mask.data == nullptr),
        loss_parts_(parseval_ ? grid_.row_blocks() : grid_.column_blocks()),
        losses_(p.loss ? p.s.planes() * loss_parts_ : 0) {}

  void run() {
    const int64_t kernels = p_.s.kernel_batch() * p_.s.kernel_channels();
    // Kernels side by side if there are enough of them; else the planes of one kernel, unless its
    // gradient, which is summed in their order, is asked for: then the blocks of one plane.
    parallel_for(kernels, kernels < max_threads() ? kernels : 1, [&](int64_t begin, int64_t end) {
      const VectorBuffer<ComplexVec<T>> kernel(size_if(p_.kernel));
      for (int64_t index = begin; index < end; ++index) run_kernel(index, kernel.get());
    });
    if (p_.loss == nullptr) return;
    const int64_t parts = p_.s.channels * loss_parts_;
    const double half = parseval_ ? 0.5 / (static_cast<double>(p_.g.n) * p_.g.m) : 0.5;
    for (int64_t b = 0; b < p_.s.batch; ++b) {
      double total = 0;
      for (int64_t i = 0; i < parts; ++i) total += losses_.get()[b * parts + i];
      p_.loss[b] = static_cast<T>(half * total);
    }
  }

 private:
  using Spectrum = ComplexVec<T>*;

  // What one plane, or one after another, needs.
  struct Buffers {
    VectorBuffer<ComplexVec<T>> image, work;
    GridFolder<T> folder;
    explicit Buffers(const Pipeline& p)
        : image(p.p_.task == SpectralTask::kGradients || p.p_.task == SpectralTask::kKernelAdjoint
                    ? p.grid_.spectrum_size()
                    : 0),
          work(p.grid_.spectrum_size()),
          folder(p.p_.s, p.p_.wraps) {}
  };

  int64_t size_if(const void* wanted) const { return wanted ? grid_.spectrum_size() : 0; }

  void run_kernel(int64_t index, Spectrum kernel) {
    const int64_t kernels = p_.s.kernel_batch() * p_.s.kernel_channels();
    const int64_t planes = p_.s.planes() / kernels;
    if (p_.kernel)
      kernel_transform_.forward(p_.kernel + index * p_.s.kernel_height * p_.s.kernel_width, kernel);
    if (p_.grad_kernel == nullptr) {
      parallel_planes(planes, [&](int64_t begin, int64_t end) {
        const Buffers buffers(*this);
        for (int64_t i = begin; i < end; ++i)
          run_plane(p_.s.shared_plane(index, i), kernel, nullptr, false, buffers);
      });
      return;
    }
    const Buffers buffers(*this);
    const VectorBuffer<ComplexVec<T>> grad(grid_.spectrum_size());
    for (int64_t i = 0; i < planes; ++i)
      run_plane(p_.s.shared_plane(index, i), kernel, grad.get(), i == 0, buffers);
    kernel_transform_.inverse(grad.get(),
                              p_.grad_kernel + index * p_.s.kernel_height * p_.s.kernel_width);
  }

  void run_plane(int64_t plane, const ComplexVec<T>* kernel, Spectrum grad, bool first,
                 const Buffers& buffers) {
    const Spectrum x = buffers.image.get(), work = buffers.work.get();
    switch (p_.task) {
      case SpectralTask::kBlur:
        blur(plane, kernel, work);
        write(plane, work);
        return;
      case SpectralTask::kLoss:
        blur(plane, kernel, work);
        misfit(plane, work, false);
        return;
      case SpectralTask::kAdjoint:
        load(second_, p_.second, plane, work);
        for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
          const ComplexVec<T>* k = kernel + block * p_.g.m;
          filter_rows(grid_, block, work, scratch,
                      [&](int64_t i, ComplexVec<T> r) { return conj_times(k[i], r); });
        });
        break;
      case SpectralTask::kKernelAdjoint:
        load(image_, p_.image, plane, x);
        load(second_, p_.second, plane, work);
        for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
          const int64_t start = block * p_.g.m;
          const ComplexVec<T>* u = fft<false>(grid_.rows, x + start, scratch.a.get());
          const ComplexVec<T>* r = fft<false>(grid_.rows, work + start, scratch.b.get());
          for (int64_t i = 0; i < p_.g.m; ++i) add(u[i], r[i], first, grad[start + i]);
        });
        return;
      case SpectralTask::kGradients:
        if (parseval_)
          gradients_by_parseval(plane, kernel, grad, first, x, work);
        else
          gradients(plane, kernel, grad, first, x, work);
        break;
    }
    buffers.folder.run(grid_, work, plane_of(p_.output, p_.s, plane));
  }

  void load(const GridReader<T>& reader, const Strided<const T>& tensor, int64_t plane,
            Spectrum spectrum) const {
    const auto source = plane_of(tensor, p_.s, plane);
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      reader.transform(grid_, source, block, spectrum, scratch);
    });
  }

  static void add(ComplexVec<T> x, ComplexVec<T> r, bool first, ComplexVec<T>& grad) {
    const ComplexVec<T> g = conj_times(x, r);
    grad = first ? g : grad + g;
  }

  void blur(int64_t plane, const ComplexVec<T>* kernel, Spectrum work) const {
    load(image_, p_.image, plane, work);
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const ComplexVec<T>* k = kernel + block * p_.g.m;
      filter_rows(grid_, block, work, scratch,
                  [&](int64_t i, ComplexVec<T> x) { return k[i] * x; });
    });
  }

  void write(int64_t plane, const ComplexVec<T>* work) const {
    const PlaneWriter<T> writer{
        plane_of(p_.output, p_.s, plane), p_.s.output_height(), p_.s.output_width(), 0, 0, scale()};
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      writer.inverse(grid_, block, work, scratch);
    });
  }

  T scale() const { return T(1) / (static_cast<T>(p_.g.n) * static_cast<T>(p_.g.m)); }

  // From the spectrum of the prediction, back in the vertical direction, mask * (prediction -
  // observation), its loss and, if wanted, its spectrum, a block of columns at a time.
  void misfit(int64_t plane, Spectrum work, bool transform) {
    const auto observation = plane_of(p_.second, p_.s, plane);
    const bool masked = p_.mask.data != nullptr;
    const auto mask = masked ? plane_of(p_.mask, p_.s, plane) : Plane<const T>{};
    const int64_t rows = p_.s.output_height(), columns = p_.s.output_width();
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      double total = 0;
      if (second_.is_empty(block)) {
        if (transform) forward_zero_columns(grid_, block, work);
      } else {
        const int64_t x = block * kLanes<T>;
        Vec<T> weight;  // scale of the transforms, zero beyond the last column
        for (int64_t i = 0; i < kLanes<T>; ++i) weight[i] = x + i < columns ? scale() : T(0);
        ComplexVec<T>* const z =
            inverse_block(grid_, block, work, scratch.a.get(), scratch.b.get());
        Vec<T> energy{};
        const auto subtract = [&](int64_t y, Vec<T> prediction) {
          if (y >= rows) return Vec<T>{};
          const Vec<T> d = prediction * weight - second_.load(observation, y, x);
          const Vec<T> r = masked ? second_.load(mask, y, x) * d : d;
          energy += r * d;
          return r;
        };
        for (int64_t begin = 0; begin < grid_.half(); begin += kChunk / 2) {
          const int64_t end = smaller(begin + kChunk / 2, grid_.half());
          for (int64_t j = begin; j < end; ++j) {
            z[j].re = subtract(2 * j, z[j].re);
            z[j].im = subtract(2 * j + 1, z[j].im);
          }
          total += sum(energy);
          energy = Vec<T>{};
        }
        ComplexVec<T>* const other = z == scratch.a.get() ? scratch.b.get() : scratch.a.get();
        if (transform) forward_block(grid_, block, z, other, work);
      }
      losses_.get()[plane * loss_parts_ + block] = total;
    });
  }

  void gradients(int64_t plane, const ComplexVec<T>* kernel, Spectrum grad, bool first, Spectrum x,
                 Spectrum work) {
    load(image_, p_.image, plane, x);
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const int64_t start = block * p_.g.m;
      transform_rows<false>(grid_, block, x, scratch);
      const Place place(*this, work + start, scratch.a.get());
      for (int64_t i = 0; i < p_.g.m; ++i) place.out[i] = kernel[start + i] * x[start + i];
      fft<true>(grid_.rows, place.out, place.other);
    });
    misfit(plane, work, true);
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const int64_t start = block * p_.g.m;
      filter_rows(grid_, block, work, scratch, [&](int64_t i, ComplexVec<T> r) {
        add(x[start + i], r, first, grad[start + i]);
        return conj_times(kernel[start + i], r);
      });
    });
  }

  void gradients_by_parseval(int64_t plane, const ComplexVec<T>* kernel, Spectrum grad, bool first,
                             Spectrum x, Spectrum work) {
    const auto image = plane_of(p_.image, p_.s, plane);
    const auto observation = plane_of(p_.second, p_.s, plane);
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      image_.transform(grid_, image, block, x, scratch);
      second_.transform(grid_, observation, block, work, scratch);
    });
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const int64_t m = p_.g.m, start = block * m;
      const ComplexVec<T>* k = kernel + start;
      const ComplexVec<T>* u = fft<false>(grid_.rows, x + start, scratch.a.get());
      const ComplexVec<T>* y = fft<false>(grid_.rows, work + start, scratch.b.get());
      Vec<T> weight;
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        const int64_t row = block * kLanes<T> + i;
        weight[i] = row == 0 || row == grid_.half() ? T(1) : T(2);
      }
      const Place place(*this, work + start, scratch.b.get());
      double total = 0;
      for (int64_t begin = 0; begin < m; begin += kChunk) {
        const int64_t end = smaller(begin + kChunk, m);
        Vec<T> energy{};
        for (int64_t i = begin; i < end; ++i) {
          const ComplexVec<T> r = k[i] * u[i] - y[i];
          energy += r.re * r.re + r.im * r.im;
          add(u[i], r, first, grad[start + i]);
          place.out[i] = conj_times(k[i], r);
        }
        total += sum(energy * weight);
      }
      losses_.get()[plane * loss_parts_ + block] = total;
      fft<true>(grid_.rows, place.out, place.other);
    });
  }

  // Where a horizontal transform must start for its last pass to write home.
  struct Place {
    ComplexVec<T>*out, *other;
    Place(const Pipeline& p, ComplexVec<T>* home, ComplexVec<T>* spare) {
      const bool even = p.grid_.rows.stage_count % 2 == 0;
      out = even ? home : spare;
      other = even ? spare : home;
    }
  };

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static double sum(Vec<T> v) {
    double total = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) total += v[i];
    return total;
  }

  static constexpr int64_t kChunk = 32;  // terms that are summed in T before double takes over

  const SpectralBlur<T>& p_;
  const RealGrid<T> grid_;
  const KernelTransform<T> kernel_transform_;
  const GridReader<T> image_, second_;
  const bool parseval_;
  const int64_t loss_parts_;
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
