// Torch glue of blur with downsampling on CUDA; compiled for the emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda_glue.h"
#include "blur/downsample_glue.h"
#include "common/checks.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"

namespace latentdem {
namespace cuda {

at::Tensor blur_downsample2d(const at::Tensor& image, const at::Tensor& kernel,
                             std::string_view boundary, int64_t factor) {
  const DeviceScope scope(image);
  check_inputs(image, kernel, "image");
  const auto s = make_downsample(make_shape(image.sizes(), kernel.sizes(), boundary), factor);
  if (s.blur.planes() == 0) return at::zeros(small_size(s), image.options());
  const auto type = compute_type(image, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s.blur, image.options().dtype(type), scope.stream());
    const auto x = prepare(image, type), k = prepare(kernel, type);
    if (!use_strided(s))
      return pick(blur.forward(x, k), factor).contiguous().to(image.scalar_type());
    const auto out = device_empty(small_size(s), blur.options, "output");
    convolve_strided_cuda<T>(s, device_data<T>(x, "image"), device_data<T>(k, "kernel"),
                             mutable_device_data<T>(out, "output"), scope.stream());
    return out.to(image.scalar_type());
  });
}

at::Tensor blur_downsample2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                                     std::string_view boundary, int64_t factor,
                                     at::IntArrayRef image_size) {
  const DeviceScope scope(residual);
  check_inputs(residual, kernel, "residual");
  const auto full = adjoint_size(residual, image_size);
  const auto s = make_downsample(make_shape(full, kernel.sizes(), boundary), factor);
  const auto size = small_size(s);
  check_residual(residual, size, "blurred and downsampled image");
  if (s.blur.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur(s.blur, residual.options().dtype(type), scope.stream());
    const auto r = prepare(residual, type), k = prepare(kernel, type);
    if (!use_strided(s)) {
      auto sparse = at::zeros(output_size(s.blur), blur.options);
      pick(sparse, factor).copy_(r);
      return blur.adjoint(sparse, k).to(residual.scalar_type());
    }
    const auto out = blur.empty_image("grad_image");
    convolve_strided_adjoint_cuda<T>(s, device_data<T>(r, "residual"), device_data<T>(k, "kernel"),
                                     mutable_device_data<T>(out, "grad_image"), scope.stream());
    return out.to(residual.scalar_type());
  });
}

}  // namespace cuda
}  // namespace latentdem
