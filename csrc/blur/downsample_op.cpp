// Torch glue of blur with downsampling: checks, and the choice between strided direct
// convolution and the spectral blur of which every factor-th pixel is kept.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "bindings/api.h"
#include "blur/blur_glue.h"
#include "blur/downsample_glue.h"
#include "common/checks.h"
#include "common/dispatch.h"

namespace latentdem {

at::Tensor blur_downsample2d(const at::Tensor& image, const at::Tensor& kernel,
                             std::string_view boundary, int64_t factor) {
  check_inputs(image, kernel, "image");
  const auto s = make_downsample(make_shape(image.sizes(), kernel.sizes(), boundary), factor);
  if (s.blur.planes() == 0) return at::zeros(small_size(s), image.options());
  const auto type = compute_type(image, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s.blur, image.options().dtype(type)};
    const auto x = prepare(image, type), k = prepare(kernel, type);
    if (!use_strided(s))
      return pick(blur.forward(x, k), factor).contiguous().to(image.scalar_type());
    auto out = at::empty(small_size(s), blur.options);
    convolve_strided_cpu<T>(s, blur.extend(x).template const_data_ptr<T>(),
                            k.template const_data_ptr<T>(), out.template mutable_data_ptr<T>());
    return out.to(image.scalar_type());
  });
}

at::Tensor blur_downsample2d_adjoint(const at::Tensor& residual, const at::Tensor& kernel,
                                     std::string_view boundary, int64_t factor,
                                     at::IntArrayRef image_size) {
  check_inputs(residual, kernel, "residual");
  const auto full = adjoint_size(residual, image_size);
  const auto s = make_downsample(make_shape(full, kernel.sizes(), boundary), factor);
  const auto size = small_size(s);
  check_residual(residual, size, "blurred and downsampled image");
  if (s.blur.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Blur<T> blur{s.blur, residual.options().dtype(type)};
    const auto r = prepare(residual, type), k = prepare(kernel, type);
    if (!use_strided(s)) {
      auto sparse = at::zeros(output_size(s.blur), blur.options);
      pick(sparse, factor).copy_(r);
      return blur.adjoint(sparse, k).to(residual.scalar_type());
    }
    auto extended = at::empty(
        {s.blur.batch, s.blur.channels, s.blur.extended_height(), s.blur.extended_width()},
        blur.options);
    convolve_strided_adjoint_cpu<T>(s, r.template const_data_ptr<T>(),
                                    k.template const_data_ptr<T>(),
                                    extended.template mutable_data_ptr<T>());
    return blur.fold(extended).to(residual.scalar_type());
  });
}

}  // namespace latentdem
