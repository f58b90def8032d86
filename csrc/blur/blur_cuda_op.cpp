// Torch glue of the blur operators on CUDA: checks and dtype; the steps are in blur_cuda_glue.h.
// Compiled for the emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda_glue.h"
#include "common/checks.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "common/strided_glue.h"

namespace latentdem {
namespace cuda {

at::Tensor blur_conv2d(const at::Tensor& image, const at::Tensor& kernel,
                       std::string_view boundary) {
  const DeviceScope scope(image);
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  if (s.planes() == 0) return at::zeros(output_size(s), image.options());
  const auto type = compute_type(image, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s, image.options().dtype(type), scope.stream());
    return as_image(blur.forward(prepare(image, type), prepare(kernel, type)), image);
  });
}

at::Tensor blur_conv2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                               std::string_view boundary, at::IntArrayRef image_size) {
  const DeviceScope scope(residual);
  check_inputs(residual, kernel, "residual");
  const auto full = adjoint_size(residual, image_size);
  const auto s = make_shape(full, kernel.sizes(), boundary);
  const auto size = output_size(s);
  check_residual(residual, size, "blurred image");
  if (s.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s, residual.options().dtype(type), scope.stream());
    return as_image(blur.adjoint(prepare(residual, type), prepare(kernel, type)), residual);
  });
}

at::Tensor blur_conv2d_kernel(const at::Tensor& image, const at::Tensor& residual,
                              std::string_view boundary, at::IntArrayRef kernel_size) {
  const DeviceScope scope(image);
  check_rank(image, 4, "image", "[B,C,H,W]");
  check_real(image, "image");
  const auto s = make_shape(image.sizes(), kernel_size, boundary);
  check_observation(s, image, residual, std::nullopt);
  if (s.planes() == 0) return at::zeros(kernel_size, image.options());
  const auto type = compute_type(image, residual);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s, image.options().dtype(type), scope.stream());
    return blur.kernel_adjoint(prepare(image, type), prepare(residual, type))
        .to(image.scalar_type());
  });
}

at::Tensor blur_data_term(const at::Tensor& image, const at::Tensor& kernel,
                          const at::Tensor& observation, const std::optional<at::Tensor>& mask,
                          std::string_view boundary) {
  const DeviceScope scope(image);
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  check_observation(s, image, observation, mask);
  const auto type = compute_type(image, kernel);
  if (s.planes() == 0) return at::zeros({s.batch}, image.options().dtype(type));
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s, image.options().dtype(type), scope.stream());
    return blur.data_term(prepare(image, type), prepare(kernel, type), prepare(observation, type),
                          mask ? prepare(*mask, type) : at::Tensor());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> blur_gradients(const at::Tensor& image,
                                                              const at::Tensor& kernel,
                                                              const at::Tensor& observation,
                                                              const std::optional<at::Tensor>& mask,
                                                              std::string_view boundary) {
  const DeviceScope scope(image);
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  check_observation(s, image, observation, mask);
  const auto type = compute_type(image, kernel);
  if (s.planes() == 0)
    return {at::zeros({s.batch}, image.options().dtype(type)),
            at::zeros(image.sizes(), image.options()), at::zeros(kernel.sizes(), kernel.options())};
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s, image.options().dtype(type), scope.stream());
    auto [loss, grad_image, grad_kernel] =
        blur.gradients(prepare(image, type), prepare(kernel, type), prepare(observation, type),
                       mask ? prepare(*mask, type) : at::Tensor());
    return std::make_tuple(loss, as_image(grad_image, image), grad_kernel.to(kernel.scalar_type()));
  });
}

}  // namespace cuda
}  // namespace latentdem
