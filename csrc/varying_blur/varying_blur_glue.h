// Checks that the glue of spatially varying blur on CPU and CUDA shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>

#include "blur/blur_glue.h"
#include "common/checks.h"

namespace latentdem {

// The shape of the blur that every patch undergoes.
inline BlurShape check_patches(at::IntArrayRef image, at::IntArrayRef kernels,
                               const at::Tensor& weights, std::string_view boundary) {
  TORCH_CHECK_VALUE(kernels.size() == 4, "kernels must have shape [B|1,P,kh,kw], found ", kernels);
  TORCH_CHECK_VALUE(kernels[1] > 0 && kernels[2] > 0 && kernels[3] > 0,
                    "kernels must not be empty, found ", kernels);
  TORCH_CHECK_VALUE(kernels[0] == 1 || kernels[0] == image[0],
                    "kernels must have batch size 1 or that of image (", image[0], "), found ",
                    kernels[0]);
  TORCH_CHECK_VALUE(kernels[2] <= image[2] && kernels[3] <= image[3],
                    "kernels must be no larger than image (", image[2], " x ", image[3],
                    "), found ", kernels[2], " x ", kernels[3]);
  TORCH_CHECK_VALUE(weights.dim() == 3 && weights.size(0) == kernels[1] &&
                        weights.size(1) == image[2] && weights.size(2) == image[3],
                    "weights must have shape [P,H,W] = (", kernels[1], ", ", image[2], ", ",
                    image[3], "), found ", weights.sizes());
  const std::array<int64_t, 4> one{1, 1, kernels[2], kernels[3]};
  return make_shape(image, one, boundary);
}

inline void check_tensors(const at::Tensor& image, const char* name, const at::Tensor& kernels,
                          const at::Tensor& weights) {
  check_rank(image, 4, name, "[B,C,H,W]");
  check_real(image, name);
  check_real(kernels, "kernels");
  check_real(weights, "weights");
  check_same_device(kernels, image, "kernels", name);
  check_same_device(weights, image, "weights", name);
}

// [B,C,H,W] from residual [B,C,H',W'] and weights [P,H,W].
inline std::array<int64_t, 4> unblurred_size(const at::Tensor& residual,
                                             const at::Tensor& weights) {
  check_rank(weights, 3, "weights", "[P,H,W]");
  return {residual.size(0), residual.size(1), weights.size(1), weights.size(2)};
}

inline void check_blurred(const BlurShape& s, const at::Tensor& residual) {
  const auto size = output_size(s);
  check_residual(residual, size, "blurred image");
}

}  // namespace latentdem
