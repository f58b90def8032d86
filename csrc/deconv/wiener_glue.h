// What the glue of the Wiener step on CPU and CUDA shares: checks, and how the ratio lies.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "blur/blur_glue.h"
#include "common/checks.h"

namespace latentdem {

struct WienerInputs {
  const at::Tensor& estimate;
  const at::Tensor& observation;
  const at::Tensor& kernel;
  const at::Tensor& ratio;
  const std::optional<at::Tensor>& mask;
  int64_t passes;
};

inline BlurShape check_wiener(const WienerInputs& in) {
  check_inputs(in.estimate, in.kernel, "image_hat");
  const auto s = make_shape(in.estimate.sizes(), in.kernel.sizes(), "circular");
  check_rank(in.observation, 4, "observation", "[B|1,C,H,W]");
  check_real(in.observation, "observation");
  check_same_device(in.observation, in.estimate, "observation", "image_hat");
  TORCH_CHECK_VALUE(in.observation.sizes().slice(1) == in.estimate.sizes().slice(1) &&
                        (in.observation.size(0) == 1 || in.observation.size(0) == s.batch),
                    "observation must have shape [B|1,C,H,W] with image_hat's sizes (",
                    in.estimate.sizes(), "), found ", in.observation.sizes());
  check_real(in.ratio, "ratio");
  check_same_device(in.ratio, in.estimate, "ratio", "image_hat");
  const auto& r = in.ratio;
  const bool per_bin = r.dim() == 4 && (r.size(0) == 1 || r.size(0) == s.batch) &&
                       (r.size(1) == 1 || r.size(1) == s.channels) && r.size(2) == s.height &&
                       r.size(3) == s.width / 2 + 1;
  TORCH_CHECK_VALUE(r.dim() == 0 || (r.dim() == 1 && r.size(0) == s.batch) || per_bin,
                    "ratio must be a scalar, [B] or [B|1,C|1,H,W//2+1] for image_hat (",
                    in.estimate.sizes(), "), found ", r.sizes());
  TORCH_CHECK_VALUE(in.passes >= 1, "passes must be at least 1, found ", in.passes);
  if (!in.mask.has_value()) return s;
  check_real(*in.mask, "mask");
  check_same_device(*in.mask, in.estimate, "mask", "image_hat");
  const auto& m = *in.mask;
  TORCH_CHECK_VALUE(m.dim() == 4 && (m.size(0) == 1 || m.size(0) == s.batch) && m.size(1) == 1 &&
                        m.size(2) == s.height && m.size(3) == s.width,
                    "mask must have shape [B|1,1,H,W] with image_hat's sizes (",
                    in.estimate.sizes(), "), found ", m.sizes());
  return s;
}

// Strides of the ratio in elements, zero where one value serves a whole dimension.
template <class Params>
void set_ratio_strides(Params& p, const at::Tensor& ratio, const SpectralGrid& g) {
  if (ratio.dim() == 1) p.ratio_stride_b = 1;
  if (ratio.dim() == 4) {
    p.ratio_stride_bin = 1;
    p.ratio_stride_c = ratio.size(1) == 1 ? 0 : g.bins();
    p.ratio_stride_b = ratio.size(0) == 1 ? 0 : ratio.size(1) * g.bins();
  }
}

}  // namespace latentdem
