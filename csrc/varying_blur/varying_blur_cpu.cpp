// CPU kernels of spatially varying blur. Every sum has a fixed order: patches come one after
// the other within a row, and rows are shared out among the threads.
#include "varying_blur/varying_blur.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/parallel.h"

namespace latentdem {
namespace {

struct Interval {
  int64_t start, size;
};

// The shortest interval that holds every set flag: of the line from `first` to `first + count`
// (flags looked up at their source index), or of the circle.
Interval bounding_interval(const std::vector<char>& flags, int64_t first, int64_t count,
                           Boundary boundary) {
  const auto n = static_cast<int64_t>(flags.size());
  if (boundary == Boundary::kCircular) {
    // The complement of the longest run of zeros.
    int64_t best_end = 0, best = 0, run = 0;
    for (int64_t i = 0; i < 2 * n; ++i) {
      run = flags[i % n] ? 0 : run + 1;
      if (run > best && run <= n) {
        best = run;
        best_end = (i + 1) % n;
      }
    }
    return best == n ? Interval{0, 1} : Interval{best_end, n - best};
  }
  Interval found{0, 0};
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t source = source_index(i, n, boundary);
    if (source < 0 || !flags[source]) continue;
    if (found.size == 0) found.start = i;
    found.size = i - found.start + 1;
  }
  return found.size == 0 ? Interval{0, 1} : found;
}

// One run of columns of a box that lie side by side in the image.
struct Run {
  int64_t box, image, size, step;
};

// Calls body(box column, image column) along a run; the straight case is one that vectorises.
template <class Body>
void along(const Run& run, const Body& body) {
  if (run.step == 1) {
    for (int64_t i = 0; i < run.size; ++i) body(run.box + i, run.image + i);
  } else {
    for (int64_t i = 0; i < run.size; ++i) body(run.box + i, run.image + i * run.step);
  }
}

// The columns of a box as runs; mirrored ones have step -1, repeated ones step 0.
std::vector<Run> source_runs(const PatchBox& box, int64_t width, Boundary boundary) {
  std::vector<Run> runs;
  for (int64_t x = 0; x < box.width; ++x) {
    const int64_t column = patch_source(box.left + x, width, boundary);
    if (!runs.empty()) {
      Run& last = runs.back();
      const int64_t step = column - (last.image + (last.size - 1) * last.step);
      if (last.size == 1 && step >= -1 && step <= 1) last.step = step;
      if (step == last.step) {
        ++last.size;
        continue;
      }
    }
    runs.push_back({x, column, 1, 1});
  }
  return runs;
}

// The columns of a grid as runs of the result; those outside are left out.
std::vector<Run> target_runs(const VaryingShape& s, int64_t patch) {
  const int64_t left = s.boxes[patch].left - patch_shift(s.blur.kernel_width, s.blur.boundary);
  std::vector<Run> runs;
  for (int64_t x = 0; x < s.filled_columns(patch); ++x) {
    const int64_t column = patch_target(left + x, s.blur.output_width(), s.blur.boundary);
    if (column < 0) continue;
    if (!runs.empty() && column == runs.back().image + runs.back().size)
      ++runs.back().size;
    else
      runs.push_back({x, column, 1, 1});
  }
  return runs;
}

template <class Function>
std::vector<std::vector<Run>> runs_of_patches(const VaryingShape& s, const Function& runs) {
  std::vector<std::vector<Run>> all;
  for (int64_t patch = 0; patch < s.patches; ++patch) all.push_back(runs(patch));
  return all;
}

std::vector<std::vector<Run>> all_source_runs(const VaryingShape& s) {
  return runs_of_patches(
      s, [&](int64_t p) { return source_runs(s.boxes[p], s.blur.width, s.blur.boundary); });
}

std::vector<std::vector<Run>> all_target_runs(const VaryingShape& s) {
  return runs_of_patches(s, [&](int64_t p) { return target_runs(s, p); });
}

}  // namespace

template <class T>
void find_boxes_cpu(const BlurShape& s, int64_t patches, const T* weights, PatchBox* boxes) {
  const bool extends = s.boundary == Boundary::kReflect || s.boundary == Boundary::kReplicate;
  const auto interval = [&](const std::vector<char>& flags, int64_t kernel_size) {
    const int64_t before = extends ? extension_before(kernel_size) : 0;
    const int64_t count = static_cast<int64_t>(flags.size()) + (extends ? kernel_size - 1 : 0);
    return bounding_interval(flags, -before, count, s.boundary);
  };
  parallel_for(patches, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> peak(s.width);
    for (int64_t p = begin; p < end; ++p) {
      std::vector<char> rows(s.height), columns(s.width);
      std::fill(peak.begin(), peak.end(), T(0));
      for (int64_t y = 0; y < s.height; ++y) {
        const T* row = weights + (p * s.height + y) * s.width;
        T largest = 0;
        for (int64_t x = 0; x < s.width; ++x) largest += std::abs(row[x]);
        rows[y] = largest != 0;
        if (rows[y])
          for (int64_t x = 0; x < s.width; ++x) peak[x] += std::abs(row[x]);
      }
      for (int64_t x = 0; x < s.width; ++x) columns[x] = peak[x] != 0;
      const auto vertical = interval(rows, s.kernel_height);
      const auto horizontal = interval(columns, s.kernel_width);
      boxes[p] = {vertical.start, horizontal.start, vertical.size, horizontal.size};
    }
  });
}

template <class T>
void cut_source_cpu(const VaryingShape& s, const T* weights, const T* image, T* grids) {
  const int64_t h = s.blur.height, w = s.blur.width;
  const auto runs = all_source_runs(s);
  for_each_row(s.patch_planes(), s.n, s.m, [&](int64_t plane, int64_t r) {
    const int64_t p = plane % s.patches;
    T* out = grids + (plane * s.n + r) * s.m;
    std::fill(out, out + s.m, T(0));
    if (r >= s.boxes[p].height) return;
    const int64_t y = patch_source(s.boxes[p].top + r, h, s.blur.boundary);
    const T* in = image + (plane / s.patches * h + y) * w;
    const T* weight = weights + (p * h + y) * w;
    for (const Run& run : runs[p])
      along(run, [&](int64_t i, int64_t x) { out[i] = weight[x] * in[x]; });
  });
}

template <class T>
void add_source_cpu(const VaryingShape& s, const T* weights, const T* grids, T* image) {
  const int64_t h = s.blur.height, w = s.blur.width;
  const auto runs = all_source_runs(s);
  // Which rows of which boxes an image row collects.
  std::vector<std::vector<std::pair<int64_t, int64_t>>> sources(h);
  for (int64_t p = 0; p < s.patches; ++p)
    for (int64_t r = 0; r < s.boxes[p].height; ++r)
      sources[patch_source(s.boxes[p].top + r, h, s.blur.boundary)].emplace_back(p, r);
  for_each_row(s.blur.planes(), h, w, [&](int64_t plane, int64_t y) {
    T* out = image + (plane * h + y) * w;
    std::fill(out, out + w, T(0));
    for (const auto& [p, r] : sources[y]) {
      const T* in = grids + ((plane * s.patches + p) * s.n + r) * s.m;
      const T* weight = weights + (p * h + y) * w;
      for (const Run& run : runs[p])
        along(run, [&](int64_t i, int64_t x) { out[x] += weight[x] * in[i]; });
    }
  });
}

template <class T>
void add_target_cpu(const VaryingShape& s, const T* grids, T* output) {
  const int64_t h = s.blur.output_height(), w = s.blur.output_width();
  const int64_t shift = patch_shift(s.blur.kernel_height, s.blur.boundary);
  const auto runs = all_target_runs(s);
  std::vector<std::vector<std::pair<int64_t, int64_t>>> sources(h);
  for (int64_t p = 0; p < s.patches; ++p)
    for (int64_t r = 0; r < s.filled_rows(p); ++r) {
      const int64_t y = patch_target(s.boxes[p].top + r - shift, h, s.blur.boundary);
      if (y >= 0) sources[y].emplace_back(p, r);
    }
  for_each_row(s.blur.planes(), h, w, [&](int64_t plane, int64_t y) {
    T* out = output + (plane * h + y) * w;
    std::fill(out, out + w, T(0));
    for (const auto& [p, r] : sources[y]) {
      const T* in = grids + ((plane * s.patches + p) * s.n + r) * s.m;
      for (const Run& run : runs[p])
        for (int64_t i = 0; i < run.size; ++i) out[run.image + i] += in[run.box + i];
    }
  });
}

template <class T>
void cut_target_cpu(const VaryingShape& s, const T* output, T* grids) {
  const int64_t h = s.blur.output_height(), w = s.blur.output_width();
  const int64_t shift = patch_shift(s.blur.kernel_height, s.blur.boundary);
  const auto runs = all_target_runs(s);
  for_each_row(s.patch_planes(), s.n, s.m, [&](int64_t plane, int64_t r) {
    const int64_t p = plane % s.patches;
    T* out = grids + (plane * s.n + r) * s.m;
    std::fill(out, out + s.m, T(0));
    if (r >= s.filled_rows(p)) return;
    const int64_t y = patch_target(s.boxes[p].top + r - shift, h, s.blur.boundary);
    if (y < 0) return;
    const T* in = output + (plane / s.patches * h + y) * w;
    for (const Run& run : runs[p])
      std::copy(in + run.image, in + run.image + run.size, out + run.box);
  });
}

template <class T>
void patch_multiply_cpu(const VaryingShape& s, const Complex<T>* kernel, bool conjugate,
                        Complex<T>* spectra) {
  const int64_t columns = s.m / 2 + 1;
  for_each_row(s.patch_planes(), s.n, columns, [&](int64_t plane, int64_t y) {
    const Complex<T>* k = kernel + (s.kernel_index(plane) * s.n + y) * columns;
    Complex<T>* out = spectra + (plane * s.n + y) * columns;
    if (conjugate) {
      for (int64_t x = 0; x < columns; ++x) out[x] = multiply_conj(k[x], out[x]);
    } else {
      for (int64_t x = 0; x < columns; ++x) out[x] = multiply(k[x], out[x]);
    }
  });
}

template <class T>
void patch_gradients_cpu(const VaryingShape& s, const PatchGradientParams<T>& p) {
  const int64_t columns = s.m / 2 + 1;
  const int64_t shared = s.kernel_batch == 1 ? s.blur.planes() : s.blur.channels;
  for_each_row(s.kernel_batch * s.patches, s.n, columns * shared, [&](int64_t index, int64_t y) {
    const int64_t offset = (index * s.n + y) * columns;
    const Complex<T>* k = p.kernel ? p.kernel + offset : nullptr;
    Complex<T>* total = p.grad_kernel + offset;
    std::fill(total, total + columns, Complex<T>{0, 0});
    const int64_t first = index / s.patches * s.blur.channels;
    for (int64_t plane = first; plane < first + shared; ++plane) {
      const int64_t at = ((plane * s.patches + index % s.patches) * s.n + y) * columns;
      for (int64_t x = 0; x < columns; ++x) {
        const Complex<T> r = p.residual[at + x];
        const Complex<T> c = multiply_conj(p.image[at + x], r);
        total[x].re += c.re;
        total[x].im += c.im;
        if (k != nullptr) p.residual[at + x] = multiply_conj(k[x], r);
      }
    }
  });
}

#define LATENTDEM_INSTANTIATE(T)                                                                  \
  template void find_boxes_cpu<T>(const BlurShape&, int64_t, const T*, PatchBox*);                \
  template void cut_source_cpu<T>(const VaryingShape&, const T*, const T*, T*);                   \
  template void add_source_cpu<T>(const VaryingShape&, const T*, const T*, T*);                   \
  template void add_target_cpu<T>(const VaryingShape&, const T*, T*);                             \
  template void cut_target_cpu<T>(const VaryingShape&, const T*, T*);                             \
  template void patch_multiply_cpu<T>(const VaryingShape&, const Complex<T>*, bool, Complex<T>*); \
  template void patch_gradients_cpu<T>(const VaryingShape&, const PatchGradientParams<T>&);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
