// Torch glue of the blur operators: checks, layout and dtype; the steps are in blur_glue.h.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <string>

#include "bindings/api.h"
#include "blur/blur_glue.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace latentdem {

at::Tensor blur_conv2d(const at::Tensor& image, const at::Tensor& kernel,
                       std::string_view boundary) {
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  if (s.planes() == 0) return at::zeros(output_size(s), image.options());
  const auto type = compute_type(image, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s, image.options().dtype(type), format_of(image)};
    return blur.forward(image.to(type), prepare(kernel, type)).to(image.scalar_type());
  });
}

at::Tensor blur_conv2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                               std::string_view boundary, at::IntArrayRef image_size) {
  check_inputs(residual, kernel, "residual");
  const auto full = adjoint_size(residual, image_size);
  const auto s = make_shape(full, kernel.sizes(), boundary);
  const auto size = output_size(s);
  check_residual(residual, size, "blurred image");
  if (s.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s, residual.options().dtype(type), format_of(residual)};
    return blur.adjoint(residual.to(type), prepare(kernel, type)).to(residual.scalar_type());
  });
}

at::Tensor blur_conv2d_kernel(const at::Tensor& image, const at::Tensor& residual,
                              std::string_view boundary, at::IntArrayRef kernel_size) {
  check_rank(image, 4, "image", "[B,C,H,W]");
  check_real(image, "image");
  const auto s = make_shape(image.sizes(), kernel_size, boundary);
  check_observation(s, image, residual, std::nullopt);
  if (s.planes() == 0) return at::zeros(kernel_size, image.options());
  const auto type = compute_type(image, residual);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s, image.options().dtype(type)};
    return blur.kernel_adjoint(image.to(type), residual.to(type)).to(image.scalar_type());
  });
}

at::Tensor blur_data_term(const at::Tensor& image, const at::Tensor& kernel,
                          const at::Tensor& observation, const std::optional<at::Tensor>& mask,
                          std::string_view boundary) {
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  check_observation(s, image, observation, mask);
  const auto type = compute_type(image, kernel);
  if (s.planes() == 0) return at::zeros({s.batch}, image.options().dtype(type));
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s, image.options().dtype(type)};
    return blur.loss(image.to(type), prepare(kernel, type), observation.to(type),
                     mask ? mask->to(type) : at::Tensor());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> blur_gradients(const at::Tensor& image,
                                                              const at::Tensor& kernel,
                                                              const at::Tensor& observation,
                                                              const std::optional<at::Tensor>& mask,
                                                              std::string_view boundary) {
  check_inputs(image, kernel, "image");
  const auto s = make_shape(image.sizes(), kernel.sizes(), boundary);
  check_observation(s, image, observation, mask);
  const auto type = compute_type(image, kernel);
  if (s.planes() == 0)
    return {at::zeros({s.batch}, image.options().dtype(type)),
            at::zeros(image.sizes(), image.options()), at::zeros(kernel.sizes(), kernel.options())};
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s, image.options().dtype(type), format_of(image)};
    auto [loss, grad_image, grad_kernel] =
        blur.gradients(image.to(type), prepare(kernel, type), observation.to(type),
                       mask ? mask->to(type) : at::Tensor());
    return std::make_tuple(loss, grad_image.to(image.scalar_type()),
                           grad_kernel.to(kernel.scalar_type()));
  });
}

}  // namespace latentdem
