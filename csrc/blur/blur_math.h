// Index arithmetic of the blur operators, shared by the CPU and the CUDA kernels.
//
// A blur is "extend the image beyond its border, then convolve and keep the valid part":
//   out[y] = sum_i kernel[i] * extended[y + kh - 1 - i]
// with kh - 1 - kh / 2 extra rows above and kh / 2 below, so that the kernel's centre is
// at kh / 2 (integer division, hence (2, 2) for 4 x 4 and 5 x 5).
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace latentdem {

enum class Boundary : int { kCircular = 0, kReflect = 1, kReplicate = 2, kZero = 3, kValid = 4 };

LATENTDEM_HD int64_t extension_before(int64_t kernel_size) {
  return kernel_size - 1 - kernel_size / 2;
}

// Where row (or column) `i`, possibly outside [0, n), takes its value from; -1 is a zero.
// Needs -n < i < 2n - 1, which holds as long as the kernel is no larger than the image.
LATENTDEM_HD int64_t source_index(int64_t i, int64_t n, Boundary boundary) {
  if (i >= 0 && i < n) return i;
  switch (boundary) {
    case Boundary::kCircular:
      return i < 0 ? i + n : i - n;
    case Boundary::kReflect:
      return i < 0 ? -i : 2 * (n - 1) - i;
    case Boundary::kReplicate:
      return i < 0 ? 0 : n - 1;
    default:
      return -1;
  }
}

// The extended rows (or columns) that take their value from row `i` of n: the transpose of
// source_index, of which every index has at most one main term and two runs of others.
struct Preimages {
  int64_t main;
  int64_t first[2], count[2];

  LATENTDEM_HD int64_t size() const { return 1 + count[0] + count[1]; }
  LATENTDEM_HD int64_t operator[](int64_t t) const {
    if (t == 0) return main;
    return t <= count[0] ? first[0] + t - 1 : first[1] + t - 1 - count[0];
  }
};

LATENTDEM_HD Preimages preimages(int64_t i, int64_t n, int64_t kernel_size, Boundary boundary) {
  if (boundary == Boundary::kValid) return {i, {0, 0}, {0, 0}};
  const int64_t before = extension_before(kernel_size), extended = n + kernel_size - 1;
  Preimages p{i + before, {0, 0}, {0, 0}};
  switch (boundary) {
    case Boundary::kCircular:
      p.first[0] = i + before - n;
      p.first[1] = i + before + n;
      p.count[0] = p.first[0] >= 0;
      p.count[1] = p.first[1] < extended;
      break;
    case Boundary::kReflect:
      p.first[0] = before - i;
      p.first[1] = before + 2 * (n - 1) - i;
      p.count[0] = i >= 1 && p.first[0] >= 0;
      p.count[1] = i <= n - 2 && p.first[1] < extended;
      break;
    case Boundary::kReplicate:
      p.first[0] = 0;
      p.first[1] = before + n;
      p.count[0] = i == 0 ? before : 0;
      p.count[1] = i == n - 1 ? kernel_size / 2 : 0;
      break;
    default:
      break;
  }
  return p;
}

// How often a bin of a half spectrum of width `width` stands in the full one.
LATENTDEM_HD int spectrum_weight(int64_t column, int64_t width) {
  return column == 0 || 2 * column == width ? 1 : 2;
}

}  // namespace latentdem
