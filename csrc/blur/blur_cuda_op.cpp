// Torch glue of the blur operators on CUDA; compiled for the emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda.h"
#include "blur/blur_glue.h"
#include "common/checks.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"

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
    const auto x = prepare(image, type), k = prepare(kernel, type);
    auto out = device_empty(output_size(s), image.options().dtype(type), "output");
    convolve_strided_cuda<T>({s, 1}, device_data<T>(x, "image"), device_data<T>(k, "kernel"),
                             mutable_device_data<T>(out, "output"), scope.stream());
    return out.to(image.scalar_type());
  });
}

}  // namespace cuda
}  // namespace latentdem
