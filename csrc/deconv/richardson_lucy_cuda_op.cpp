// Torch glue of Richardson-Lucy on CUDA. The kernel is transformed once; an iteration is four
// transforms with one pass between each two. Compiled for the emulator as well.
//
// The values of the tensors are not checked: that would wait for the device.
#include <ATen/core/Tensor.h>

#include <utility>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda_glue.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "deconv/deconv_cuda.h"
#include "deconv/richardson_lucy_glue.h"

namespace latentdem {
namespace cuda {
namespace {

template <class T>
struct Lucy {
  Blur<T> blur;
  at::Tensor observation, mask, transfer;
  T floor, scale;

  Lucy(const BlurShape& s, const at::Tensor& y, const at::Tensor& kernel, const at::Tensor& m,
       double eps, cudaStream_t stream)
      : blur(s, y.options(), stream),
        observation(y),
        mask(m),
        transfer(blur.kernel_spectrum(kernel)),
        floor(static_cast<T>(eps)),
        scale(
            static_cast<T>(1.0 / (static_cast<double>(blur.g.n) * static_cast<double>(blur.g.m)))) {
  }

  LucyGrid<T> grid() const {
    LucyGrid<T> p{};
    p.s = blur.s;
    p.g = blur.g;
    p.wraps = blur.in_place;
    p.observation = device_data<T>(observation, "observation");
    if (mask.defined()) {
      p.mask = device_data<T>(mask, "mask");
      p.mask_stride_c = mask.size(1) == 1 ? 0 : 1;
      p.mask_stride_b = mask.size(0) == 1 ? 0 : mask.size(1);
    }
    p.floor = floor;
    return p;
  }

  // K or its adjoint on the grid, unscaled.
  at::Tensor convolve(const at::Tensor& field, bool adjoint) const {
    const auto spectrum = forward_fft(field, blur.g);
    TransferParams<T> p{};
    p.s = blur.s;
    p.g = blur.g;
    p.kernel = device_data<Complex<T>>(transfer, "transfer");
    p.conjugate = adjoint;
    p.factor = 1;
    p.input = device_data<Complex<T>>(spectrum, "spectrum");
    p.output = Blur<T>::spectrum(spectrum, "spectrum");
    apply_transfer_cuda<T>(p, blur.stream);
    return unscaled_inverse_fft(spectrum, blur.g);
  }

  at::Tensor inverse_weights() const {
    const auto weights = blur.empty_grid("weights");
    lucy_ratio_cuda<T>(grid(), scale, true, mutable_device_data<T>(weights, "weights"),
                       blur.stream);
    const auto seen = convolve(weights, true);
    const auto out = blur.empty_image("inverse_weights");
    lucy_inverse_cuda<T>(grid(), scale, static_cast<T>(kUnobserved), device_data<T>(seen, "seen"),
                         mutable_device_data<T>(out, "inverse_weights"), blur.stream);
    return out;
  }

  at::Tensor run(at::Tensor image, int64_t iterations, double total_variation) const {
    const auto inverse = inverse_weights();
    auto output = blur.empty_image("output"), spare = blur.empty_image("spare");
    at::Tensor extended;
    if (!blur.in_place) {
      extended = blur.empty_grid("extended");
      image_to_grid_cuda<T>(blur.s, blur.g, blur.s.keeps_size(), device_data<T>(image, "image"),
                            mutable_device_data<T>(extended, "extended"), blur.stream);
    }
    for (int64_t i = 0; i < iterations; ++i) {
      const auto ratio = convolve(blur.in_place ? image : extended, false);
      lucy_ratio_cuda<T>(grid(), scale, false, mutable_device_data<T>(ratio, "ratio"), blur.stream);
      const auto correction = convolve(ratio, true);
      LucyStep<T> step{};
      step.image = device_data<T>(image, "image");
      step.correction = device_data<T>(correction, "correction");
      step.inverse = device_data<T>(inverse, "inverse_weights");
      step.scale = scale;
      step.total_variation = static_cast<T>(total_variation);
      step.output = mutable_device_data<T>(output, "output");
      if (extended.defined() && i + 1 < iterations)
        step.next = mutable_device_data<T>(extended, "extended");
      lucy_step_cuda<T>(grid(), step, blur.stream);
      image = output;
      std::swap(output, spare);
    }
    return image;
  }
};

}  // namespace

at::Tensor richardson_lucy(const at::Tensor& observation, const at::Tensor& kernel,
                           const at::Tensor& initial, const std::optional<at::Tensor>& mask,
                           std::string_view boundary, int64_t iterations, double total_variation,
                           double eps) {
  const DeviceScope scope(initial);
  const auto s =
      check_lucy(observation, kernel, initial, mask, boundary, iterations, total_variation, eps);
  if (s.planes() == 0 || iterations == 0) return initial.clone(at::MemoryFormat::Contiguous);
  const auto type = compute_type(initial, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Lucy<T> lucy(s, prepare(observation, type), prepare(kernel, type),
                       mask ? prepare(*mask, type) : at::Tensor(), eps, scope.stream());
    return lucy.run(prepare(initial, type), iterations, total_variation).to(initial.scalar_type());
  });
}

}  // namespace cuda
}  // namespace latentdem
