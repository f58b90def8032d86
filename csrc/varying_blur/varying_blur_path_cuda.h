// Direct convolution or FFTs on a GPU for spatially varying blur; the model is that of
// blur_path_cuda.h.
#pragma once

#include <algorithm>

#include "blur/blur_path_cuda.h"
#include "varying_blur/varying_blur_cuda.h"

namespace latentdem {

// Windows that cross-fade in both directions overlap fourfold at most; more patches are taken to
// have no weight in most tiles, which the host can't see.
inline constexpr int64_t kOverlap = 4;

// Bytes per pixel of loss and both gradients, operations counted as bytes.
inline double varying_direct_cost(const PatchShape& s) {
  const double taps = static_cast<double>(s.blur.kernel_height * s.blur.kernel_width);
  const double active = static_cast<double>(std::min(s.patches, kOverlap));
  return 6 * 4 + active * 3 * 2 * taps / (kDirectShare * kOperationsPerByte);
}

inline double varying_spectral_cost(const PatchShape& s, const SpectralGrid& g) {
  // Each patch: cut, transform, sum, gradients, transform, fold. Once: prediction, residual.
  const double each = 8 + 16 + 4 + 8 + 16 + 4, once = 4 + 16 + 12 + 16 + 8;
  return (each * static_cast<double>(s.patches) + once) * static_cast<double>(g.n * g.m) /
         static_cast<double>(s.blur.height * s.blur.width);
}

inline bool prefer_direct(const PatchShape& s, const SpectralGrid& g) {
  return s.blur.kernel_height <= kDirectSide && s.blur.kernel_width <= kDirectSide &&
         varying_direct_cost(s) <= varying_spectral_cost(s, g);
}

}  // namespace latentdem
