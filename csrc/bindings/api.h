// The C++ operators, as the dispatcher and pybind11 see them. Shapes as in latentdem_ext/ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace latentdem {

at::Tensor blur_conv2d(const at::Tensor& image, const at::Tensor& kernel,
                       std::string_view boundary);

at::Tensor blur_conv2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                               std::string_view boundary, at::IntArrayRef image_size);

// The transpose of blur_conv2d in the kernel; kernel_size is the kernel's full shape.
at::Tensor blur_conv2d_kernel(const at::Tensor& image, const at::Tensor& residual,
                              std::string_view boundary, at::IntArrayRef kernel_size);

// Every factor-th row and column of blur_conv2d, and the adjoint in the image.
at::Tensor blur_downsample2d(const at::Tensor& image, const at::Tensor& kernel,
                             std::string_view boundary, int64_t factor);
at::Tensor blur_downsample2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                                     std::string_view boundary, int64_t factor,
                                     at::IntArrayRef image_size);

at::Tensor blur_data_term(const at::Tensor& image, const at::Tensor& kernel,
                          const at::Tensor& observation, const std::optional<at::Tensor>& mask,
                          std::string_view boundary);

std::tuple<at::Tensor, at::Tensor, at::Tensor> blur_gradients(const at::Tensor& image,
                                                              const at::Tensor& kernel,
                                                              const at::Tensor& observation,
                                                              const std::optional<at::Tensor>& mask,
                                                              std::string_view boundary);

// Autocorrelation lags [B,2kh-1,2kw-1] of the image and cross-correlation [B,kh,kw] with the
// observation, pooled over channels (and over both gradient directions in that domain).
std::tuple<at::Tensor, at::Tensor> kernel_map_statistics(
    const at::Tensor& image, const at::Tensor& observation, const std::optional<at::Tensor>& window,
    at::IntArrayRef kernel_size, std::string_view domain, double image_variance,
    const std::optional<at::Tensor>& prepared);

// What kernel_map_statistics and kernel_map_update would otherwise transform anew: the
// observation's spectra, opaque, [B,F,S]; S is 0 where the image's size is no good transform size.
at::Tensor kernel_map_prepare(const at::Tensor& observation,
                              const std::optional<at::Tensor>& window, at::IntArrayRef kernel_size,
                              std::string_view domain);

// argmin_k 1/2 k'(A + alpha I)k - (b + alpha z)'k on the support, by conjugate gradients.
at::Tensor kernel_map_solve(const at::Tensor& autocorrelation, const at::Tensor& crosscorrelation,
                            const at::Tensor& target, const at::Tensor& start, double alpha,
                            int64_t steps);

at::Tensor kernel_map_update(const at::Tensor& image, const at::Tensor& observation,
                             const at::Tensor& kernel, const std::optional<at::Tensor>& window,
                             double noise_std, double penalty, double regularization,
                             int64_t iterations, std::string_view prior, std::string_view domain,
                             bool support_exact, double image_variance, int64_t solver_steps,
                             const std::optional<at::Tensor>& prepared);

at::Tensor project_simplex(const at::Tensor& kernel);
at::Tensor recenter_kernel(const at::Tensor& kernel, bool subpixel);

// argmin_x |k * x - y|^2 + ratio |x - image_hat|^2 on a periodic canvas.
at::Tensor wiener_deconv2d(const at::Tensor& image_hat, const at::Tensor& observation,
                           const at::Tensor& kernel, const at::Tensor& ratio,
                           const std::optional<at::Tensor>& mask, int64_t passes);

// Its gradients in image_hat, observation [B,C,H,W], kernel, and the ratio of every bin of every
// plane [B,C,H,W/2+1]; those not needed are empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wiener_deconv2d_backward(
    const at::Tensor& grad, const at::Tensor& image_hat, const at::Tensor& observation,
    const at::Tensor& kernel, const at::Tensor& ratio, const std::optional<at::Tensor>& mask,
    int64_t passes, bool need_observation, bool need_kernel, bool need_ratio);

at::Tensor richardson_lucy(const at::Tensor& observation, const at::Tensor& kernel,
                           const at::Tensor& initial, const std::optional<at::Tensor>& mask,
                           std::string_view boundary, int64_t iterations, double total_variation,
                           double eps);

// sum_p k_p * (w_p x), its adjoint, its transpose in the kernels [B|1,P,kh,kw], and the gradients
// of its squared error.
at::Tensor varying_blur2d(const at::Tensor& image, const at::Tensor& kernels,
                          const at::Tensor& weights, std::string_view boundary);
at::Tensor varying_blur2d_adjoint(const at::Tensor& residual, const at::Tensor& kernels,
                                  const at::Tensor& weights, std::string_view boundary);
at::Tensor varying_blur2d_kernels(const at::Tensor& image, const at::Tensor& residual,
                                  const at::Tensor& weights, std::string_view boundary,
                                  at::IntArrayRef kernels_size);
std::tuple<at::Tensor, at::Tensor, at::Tensor> varying_blur_gradients(
    const at::Tensor& image, const at::Tensor& kernels, const at::Tensor& weights,
    const at::Tensor& observation, const std::optional<at::Tensor>& mask,
    std::string_view boundary);

// color [N,3,h,w], opacity [N,1,h,w], depth [N,1,h,w]
std::tuple<at::Tensor, at::Tensor, at::Tensor> volume_render(
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, at::IntArrayRef image_size, double near, double far,
    int64_t samples_per_ray, std::optional<double> early_stop_eps);

// Gradients in density, color, camera_to_world and intrinsics; empty where not needed.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> volume_render_backward(
    const at::Tensor& grad_color, const at::Tensor& grad_opacity, const at::Tensor& grad_depth,
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, double near, double far, int64_t samples_per_ray,
    std::optional<double> early_stop_eps, bool need_density, bool need_color, bool need_cameras);

}  // namespace latentdem
