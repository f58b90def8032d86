// Torch glue of Richardson-Lucy: checks, and a loop over fused passes and FFTs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/min.h>
#include <ATen/ops/ones.h>

#include "bindings/api.h"
#include "blur/blur_glue.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "deconv/deconv.h"

namespace latentdem {
namespace {

// Below this weight (one is that of a pixel inside, if the kernel sums to one) a pixel counts as
// not observed; rounding of the transforms is far below, even in float32.
constexpr double kUnobserved = 1e-2;

void check_non_negative(const at::Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  const double least = t.min().item<double>();
  TORCH_CHECK_VALUE(least >= 0, name, " must be non-negative, found ", least);
}

template <class T>
struct RichardsonLucy {
  Blur<T> blur;
  SpectralGrid g;
  at::Tensor kernel, transfer;

  RichardsonLucy(const BlurShape& s, const at::Tensor& taps)
      : blur{s, taps.options()}, g(make_grid(s)), kernel(taps) {
    if (!use_direct(s)) transfer = blur.kernel_spectrum(kernel, g);
  }

  const BlurShape& s() const { return blur.s; }

  at::Tensor predict(const at::Tensor& image) const {
    if (use_direct(s())) return blur.forward(image, kernel);
    auto spectrum = blur.image_spectrum(image, g);
    spectrum_multiply_cpu<T>(s(), g, spectrum_data<T>(transfer), false,
                             mutable_spectrum<T>(spectrum));
    return inverse_fft(spectrum, g).contiguous();
  }

  at::Tensor adjoint(const at::Tensor& residual) const {
    if (use_direct(s())) return blur.adjoint(residual, kernel);
    auto spectrum = forward_fft(residual, g);
    spectrum_multiply_cpu<T>(s(), g, spectrum_data<T>(transfer), true,
                             mutable_spectrum<T>(spectrum));
    return blur.image_from_spectrum(spectrum, g).contiguous();
  }

  at::Tensor run(at::Tensor image, const at::Tensor& observation, const at::Tensor& mask,
                 int64_t iterations, double total_variation, double eps) const {
    const auto size = output_size(s());
    QuotientParams<T> q{};
    q.observation = observation.const_data_ptr<T>();
    if (mask.defined()) {
      q.mask = mask.const_data_ptr<T>();
      q.mask_stride_c = mask.size(1) == 1 ? 0 : 1;
      q.mask_stride_b = mask.size(0) == 1 ? 0 : mask.size(1);
    }
    q.floor = static_cast<T>(eps);
    auto quotient = at::empty(size, blur.options);
    q.quotient = quotient.template mutable_data_ptr<T>();
    const auto seen =
        mask.defined() ? mask.expand(size).contiguous() : at::ones(size, blur.options);
    auto inverse = adjoint(seen);
    invert_weight_cpu<T>(inverse.numel(), static_cast<T>(kUnobserved),
                         inverse.template mutable_data_ptr<T>());
    LucyUpdateParams<T> u{};
    u.inverse = inverse.template const_data_ptr<T>();
    u.total_variation = static_cast<T>(total_variation);
    u.floor = static_cast<T>(eps);
    for (int64_t i = 0; i < iterations; ++i) {
      const auto prediction = predict(image);
      q.prediction = prediction.template const_data_ptr<T>();
      q.pitch = prediction.size(3);
      q.plane = prediction.size(2) * prediction.size(3);
      quotient_cpu<T>(s(), q);
      const auto correction = adjoint(quotient);
      auto next = total_variation > 0 ? at::empty_like(image) : image;
      u.image = image.const_data_ptr<T>();
      u.correction = correction.template const_data_ptr<T>();
      u.output = next.template mutable_data_ptr<T>();
      lucy_update_cpu<T>(s(), u);
      image = next;
    }
    return image;
  }
};

}  // namespace

at::Tensor richardson_lucy(const at::Tensor& observation, const at::Tensor& kernel,
                           const at::Tensor& initial, const std::optional<at::Tensor>& mask,
                           std::string_view boundary, int64_t iterations, double total_variation,
                           double eps) {
  check_inputs(initial, kernel, "initial");
  const auto s = make_shape(initial.sizes(), kernel.sizes(), boundary);
  check_observation(s, initial, observation, mask);
  TORCH_CHECK_VALUE(iterations >= 0, "iterations must be non-negative, found ", iterations);
  TORCH_CHECK_VALUE(total_variation >= 0 && total_variation <= 0.25,
                    "total_variation must be in [0, 0.25], found ", total_variation);
  TORCH_CHECK_VALUE(eps > 0, "eps must be positive, found ", eps);
  check_non_negative(observation, "observation");
  check_non_negative(kernel, "kernel");
  check_non_negative(initial, "initial");
  if (mask.has_value()) check_non_negative(*mask, "mask");
  if (s.planes() == 0 || iterations == 0) return initial.clone(at::MemoryFormat::Contiguous);
  const auto type = compute_type(initial, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const RichardsonLucy<T> solver(s, prepare(kernel, type));
    return solver
        .run(prepare(initial, type).clone(), prepare(observation, type),
             mask ? prepare(*mask, type) : at::Tensor(), iterations, total_variation, eps)
        .to(initial.scalar_type());
  });
}

}  // namespace latentdem
