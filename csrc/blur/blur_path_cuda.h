// Direct convolution or FFTs on a GPU: a model from bytes, operations and datasheets.
#pragma once

#include "blur/blur.h"

namespace latentdem {

// NVIDIA A100 80 GB SXM (datasheet): 2039 GB/s, 19.5 TFLOP/s in float32. The H100's ratio is twice
// as large and would prefer the direct path longer; one table for all keeps results the same.
inline constexpr double kOperationsPerByte = 19.5e12 / 2039e9;
// Of the peak; two operands from shared memory for four multiply-adds, and the halo's waste.
inline constexpr double kDirectShare = 0.3;
// Longest side: tile and halo of image and residual must fit in shared memory.
inline constexpr int64_t kDirectSide = 32;

// Bytes per pixel of loss and both gradients in float32, with operations counted as the bytes
// that could be moved meanwhile. In double both sides double.
inline double direct_cost(const BlurShape& s) {
  const double taps = static_cast<double>(s.kernel_height * s.kernel_width);
  // Read x, y, write r; read r, x, write the gradient.
  return 6 * 4 + 3 * 2 * taps / (kDirectShare * kOperationsPerByte);
}

// A transform reads and writes its plane twice, once per dimension: 16 bytes a pixel.
inline double spectral_cost(const BlurShape& s, const SpectralGrid& g, bool in_place) {
  // X, Y, the gradient; one pointwise pass.
  if (in_place) return 3 * 16 + 3 * 4;
  // Extension, X, K X, prediction, residual, R, pointwise, gradient, fold.
  const double bytes = 8 + 16 + 8 + 16 + 12 + 16 + 12 + 16 + 8;
  return bytes * static_cast<double>(g.n * g.m) / static_cast<double>(s.height * s.width);
}

inline bool prefer_direct(const BlurShape& s, const SpectralGrid& g, bool in_place) {
  return s.kernel_height <= kDirectSide && s.kernel_width <= kDirectSide &&
         direct_cost(s) <= spectral_cost(s, g, in_place);
}

}  // namespace latentdem
