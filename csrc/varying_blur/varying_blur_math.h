// Index arithmetic of spatially varying blur, shared by the CPU and the CUDA kernels.
//
// Patch p convolves the box of its weights with its kernel on a small grid: grid row r holds
// source row top + r, and after the convolution the blurred row top + r - shift.
#pragma once

#include <cstdint>

#include "blur/blur_math.h"
#include "common/macros.h"
#include "common/wrap.h"

namespace latentdem {

// Bounding box of a patch's weights, in pixels of the image. It may reach into the extension
// beyond the border, or around it if the boundary is circular (top + height > H).
struct PatchBox {
  int64_t top, left, height, width;
};

// The image row (or column) behind source row `i` of a box.
LATENTDEM_HD int64_t patch_source(int64_t i, int64_t n, Boundary boundary) {
  return boundary == Boundary::kCircular ? wrap_index(i, n) : source_index(i, n, boundary);
}

// How far the blurred row of a grid row lies before its source row.
LATENTDEM_HD int64_t patch_shift(int64_t kernel_size, Boundary boundary) {
  return boundary == Boundary::kValid ? kernel_size - 1 : kernel_size / 2;
}

// The blurred row (or column) `i` of a grid, or -1 if it lies outside the result of size n.
LATENTDEM_HD int64_t patch_target(int64_t i, int64_t n, Boundary boundary) {
  if (boundary == Boundary::kCircular) return wrap_index(i, n);
  return i >= 0 && i < n ? i : -1;
}

}  // namespace latentdem
