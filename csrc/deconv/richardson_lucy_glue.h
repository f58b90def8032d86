// What the glue of Richardson-Lucy on CPU and CUDA shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "blur/blur_glue.h"
#include "common/checks.h"

namespace latentdem {

// Below this weight (one is that of a pixel inside, if the kernel sums to one) a pixel counts as
// not observed; rounding of the transforms is far below, even in float32.
inline constexpr double kUnobserved = 1e-2;

// Shapes, dtypes and options; not the values of the tensors.
inline BlurShape check_lucy(const at::Tensor& observation, const at::Tensor& kernel,
                            const at::Tensor& initial, const std::optional<at::Tensor>& mask,
                            std::string_view boundary, int64_t iterations, double total_variation,
                            double eps) {
  check_inputs(initial, kernel, "initial");
  const auto s = make_shape(initial.sizes(), kernel.sizes(), boundary);
  check_observation(s, initial, observation, mask);
  TORCH_CHECK_VALUE(iterations >= 0, "iterations must be non-negative, found ", iterations);
  TORCH_CHECK_VALUE(total_variation >= 0 && total_variation <= 0.25,
                    "total_variation must be in [0, 0.25], found ", total_variation);
  TORCH_CHECK_VALUE(eps > 0, "eps must be positive, found ", eps);
  return s;
}

}  // namespace latentdem
