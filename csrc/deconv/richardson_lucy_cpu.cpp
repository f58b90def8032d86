// Richardson-Lucy on the CPU; compiled once per instruction set (see common/isa.h).
#include "blur/spectral_plane.h"
#include "deconv/deconv.h"
#include "deconv/deconv_spectral.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

// A grid's values in blocks of columns, one after another, as the vertical transforms take them.
template <class T>
class BlockPlane {
 public:
  BlockPlane(const RealGrid<T>& grid, bool wanted)
      : rows_(grid.n), values_(wanted ? grid.column_blocks() * grid.n : 0) {}
  Vec<T>* block(int64_t index) const { return values_.get() + index * rows_; }

 private:
  int64_t rows_;
  VectorBuffer<Vec<T>> values_;
};

// The planes of one range, one after another.
//
// Where a pixel of the image is one of the grid and the update looks at nothing else, image and
// weights stay on the grid, too, and an iteration is two passes over columns and two over rows.
// Otherwise the correction is folded onto the image, which is updated there and extended again.
template <class T>
class LucyPlanes {
 public:
  LucyPlanes(const LucyParams<T>& p, const RealGrid<T>& grid, const GridReader<T>& image,
             const GridReader<T>& observed, const KernelSpectra<T>& kernels)
      : p_(p),
        grid_(grid),
        image_reader_(image),
        observed_reader_(observed),
        kernels_(kernels),
        on_grid_(p.total_variation == 0 && !GridFolder<T>::adds_up(p.s, p.wraps)),
        one_(p.s),
        folder_(p.s, p.wraps),
        spectrum_(grid.spectrum_size()),
        observed_(grid, true),
        on_grid_image_(grid, on_grid_),
        on_grid_inverse_(grid, on_grid_),
        image_(on_grid_ ? 0 : area()),
        correction_(on_grid_ ? 0 : area()),
        inverse_(on_grid_ ? 0 : area()) {
    one_.batch = one_.channels = 1;
  }

  void run(int64_t plane) {
    k_ = kernels_.get(p_.s.kernel_index(plane));
    const auto observation = plane_of(p_.observation, p_.s, plane);
    const auto mask = mask_of(plane);
    columns([&](int64_t block, const Scratch<T>&) {
      Vec<T>* out = observed_.block(block);
      for (int64_t y = 0; y < grid_.n; ++y) {
        out[y] = observed_reader_.load(observation, y, block * kLanes<T>);
        if (mask.data) out[y] *= observed_reader_.load(mask, y, block * kLanes<T>);
      }
    });
    if (k_ != known_kernel_ || mask.data != known_mask_) weigh(mask);
    known_kernel_ = k_;
    known_mask_ = mask.data;
    if (on_grid_)
      iterate_on_grid(plane);
    else
      iterate(plane);
  }

 private:
  int64_t area() const { return p_.s.height * p_.s.width; }
  T scale() const { return T(1) / (static_cast<T>(p_.g.n) * static_cast<T>(p_.g.m)); }

  Plane<const T> mask_of(int64_t plane) const {
    return p_.mask.data ? plane_of(p_.mask, p_.s, plane) : Plane<const T>{};
  }

  template <class Body>
  void columns(const Body& body) const {
    for_each_block(grid_, grid_.column_blocks(), body);
  }
  void multiply_by_kernel() const {
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const ComplexVec<T>* k = k_ + block * p_.g.m;
      filter_rows(grid_, block, spectrum_.get(), scratch,
                  [&](int64_t i, ComplexVec<T> x) { return k[i] * x; });
    });
  }
  void multiply_by_adjoint() const {
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      const ComplexVec<T>* k = k_ + block * p_.g.m;
      filter_rows(grid_, block, spectrum_.get(), scratch,
                  [&](int64_t i, ComplexVec<T> x) { return conj_times(k[i], x); });
    });
  }

  // Inverse of K' m, zero where it says that a pixel is not observed.
  void weigh(const Plane<const T>& mask) const {
    const int64_t rows = p_.s.output_height(), width = p_.s.output_width();
    const auto seen = [&](int64_t y, int64_t x, int64_t) {
      if (mask.data) return observed_reader_.load(mask, y, x);
      Vec<T> v{};
      for (int64_t i = 0; i < kLanes<T>; ++i) v[i] = y < rows && x + i < width ? T(1) : T(0);
      return v;
    };
    columns([&](int64_t block, const Scratch<T>& scratch) {
      forward_columns(grid_, block, seen, spectrum_.get(), scratch.a.get(), scratch.b.get());
    });
    multiply_by_adjoint();
    if (on_grid_) {
      columns([&](int64_t block, const Scratch<T>& scratch) {
        const auto store = [&](int64_t y, int64_t, int64_t, Vec<T> weight) {
          weight *= scale();
          on_grid_inverse_.block(block)[y] = weight > p_.least ? T(1) / weight : Vec<T>{};
        };
        inverse_columns(grid_, block, spectrum_.get(), store, scratch.a.get(), scratch.b.get());
      });
      return;
    }
    folder_.run(grid_, spectrum_.get(), {inverse_.get(), p_.s.width, 1});
    invert_weight_cpu<T>(area(), p_.least, inverse_.get());
  }

  // m y / max(K u, floor), from the spectrum of K u to its own, both half way.
  void divide() const {
    const T factor = scale(), floor = p_.floor;
    columns([&](int64_t block, const Scratch<T>& scratch) {
      if (observed_reader_.is_empty(block))
        return forward_zero_columns(grid_, block, spectrum_.get());
      const Vec<T>* y = observed_.block(block);
      const auto quotient = [&](Vec<T> prediction, Vec<T> observed) {
        prediction *= factor;
        return observed / (prediction < floor ? Vec<T>{} + floor : prediction);
      };
      through(block, scratch, [&](int64_t j, ComplexVec<T>& z) {
        z = {quotient(z.re, y[2 * j]), quotient(z.im, y[2 * j + 1])};
      });
    });
  }

  // One block of columns back from the spectrum, through `change`, pair of rows by pair, and there
  // again.
  template <class Change>
  void through(int64_t block, const Scratch<T>& scratch, const Change& change) const {
    ComplexVec<T>*const a = scratch.a.get(), *const b = scratch.b.get();
    ComplexVec<T>* const z = inverse_block(grid_, block, spectrum_.get(), a, b);
    for (int64_t j = 0; j < grid_.half(); ++j) change(j, z[j]);
    forward_block(grid_, block, z, z == a ? b : a, spectrum_.get());
  }

  void iterate_on_grid(int64_t plane) const {
    const auto initial = plane_of(p_.initial, p_.s, plane);
    columns([&](int64_t block, const Scratch<T>& scratch) {
      Vec<T>* image = on_grid_image_.block(block);
      const auto load = [&](int64_t y, int64_t x, int64_t) {
        return image[y] = image_reader_.load(initial, y, x);
      };
      forward_columns(grid_, block, load, spectrum_.get(), scratch.a.get(), scratch.b.get());
    });
    const T factor = scale();
    for (int64_t i = 0; i < p_.iterations; ++i) {
      multiply_by_kernel();
      divide();
      multiply_by_adjoint();
      columns([&](int64_t block, const Scratch<T>& scratch) {
        if (image_reader_.is_empty(block))
          return forward_zero_columns(grid_, block, spectrum_.get());
        Vec<T>* image = on_grid_image_.block(block);
        const Vec<T>* inverse = on_grid_inverse_.block(block);
        const auto update = [&](int64_t y, Vec<T> correction) {
          correction *= factor;
          correction = correction < T(0) ? Vec<T>{} : correction;
          const Vec<T> change = correction * inverse[y];
          return image[y] *= inverse[y] == T(0) ? Vec<T>{} + T(1) : change;
        };
        through(block, scratch, [&](int64_t j, ComplexVec<T>& z) {
          z = {update(2 * j, z.re), update(2 * j + 1, z.im)};
        });
      });
    }
    const bool crops = !p_.wraps && p_.s.boundary == Boundary::kZero;
    const PlaneWriter<T> writer{{p_.output + plane * area(), p_.s.width, 1},
                                p_.s.height,
                                p_.s.width,
                                crops ? extension_before(p_.s.kernel_height) : 0,
                                crops ? extension_before(p_.s.kernel_width) : 0,
                                T(1)};
    columns([&](int64_t block, const Scratch<T>&) {
      const Vec<T>* image = on_grid_image_.block(block);
      for (int64_t y = 0; y < grid_.n; ++y)
        writer.put(y, block * kLanes<T>, lanes_on_grid(grid_, block), image[y]);
    });
  }

  void iterate(int64_t plane) const {
    const auto initial = plane_of(p_.initial, p_.s, plane);
    T* image = p_.output + plane * area();
    for (int64_t y = 0; y < p_.s.height; ++y)
      for (int64_t x = 0; x < p_.s.width; ++x)
        image[y * p_.s.width + x] = initial.data[y * initial.row + x * initial.column];
    // The denominator of total variation looks at neighbours, so that it needs the image before.
    const bool apart = p_.total_variation > 0;
    T* next = apart ? image_.get() : image;
    for (int64_t i = 0; i < p_.iterations; ++i) {
      columns([&](int64_t block, const Scratch<T>& scratch) {
        image_reader_.transform(grid_, {image, p_.s.width, 1}, block, spectrum_.get(), scratch);
      });
      multiply_by_kernel();
      divide();
      multiply_by_adjoint();
      folder_.run(grid_, spectrum_.get(), {correction_.get(), p_.s.width, 1});
      lucy_update_cpu<T>(
          one_, {image, correction_.get(), inverse_.get(), p_.total_variation, p_.floor, next});
      T* const before = image;
      image = next;
      next = before;
    }
    if (image == image_.get()) std::memcpy(p_.output + plane * area(), image, area() * sizeof(T));
  }

  const LucyParams<T>& p_;
  const RealGrid<T>& grid_;
  const GridReader<T>&image_reader_, &observed_reader_;
  const KernelSpectra<T>& kernels_;
  const bool on_grid_;
  BlurShape one_;  // a single plane
  const GridFolder<T> folder_;
  const VectorBuffer<ComplexVec<T>> spectrum_;
  const BlockPlane<T> observed_, on_grid_image_, on_grid_inverse_;
  const VectorBuffer<T> image_, correction_, inverse_;
  const ComplexVec<T>* k_ = nullptr;
  const ComplexVec<T>* known_kernel_ = nullptr;
  const T* known_mask_ = nullptr;
};

}  // namespace

template <class T>
void richardson_lucy_cpu(const LucyParams<T>& p) {
  const RealGrid<T> grid(p.g.n, p.g.m);
  const auto image = GridReader<T>::image(grid, p.s, p.wraps);
  const GridReader<T> observed(grid, p.s.output_height(), p.s.output_width());
  const KernelSpectra<T> kernels(grid, p.s, p.g, p.kernel);
  parallel_planes(p.s.planes(), [&](int64_t begin, int64_t end) {
    LucyPlanes<T> planes(p, grid, image, observed, kernels);
    for (int64_t plane = begin; plane < end; ++plane) planes.run(plane);
  });
}

template void richardson_lucy_cpu<float>(const LucyParams<float>&);
template void richardson_lucy_cpu<double>(const LucyParams<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
