// One plane on its way to the transforms of common/fft.h and back, in any layout, extended beyond
// its border on the fly. Included by files that are compiled once per instruction set.
#pragma once

#include "blur/blur.h"
#include "common/fft.h"
#include "common/parallel.h"
#include "common/strided.h"

namespace latentdem {
namespace LATENTDEM_ISA {

// Calls body(block, scratch) for every block, on threads if there is enough to do.
template <class T, class Body>
void for_each_block(const RealGrid<T>& grid, int64_t blocks, const Body& body) {
  constexpr int64_t kGrain = 4;  // blocks worth a thread
  parallel_for(blocks, kGrain, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(grid);
    for (int64_t block = begin; block < end; ++block) body(block, scratch);
  });
}

// A plane in any layout.
template <class T>
struct Plane {
  T* data;
  int64_t row, column;
};
template <class T>
Plane<T> plane_of(const Strided<T>& t, const BlurShape& s, int64_t plane) {
  return {t.plane(plane / s.channels, plane % s.channels), t.row, t.column};
}

// Where the grid takes its values from: planes [height,width] in its top left corner, after
// `before` rows and columns of extension; zeros elsewhere.
template <class T>
class GridReader {
 public:
  GridReader(const RealGrid<T>& grid, int64_t height, int64_t width)
      : GridReader(grid, height, width, 0, 0, height, width, Boundary::kZero) {}

  // The image of a blur; nothing is extended if the grid itself is the circle.
  static GridReader image(const RealGrid<T>& grid, const BlurShape& s, bool wraps) {
    if (wraps || !s.keeps_size()) return GridReader(grid, s.height, s.width);
    return GridReader(grid, s.height, s.width, extension_before(s.kernel_height),
                      extension_before(s.kernel_width), s.extended_height(), s.extended_width(),
                      s.boundary);
  }

  // Columns of the grid from `block` on hold nothing.
  bool is_empty(int64_t block) const { return block * kLanes<T> >= filled_; }

  Vec<T> load(const Plane<const T>& p, int64_t y, int64_t x) const {
    Vec<T> v{};
    const int64_t source = rows_.get()[y];
    if (source < 0) return v;
    const T* row = p.data + source * p.row;
    if (x >= first_ && x + kLanes<T> <= first_ + width_) {
      row += (x - first_) * p.column;
      if (p.column == 1)
        std::memcpy(&v, row, sizeof(v));
      else
        for (int64_t i = 0; i < kLanes<T>; ++i) v[i] = row[i * p.column];
      return v;
    }
    const int64_t* columns = columns_.get() + x;
    for (int64_t i = 0; i < kLanes<T>; ++i)
      if (columns[i] >= 0) v[i] = row[columns[i] * p.column];
    return v;
  }

  // Vertical half of the transform of one block of columns.
  void transform(const RealGrid<T>& grid, const Plane<const T>& p, int64_t block,
                 ComplexVec<T>* spectrum, const Scratch<T>& scratch) const {
    if (is_empty(block)) return forward_zero_columns(grid, block, spectrum);
    const auto rows = [&](int64_t y, int64_t x, int64_t) { return load(p, y, x); };
    forward_columns(grid, block, rows, spectrum, scratch.a.get(), scratch.b.get());
  }

 private:
  GridReader(const RealGrid<T>& grid, int64_t height, int64_t width, int64_t before_y,
             int64_t before_x, int64_t extended_height, int64_t extended_width, Boundary boundary)
      : width_(width),
        first_(before_x),
        filled_(extended_width),
        rows_(grid.n),
        columns_(grid.column_blocks() * kLanes<T>) {
    for (int64_t y = 0; y < grid.n; ++y)
      rows_.get()[y] = y < extended_height ? source_index(y - before_y, height, boundary) : -1;
    for (int64_t x = 0; x < grid.column_blocks() * kLanes<T>; ++x)
      columns_.get()[x] = x < extended_width ? source_index(x - before_x, width, boundary) : -1;
  }

  int64_t width_, first_, filled_;
  VectorBuffer<int64_t> rows_, columns_;
};

// Takes a part of the grid, scaled, into a plane [rows,columns] in any layout.
template <class T>
struct PlaneWriter {
  Plane<T> plane;
  int64_t rows, columns;
  int64_t first_row, first_column;
  T scale;

  void operator()(int64_t y, int64_t x, int64_t count, Vec<T> values) const {
    put(y, x, count, values * scale);
  }

  void put(int64_t y, int64_t x, int64_t count, Vec<T> values) const {
    y -= first_row;
    x -= first_column;
    if (y < 0 || y >= rows) return;
    T* row = plane.data + y * plane.row;
    if (plane.column == 1 && x >= 0 && x + kLanes<T> <= columns) {
      std::memcpy(row + x, &values, sizeof(values));
      return;
    }
    for (int64_t i = 0; i < count; ++i)
      if (x + i >= 0 && x + i < columns) row[(x + i) * plane.column] = values[i];
  }

  void inverse(const RealGrid<T>& grid, int64_t block, const ComplexVec<T>* spectrum,
               const Scratch<T>& scratch) const {
    const int64_t x = block * kLanes<T>;
    if (x >= first_column + columns || x + kLanes<T> <= first_column) return;
    inverse_columns(grid, block, spectrum, *this, scratch.a.get(), scratch.b.get());
  }
};

// The transpose of GridReader::image: field on the grid -> image gradient.
template <class T>
class GridFolder {
 public:
  GridFolder(const BlurShape& s, bool wraps)
      : s_(s),
        folds_(adds_up(s, wraps)),
        crops_(s.boundary == Boundary::kZero),
        field_(folds_ ? s.extended_height() * s.extended_width() : 0) {
    s_.batch = s_.channels = 1;
  }

  // Whether several places of the grid add to one pixel, in other columns perhaps.
  static bool adds_up(const BlurShape& s, bool wraps) {
    return !wraps && s.keeps_size() && s.boundary != Boundary::kZero;
  }

  void run(const RealGrid<T>& grid, const ComplexVec<T>* spectrum, const Plane<T>& out) const {
    const T scale = T(1) / (static_cast<T>(grid.n) * static_cast<T>(grid.m));
    PlaneWriter<T> writer{out, s_.height, s_.width, 0, 0, scale};
    if (folds_)
      writer = {{field_.get(), s_.extended_width(), 1},
                s_.extended_height(),
                s_.extended_width(),
                0,
                0,
                scale};
    if (crops_) {
      writer.first_row = extension_before(s_.kernel_height);
      writer.first_column = extension_before(s_.kernel_width);
    }
    for_each_block(grid, grid.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      writer.inverse(grid, block, spectrum, scratch);
    });
    if (folds_) fold_cpu<T>(s_, field_.get(), {out.data, 0, 0, out.row, out.column});
  }

 private:
  BlurShape s_;
  bool folds_, crops_;
  VectorBuffer<T> field_;
};

// One block of rows of a spectrum: transformed, filter(i, value) applied to column i, and
// transformed back, in place.
template <class T, class Filter>
void filter_rows(const RealGrid<T>& grid, int64_t block, ComplexVec<T>* spectrum,
                 const Scratch<T>& scratch, const Filter& filter) {
  ComplexVec<T>* const home = spectrum + block * grid.m;
  ComplexVec<T>* const x = fft<false>(grid.rows, home, scratch.a.get());
  for (int64_t i = 0; i < grid.m; ++i) x[i] = filter(i, x[i]);
  // As many passes back as there: the result is at home again.
  fft<true>(grid.rows, x, x == home ? scratch.a.get() : home);
}

// One block of rows, transformed in place.
template <bool Inverse, class T>
void transform_rows(const RealGrid<T>& grid, int64_t block, ComplexVec<T>* spectrum,
                    const Scratch<T>& scratch) {
  ComplexVec<T>* const home = spectrum + block * grid.m;
  const ComplexVec<T>* done = fft<Inverse>(grid.rows, home, scratch.a.get());
  if (done != home) std::memcpy(home, done, grid.m * sizeof(ComplexVec<T>));
}

// Kernels of one blur, on the grid that keeps tap (i, j) where SpectralGrid says.
template <class T>
class KernelTransform {
 public:
  KernelTransform(const RealGrid<T>& grid, const BlurShape& s, const SpectralGrid& g)
      : grid_(grid), s_(s), g_(g) {}

  void forward(const T* taps, ComplexVec<T>* spectrum) const {
    const auto load = [&](int64_t y, int64_t x, int64_t count) {
      Vec<T> values{};
      const int64_t i = (y + g_.origin_y) % g_.n;
      if (i >= s_.kernel_height) return values;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t j = (x + lane + g_.origin_x) % g_.m;
        if (j < s_.kernel_width) values[lane] = taps[i * s_.kernel_width + j];
      }
      return values;
    };
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      if (holds_taps(block))
        forward_columns(grid_, block, load, spectrum, scratch.a.get(), scratch.b.get());
      else
        forward_zero_columns(grid_, block, spectrum);
    });
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      transform_rows<false>(grid_, block, spectrum, scratch);
    });
  }

  // The taps of the inverse transform; the spectrum is overwritten.
  void inverse(ComplexVec<T>* spectrum, T* taps) const {
    const T scale = T(1) / (static_cast<T>(g_.n) * static_cast<T>(g_.m));
    const auto store = [&](int64_t y, int64_t x, int64_t count, Vec<T> values) {
      const int64_t i = (y + g_.origin_y) % g_.n;
      if (i >= s_.kernel_height) return;
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t j = (x + lane + g_.origin_x) % g_.m;
        if (j < s_.kernel_width) taps[i * s_.kernel_width + j] = values[lane] * scale;
      }
    };
    for_each_block(grid_, grid_.row_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      transform_rows<true>(grid_, block, spectrum, scratch);
    });
    for_each_block(grid_, grid_.column_blocks(), [&](int64_t block, const Scratch<T>& scratch) {
      if (holds_taps(block))
        inverse_columns(grid_, block, spectrum, store, scratch.a.get(), scratch.b.get());
    });
  }

 private:
  bool holds_taps(int64_t block) const {
    for (int64_t i = 0; i < kLanes<T>; ++i)
      if ((block * kLanes<T> + i + g_.origin_x) % g_.m < s_.kernel_width) return true;
    return false;
  }

  const RealGrid<T>& grid_;
  const BlurShape& s_;
  const SpectralGrid& g_;
};

// The spectra of all kernels of a blur, one after another.
template <class T>
class KernelSpectra {
 public:
  KernelSpectra(const RealGrid<T>& grid, const BlurShape& s, const SpectralGrid& g, const T* taps)
      : size_(grid.spectrum_size()),
        spectra_(s.kernel_batch() * s.kernel_channels() * grid.spectrum_size()) {
    const KernelTransform<T> transform(grid, s, g);
    const int64_t area = s.kernel_height * s.kernel_width;
    parallel_planes(s.kernel_batch() * s.kernel_channels(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        transform.forward(taps + i * area, spectra_.get() + i * size_);
    });
  }
  const ComplexVec<T>* get(int64_t index) const { return spectra_.get() + index * size_; }

 private:
  int64_t size_;
  VectorBuffer<ComplexVec<T>> spectra_;
};

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
