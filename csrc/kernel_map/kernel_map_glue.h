// Tensor-level steps of the kernel estimate that the CPU's and the CUDA path share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/fft_irfft2.h>
#include <ATen/ops/fft_rfft2.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "common/checks.h"
#include "common/fft_size.h"
#include "kernel_map/kernel_map.h"

namespace latentdem {

inline bool parse_domain(std::string_view domain) {
  TORCH_CHECK_VALUE(domain == "image" || domain == "gradient",
                    "domain must be image or gradient, found '", std::string(domain), "'");
  return domain == "gradient";
}

inline KernelPrior parse_prior(std::string_view prior) {
  if (prior == "none") return KernelPrior::kNone;
  if (prior == "l1") return KernelPrior::kL1;
  TORCH_CHECK_VALUE(prior == "l2", "prior must be none, l1, l2 or a callable, found '",
                    std::string(prior), "'");
  return KernelPrior::kL2;
}

inline void check_images(const at::Tensor& image, const at::Tensor& observation,
                         const std::optional<at::Tensor>& window, at::IntArrayRef kernel_size) {
  check_rank(image, 4, "image", "[B,C,H,W]");
  check_real(image, "image");
  check_real(observation, "observation");
  check_same_device(observation, image, "observation", "image");
  TORCH_CHECK_VALUE(observation.sizes() == image.sizes(),
                    "observation must have the shape of image ", image.sizes(), ", found ",
                    observation.sizes());
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0,
                    "kernel_size must be two positive sizes, found ", kernel_size);
  TORCH_CHECK_VALUE(kernel_size[0] <= image.size(2) && kernel_size[1] <= image.size(3),
                    "kernel must be no larger than image and observation (", image.size(2), " x ",
                    image.size(3), "), found ", kernel_size);
  if (!window.has_value()) return;
  check_real(*window, "window");
  check_same_device(*window, image, "window", "image");
  TORCH_CHECK_VALUE(window->dim() == 4 && window->size(1) == 1 &&
                        (window->size(0) == 1 || window->size(0) == image.size(0)) &&
                        window->size(2) == image.size(2) && window->size(3) == image.size(3),
                    "window must have shape [B|1,1,H,W] with image's H and W (", image.size(2),
                    " x ", image.size(3), "), found ", window->sizes());
}

inline void check_variance(double image_variance) {
  TORCH_CHECK_VALUE(image_variance >= 0 && std::isfinite(image_variance),
                    "image_variance must be finite and not negative, found ", image_variance);
}

inline void check_solve(const at::Tensor& autocorrelation, const at::Tensor& crosscorrelation,
                        const at::Tensor& target, const at::Tensor& start, double alpha,
                        int64_t steps) {
  check_rank(crosscorrelation, 3, "crosscorrelation", "[B,kh,kw]");
  check_real(crosscorrelation, "crosscorrelation");
  const int64_t batch = crosscorrelation.size(0);
  const int64_t kh = crosscorrelation.size(1), kw = crosscorrelation.size(2);
  const std::array<int64_t, 3> lags{batch, 2 * kh - 1, 2 * kw - 1};
  TORCH_CHECK_VALUE(autocorrelation.sizes() == at::IntArrayRef(lags),
                    "autocorrelation must have shape [B,2kh-1,2kw-1] ", at::IntArrayRef(lags),
                    ", found ", autocorrelation.sizes());
  TORCH_CHECK_VALUE(
      target.sizes() == crosscorrelation.sizes() && start.sizes() == crosscorrelation.sizes(),
      "target and start must have the shape of crosscorrelation ", crosscorrelation.sizes(),
      ", found ", target.sizes(), " and ", start.sizes());
  check_same_device(autocorrelation, crosscorrelation, "autocorrelation", "crosscorrelation");
  check_same_device(target, crosscorrelation, "target", "crosscorrelation");
  check_same_device(start, crosscorrelation, "start", "crosscorrelation");
  TORCH_CHECK_VALUE(alpha >= 0 && std::isfinite(alpha),
                    "alpha must be finite and not negative, found ", alpha);
  TORCH_CHECK_VALUE(steps >= 0, "steps must not be negative, found ", steps);
}

inline void check_update(const at::Tensor& image, const at::Tensor& observation,
                         const at::Tensor& kernel, const std::optional<at::Tensor>& window,
                         double noise_std, double penalty, double regularization,
                         int64_t iterations, double image_variance, int64_t solver_steps) {
  check_rank(kernel, 4, "kernel", "[B,1,kh,kw]");
  check_real(kernel, "kernel");
  check_images(image, observation, window, kernel.sizes().slice(2));
  check_same_device(kernel, image, "kernel", "image");
  TORCH_CHECK_VALUE(kernel.size(0) == image.size(0) && kernel.size(1) == 1,
                    "kernel must have shape [B,1,kh,kw] with image's batch (", image.size(0),
                    "), found ", kernel.sizes());
  TORCH_CHECK_VALUE(noise_std > 0 && std::isfinite(noise_std),
                    "noise_std must be positive and finite, found ", noise_std);
  TORCH_CHECK_VALUE(penalty > 0 && std::isfinite(penalty),
                    "penalty must be positive and finite, found ", penalty);
  TORCH_CHECK_VALUE(regularization >= 0 && std::isfinite(regularization),
                    "regularization must be finite and not negative, found ", regularization);
  TORCH_CHECK_VALUE(iterations > 0, "iterations must be positive, found ", iterations);
  check_variance(image_variance);
  TORCH_CHECK_VALUE(solver_steps > 0, "solver_steps must be positive, found ", solver_steps);
}

inline void check_planes(const at::Tensor& kernel) {
  check_real(kernel, "kernel");
  TORCH_CHECK_VALUE(kernel.dim() >= 2, "kernel must have shape [...,kh,kw], found ",
                    kernel.sizes());
}

inline at::Tensor forward_fft(const at::Tensor& t, int64_t n, int64_t m) {
  return at::fft_rfft2(t, std::array<int64_t, 2>{n, m}).contiguous();
}

inline at::Tensor inverse_fft(const at::Tensor& t, int64_t n, int64_t m) {
  return at::fft_irfft2(t, std::array<int64_t, 2>{n, m}).contiguous();
}

// The transforms' grid: a window means that the fields end at the border, so that they are
// correlated without wrapping round.
inline std::array<int64_t, 2> grid_size(const FieldShape& s, bool linear, int64_t kh, int64_t kw) {
  if (!linear) return {s.height, s.width};
  return {next_fft_size(s.height + kh - 1), next_fft_size(s.width + kw - 1)};
}

inline FieldShape field_shape(const at::Tensor& image, const at::Tensor& window, bool gradient) {
  FieldShape s{image.size(0), image.size(1), image.size(2), image.size(3), gradient, 0};
  s.window_stride_b = window.defined() && window.size(0) > 1 ? 1 : 0;
  return s;
}

}  // namespace latentdem
