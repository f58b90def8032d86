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

// The steps below all take contiguous tensors of one compute dtype.
template <class T>
struct Blur {
  BlurShape s;
  at::TensorOptions options;

  at::Tensor extend(const at::Tensor& image) const {
    if (!s.keeps_size()) return image;
    auto out = at::empty({s.batch, s.channels, s.extended_height(), s.extended_width()}, options);
    extend_cpu<T>(s, image.const_data_ptr<T>(), out.template mutable_data_ptr<T>());
    return out;
  }

  at::Tensor fold(const at::Tensor& extended) const {
    if (!s.keeps_size()) return extended;
    auto out = at::empty({s.batch, s.channels, s.height, s.width}, options);
    fold_cpu<T>(s, extended.const_data_ptr<T>(), out.template mutable_data_ptr<T>());
    return out;
  }

  at::Tensor on_grid(const at::Tensor& image) const {
    return wraps_in_place(s) ? image : extend(image);
  }

  at::Tensor empty_kernel() const {
    return at::empty({s.kernel_batch(), s.kernel_channels(), s.kernel_height, s.kernel_width},
                     options);
  }

  at::Tensor image_spectrum(const at::Tensor& image, const SpectralGrid& g) const {
    return forward_fft(on_grid(image), g);
  }

  at::Tensor kernel_spectrum(const at::Tensor& kernel, const SpectralGrid& g) const {
    const int64_t count = s.kernel_batch() * s.kernel_channels();
    auto grid = at::empty({count, g.n, g.m}, options);
    embed_kernel_cpu<T>(s, g, count, kernel.const_data_ptr<T>(), grid.mutable_data_ptr<T>());
    return forward_fft(grid, g);
  }

  // Spectrum of the image gradient -> image gradient.
  at::Tensor image_from_spectrum(const at::Tensor& spectrum, const SpectralGrid& g) const {
    auto field = inverse_fft(spectrum, g);
    if (wraps_in_place(s)) return field;
    return fold(
        field.narrow(2, 0, s.extended_height()).narrow(3, 0, s.extended_width()).contiguous());
  }

  at::Tensor kernel_from_spectrum(const at::Tensor& spectrum, const SpectralGrid& g) const {
    const int64_t count = s.kernel_batch() * s.kernel_channels();
    auto field = inverse_fft(spectrum, g).contiguous();
    auto out = empty_kernel();
    gather_kernel_cpu<T>(s, g, count, field.const_data_ptr<T>(),
                         out.template mutable_data_ptr<T>());
    return out;
  }

  // K X on the FFT grid; the blurred image is its top left corner.
  at::Tensor predict(const at::Tensor& image_spectrum, const at::Tensor& kernel_spectrum,
                     const SpectralGrid& g) const {
    auto product = image_spectrum.clone();
    spectrum_multiply_cpu<T>(s, g, spectrum_data<T>(kernel_spectrum), false,
                             mutable_spectrum<T>(product));
    return inverse_fft(product, g).contiguous();
  }

  // The part of the spectral path that all operators share; `image` is extended already.
  SpectralBlur<T> spectral(const at::Tensor* image, const at::Tensor* kernel,
                           const at::Tensor* second) const {
    SpectralBlur<T> p{};
    p.s = s;
    p.g = make_grid(s);
    if (image != nullptr) {
      p.image = image->const_data_ptr<T>();
      p.image_rows = image->size(2);
      p.image_columns = image->size(3);
    }
    if (kernel != nullptr) p.kernel = kernel->const_data_ptr<T>();
    if (second != nullptr) {
      p.second = second->const_data_ptr<T>();
      p.second_rows = second->size(2);
      p.second_columns = second->size(3);
    }
    return p;
  }

  at::Tensor off_grid(const at::Tensor& image) const {
    return wraps_in_place(s) ? image : fold(image);
  }

  at::Tensor empty_on_grid() const {
    return wraps_in_place(s)
               ? at::empty({s.batch, s.channels, s.height, s.width}, options)
               : at::empty({s.batch, s.channels, s.extended_height(), s.extended_width()}, options);
  }

  static void set_output(SpectralBlur<T>& p, const at::Tensor& output) {
    p.output = output.mutable_data_ptr<T>();
    p.output_rows = output.size(2);
    p.output_columns = output.size(3);
  }

  // k * x from an image that is extended already.
  at::Tensor blur_extended(const at::Tensor& extended, const at::Tensor& kernel) const {
    auto out = at::empty(output_size(s), options);
    auto p = spectral(&extended, &kernel, nullptr);
    p.predict = true;
    set_output(p, out);
    spectral_blur_cpu(p);
    return out;
  }

  at::Tensor forward(const at::Tensor& image, const at::Tensor& kernel) const {
    if (use_direct(s)) {
      auto out = at::empty(output_size(s), options);
      convolve_cpu<T>(s, extend(image).template const_data_ptr<T>(), kernel.const_data_ptr<T>(),
                      out.template mutable_data_ptr<T>());
      return out;
    }
    return blur_extended(on_grid(image), kernel);
  }

  at::Tensor adjoint(const at::Tensor& residual, const at::Tensor& kernel) const {
    if (use_direct(s)) {
      auto extended =
          at::empty({s.batch, s.channels, s.extended_height(), s.extended_width()}, options);
      convolve_adjoint_cpu<T>(s, residual.const_data_ptr<T>(), kernel.const_data_ptr<T>(),
                              extended.mutable_data_ptr<T>());
      return fold(extended);
    }
    const auto out = empty_on_grid();
    auto p = spectral(nullptr, &kernel, &residual);
    set_output(p, out);
    spectral_blur_cpu(p);
    return off_grid(out);
  }

  at::Tensor kernel_adjoint(const at::Tensor& image, const at::Tensor& residual) const {
    if (use_direct(s)) {
      auto out = empty_kernel();
      convolve_kernel_cpu<T>(s, extend(image).template const_data_ptr<T>(),
                             residual.const_data_ptr<T>(), out.template mutable_data_ptr<T>());
      return out;
    }
    const auto extended = on_grid(image);
    auto out = empty_kernel();
    auto p = spectral(&extended, nullptr, &residual);
    p.grad_kernel = out.template mutable_data_ptr<T>();
    spectral_blur_cpu(p);
    return out;
  }

  // Residual and loss of a prediction with the given pitch (row) and plane strides.
  at::Tensor residual(const at::Tensor& prediction, const at::Tensor& observation,
                      const at::Tensor& mask, at::Tensor& loss) const {
    auto out = at::empty(output_size(s), options);
    ResidualParams<T> p{};
    p.prediction = prediction.const_data_ptr<T>();
    p.pitch = prediction.size(3);
    p.plane = prediction.size(2) * prediction.size(3);
    p.observation = observation.const_data_ptr<T>();
    if (mask.defined()) {
      p.mask = mask.const_data_ptr<T>();
      p.mask_stride_c = mask.size(1) == 1 ? 0 : 1;
      p.mask_stride_b = mask.size(0) == 1 ? 0 : mask.size(1);
    }
    p.residual = out.template mutable_data_ptr<T>();
    p.loss = loss.mutable_data_ptr<T>();
    residual_cpu<T>(s, p);
    return out;
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
    const auto extended = on_grid(image), grad = empty_on_grid();
    const auto grad_kernel = empty_kernel();
    // Without a mask a periodic residual never has to leave the spectrum.
    const bool fused = wraps_in_place(s) && !mask.defined();
    const auto second =
        fused ? observation : residual(blur_extended(extended, kernel), observation, mask, loss);
    auto p = spectral(&extended, &kernel, &second);
    if (fused) {
      p.second_is_observation = true;
      p.loss = loss.template mutable_data_ptr<T>();
    }
    set_output(p, grad);
    p.grad_kernel = grad_kernel.template mutable_data_ptr<T>();
    spectral_blur_cpu(p);
    return {loss, off_grid(grad), grad_kernel};
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
