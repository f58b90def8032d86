// Tensor-level steps of blur with downsampling that its CPU and CUDA glue share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "blur/blur_glue.h"
#include "blur/downsample.h"

namespace latentdem {

inline DownsampleShape make_downsample(const BlurShape& s, int64_t factor) {
  TORCH_CHECK_VALUE(factor >= 1, "factor must be at least 1, found ", factor);
  return {s, factor};
}

inline std::array<int64_t, 4> small_size(const DownsampleShape& s) {
  return {s.blur.batch, s.blur.channels, s.height(), s.width()};
}

// Each output pixel costs taps, and there are fewer of them.
inline bool use_strided(const DownsampleShape& s) {
  return s.blur.kernel_height * s.blur.kernel_width <= kDirectTaps * s.factor * s.factor;
}

// The pixels of a blurred image that stay.
inline at::Tensor pick(const at::Tensor& blurred, int64_t factor) {
  return blurred.slice(2, 0, blurred.size(2), factor).slice(3, 0, blurred.size(3), factor);
}

}  // namespace latentdem
