// Tensor-level steps of the blur operators, for the glue of every family that convolves: shapes and
// checks, the choice between the direct and the spectral path, and both paths' pieces.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/fft_irfft2.h>
#include <ATen/ops/fft_rfft2.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "blur/blur_spectral.h"
#include "common/checks.h"
#include "common/fft_size.h"
#include "common/strided_glue.h"

namespace latentdem {

// Direct convolution costs taps, the spectral path a few transforms whatever the kernel. At
// [8,3,256,256] the loss with both gradients takes 8 ms spectrally, and directly 1 ms a tap.
inline constexpr int64_t kDirectTaps = 9;

inline Boundary parse_boundary(std::string_view name) {
  if (name == "circular") return Boundary::kCircular;
  if (name == "reflect") return Boundary::kReflect;
  if (name == "replicate") return Boundary::kReplicate;
  if (name == "zero") return Boundary::kZero;
  TORCH_CHECK_VALUE(name == "valid",
                    "boundary must be one of circular, reflect, replicate, zero, valid, found '",
                    std::string(name), "'");
  return Boundary::kValid;
}

inline BlurShape make_shape(at::IntArrayRef image, at::IntArrayRef kernel,
                            std::string_view boundary) {
  TORCH_CHECK_VALUE(kernel.size() == 4, "kernel must have shape [B|1,C|1,kh,kw], found ", kernel);
  TORCH_CHECK_VALUE(kernel[2] > 0 && kernel[3] > 0, "kernel must not be empty, found ", kernel);
  TORCH_CHECK_VALUE(kernel[0] == 1 || kernel[0] == image[0],
                    "kernel must have batch size 1 or that of image (", image[0], "), found ",
                    kernel[0]);
  TORCH_CHECK_VALUE(kernel[1] == 1 || kernel[1] == image[1],
                    "kernel must have 1 channel or those of image (", image[1], "), found ",
                    kernel[1]);
  TORCH_CHECK_VALUE(kernel[2] <= image[2] && kernel[3] <= image[3],
                    "kernel must be no larger than image (", image[2], " x ", image[3], "), found ",
                    kernel[2], " x ", kernel[3]);
  BlurShape s{};
  s.batch = image[0];
  s.channels = image[1];
  s.height = image[2];
  s.width = image[3];
  s.kernel_height = kernel[2];
  s.kernel_width = kernel[3];
  const int64_t kernel_channels = kernel[1];
  s.kernel_stride_c = kernel_channels == 1 ? 0 : 1;
  s.kernel_stride_b = kernel[0] == 1 ? 0 : kernel_channels;
  s.boundary = parse_boundary(boundary);
  return s;
}

inline void check_inputs(const at::Tensor& image, const at::Tensor& kernel,
                         const char* image_name) {
  check_rank(image, 4, image_name, "[B,C,H,W]");
  check_real(image, image_name);
  check_real(kernel, "kernel");
  check_same_device(kernel, image, "kernel", image_name);
}

// [B,C,H,W] of the image that an adjoint returns; `image_size` is (H, W).
inline std::array<int64_t, 4> adjoint_size(const at::Tensor& residual, at::IntArrayRef image_size) {
  TORCH_CHECK_VALUE(image_size.size() == 2, "image_size must be (H, W), found ", image_size);
  return {residual.size(0), residual.size(1), image_size[0], image_size[1]};
}

// `what` is the image that a residual belongs to.
inline void check_residual(const at::Tensor& residual, at::IntArrayRef size, const char* what) {
  TORCH_CHECK_VALUE(residual.sizes() == size, "residual must have the shape of the ", what, " ",
                    size, ", found ", residual.sizes());
}

inline std::array<int64_t, 4> output_size(const BlurShape& s) {
  return {s.batch, s.channels, s.output_height(), s.output_width()};
}

inline bool use_direct(const BlurShape& s) {
  return s.kernel_height * s.kernel_width <= kDirectTaps;
}

// A circular blur needs no extension if the image itself is a good transform size.
inline bool wraps_in_place(const BlurShape& s) {
  return s.boundary == Boundary::kCircular && s.height % 2 == 0 && is_fft_size(s.height) &&
         is_fft_size(s.width);
}

inline SpectralGrid make_grid(const BlurShape& s) {
  if (wraps_in_place(s)) return {s.height, s.width, s.kernel_height / 2, s.kernel_width / 2};
  return {next_fft_size(s.extended_height()), next_fft_size(s.extended_width()),
          s.kernel_height - 1, s.kernel_width - 1};
}

// Small tensors, which are read in their order.
inline at::Tensor prepare(const at::Tensor& t, at::ScalarType type) {
  return t.to(type).contiguous();
}

template <class T>
const Complex<T>* spectrum_data(const at::Tensor& t) {
  return reinterpret_cast<const Complex<T>*>(t.const_data_ptr());
}

template <class T>
Complex<T>* mutable_spectrum(const at::Tensor& t) {
  return reinterpret_cast<Complex<T>*>(t.mutable_data_ptr());
}

inline at::Tensor forward_fft(const at::Tensor& t, const SpectralGrid& g) {
  return at::fft_rfft2(t, std::array<int64_t, 2>{g.n, g.m}).contiguous();
}

inline at::Tensor inverse_fft(const at::Tensor& t, const SpectralGrid& g) {
  return at::fft_irfft2(t, std::array<int64_t, 2>{g.n, g.m});
}

// The steps below take tensors of one compute dtype; kernels are contiguous.
template <class T>
struct Blur {
  BlurShape s;
  at::TensorOptions options;
  at::MemoryFormat format = at::MemoryFormat::Contiguous;  // of the results of image size

  at::Tensor empty_image() const {
    return at::empty({s.batch, s.channels, s.height, s.width}, options, format);
  }
  at::Tensor empty_output() const { return at::empty(output_size(s), options, format); }

  at::Tensor empty_extended() const {
    return at::empty({s.batch, s.channels, s.extended_height(), s.extended_width()}, options);
  }

  at::Tensor extend(const at::Tensor& image) const {
    if (!s.keeps_size()) return image;
    auto out = empty_extended();
    extend_cpu<T>(s, view<T>(image), out.template mutable_data_ptr<T>());
    return out;
  }

  at::Tensor fold(const at::Tensor& extended) const {
    if (!s.keeps_size()) return extended;
    auto out = empty_image();
    fold_cpu<T>(s, extended.const_data_ptr<T>(), mutable_view<T>(out));
    return out;
  }

  at::Tensor empty_kernel() const {
    return at::empty({s.kernel_batch(), s.kernel_channels(), s.kernel_height, s.kernel_width},
                     options);
  }

  SpectralBlur<T> spectral(SpectralTask task) const {
    SpectralBlur<T> p{};
    p.task = task;
    p.s = s;
    p.g = make_grid(s);
    p.wraps = wraps_in_place(s);
    return p;
  }

  at::Tensor forward(const at::Tensor& image, const at::Tensor& kernel) const {
    auto out = empty_output();
    if (use_direct(s)) {
      convolve_cpu<T>(s, view<T>(extend(image)), kernel.const_data_ptr<T>(), mutable_view<T>(out));
      return out;
    }
    auto p = spectral(SpectralTask::kBlur);
    p.image = view<T>(image);
    p.kernel = kernel.const_data_ptr<T>();
    p.output = mutable_view<T>(out);
    spectral_blur_cpu(p);
    return out;
  }

  at::Tensor adjoint(const at::Tensor& residual, const at::Tensor& kernel) const {
    if (use_direct(s)) {
      const auto extended = s.keeps_size() ? empty_extended() : empty_image();
      convolve_adjoint_cpu<T>(s, view<T>(residual), kernel.const_data_ptr<T>(),
                              mutable_view<T>(extended));
      return fold(extended);
    }
    auto out = empty_image();
    auto p = spectral(SpectralTask::kAdjoint);
    p.second = view<T>(residual);
    p.kernel = kernel.const_data_ptr<T>();
    p.output = mutable_view<T>(out);
    spectral_blur_cpu(p);
    return out;
  }

  at::Tensor kernel_adjoint(const at::Tensor& image, const at::Tensor& residual) const {
    auto out = empty_kernel();
    if (use_direct(s)) {
      convolve_kernel_cpu<T>(s, view<T>(extend(image)), view<T>(residual),
                             out.template mutable_data_ptr<T>());
      return out;
    }
    auto p = spectral(SpectralTask::kKernelAdjoint);
    p.image = view<T>(image);
    p.second = view<T>(residual);
    p.grad_kernel = out.template mutable_data_ptr<T>();
    spectral_blur_cpu(p);
    return out;
  }

  // prediction -> mask * (prediction - observation), in place, and its loss.
  at::Tensor residual(const at::Tensor& prediction, const at::Tensor& observation,
                      const at::Tensor& mask, at::Tensor& loss) const {
    ResidualParams<T> p{};
    p.prediction = view<T>(prediction);
    p.observation = view<T>(observation);
    if (mask.defined()) p.mask = view<T>(mask);
    p.residual = mutable_view<T>(prediction);
    p.loss = loss.mutable_data_ptr<T>();
    residual_cpu<T>(s, p);
    return prediction;
  }

  // The loss; gradients are another task on the same inputs.
  SpectralBlur<T> data_term(const at::Tensor& image, const at::Tensor& kernel,
                            const at::Tensor& observation, const at::Tensor& mask,
                            at::Tensor& loss) const {
    auto p = spectral(SpectralTask::kLoss);
    p.image = view<T>(image);
    p.kernel = kernel.const_data_ptr<T>();
    p.second = view<T>(observation);
    if (mask.defined()) p.mask = view<T>(mask);
    p.loss = loss.mutable_data_ptr<T>();
    return p;
  }

  at::Tensor loss(const at::Tensor& image, const at::Tensor& kernel, const at::Tensor& observation,
                  const at::Tensor& mask) const {
    auto loss = at::empty({s.batch}, options);
    if (use_direct(s))
      residual(forward(image, kernel), observation, mask, loss);
    else
      spectral_blur_cpu(data_term(image, kernel, observation, mask, loss));
    return loss;
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& image,
                                                           const at::Tensor& kernel,
                                                           const at::Tensor& observation,
                                                           const at::Tensor& mask) const {
    auto loss = at::empty({s.batch}, options);
    if (use_direct(s)) {
      const auto r = residual(forward(image, kernel), observation, mask, loss);
      return {loss, adjoint(r, kernel), kernel_adjoint(image, r)};
    }
    const auto grad = empty_image(), grad_kernel = empty_kernel();
    auto p = data_term(image, kernel, observation, mask, loss);
    p.task = SpectralTask::kGradients;
    p.output = mutable_view<T>(grad);
    p.grad_kernel = grad_kernel.template mutable_data_ptr<T>();
    spectral_blur_cpu(p);
    return {loss, grad, grad_kernel};
  }
};

inline void check_observation(const BlurShape& s, const at::Tensor& image,
                              const at::Tensor& observation,
                              const std::optional<at::Tensor>& mask) {
  check_real(observation, "observation");
  check_same_device(observation, image, "observation", "image");
  const auto size = output_size(s);
  TORCH_CHECK_VALUE(observation.sizes() == at::IntArrayRef(size),
                    "observation must have the shape of the blurred image ", at::IntArrayRef(size),
                    ", found ", observation.sizes());
  if (!mask.has_value()) return;
  check_real(*mask, "mask");
  check_same_device(*mask, image, "mask", "image");
  TORCH_CHECK_VALUE(mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == size[0]) &&
                        (mask->size(1) == 1 || mask->size(1) == size[1]) &&
                        mask->size(2) == size[2] && mask->size(3) == size[3],
                    "mask must have shape [B|1,C|1,H',W'] with observation's H' and W' (",
                    at::IntArrayRef(size), "), found ", mask->sizes());
}

}  // namespace latentdem
