// Argument checks of the torch glue: each names the argument, the rule and what was found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>

namespace latentdem {

inline void check_rank(const at::Tensor& t, int64_t rank, const char* name, const char* shape) {
  TORCH_CHECK_VALUE(t.dim() == rank, name, " must have shape ", shape, ", found ", t.sizes());
}

inline void check_real(const at::Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, name,
      " must be float32, float64, float16 or bfloat16, found ", type);
}

inline void check_same_device(const at::Tensor& t, const at::Tensor& like, const char* name,
                              const char* like_name) {
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on the device of ", like_name,
                    " (", like.device(), "), found ", t.device());
}

// The dtype that arithmetic runs in: double if any operand is double, else float.
inline at::ScalarType compute_type(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kDouble || b.scalar_type() == at::kDouble ? at::kDouble
                                                                          : at::kFloat;
}

}  // namespace latentdem
