// Tensor-level steps of the blur on CUDA, the counterpart of Blur in blur_glue.h. All take
// contiguous tensors of one compute dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fft_c2r.h>

#include <array>
#include <tuple>

#include "blur/blur_cuda.h"
#include "blur/blur_glue.h"
#include "blur/blur_path_cuda.h"
#include "common/cuda_glue.h"

namespace latentdem {
namespace cuda {

// Without the factor 1 / (n m), for which ATen would go through the memory once more.
inline at::Tensor unscaled_inverse_fft(const at::Tensor& t, const SpectralGrid& g) {
  constexpr int64_t kNoScale = 0;
  return at::_fft_c2r(t, std::array<int64_t, 2>{t.dim() - 2, t.dim() - 1}, kNoScale, g.m)
      .contiguous();
}

template <class T>
struct Blur {
  BlurShape s;
  at::TensorOptions options;
  cudaStream_t stream;
  SpectralGrid g;
  bool in_place;  // the grid is the image's own
  bool direct;

  Blur(const BlurShape& shape, const at::TensorOptions& tensor_options, cudaStream_t on)
      : s(shape),
        options(tensor_options),
        stream(on),
        g(make_grid(shape)),
        in_place(wraps_in_place(shape)),
        direct(prefer_direct(shape, g, in_place)) {}

  int64_t kernels() const { return s.kernel_batch() * s.kernel_channels(); }

  at::Tensor empty_image(const char* name) const {
    return device_empty({s.batch, s.channels, s.height, s.width}, options, name);
  }
  at::Tensor empty_output(const char* name) const {
    return device_empty(output_size(s), options, name);
  }
  at::Tensor empty_kernel() const {
    return device_empty({s.kernel_batch(), s.kernel_channels(), s.kernel_height, s.kernel_width},
                        options, "grad_kernel");
  }
  at::Tensor empty_losses(int64_t per_plane) const {
    return device_empty({s.planes(), per_plane}, options.dtype(at::kDouble), "losses");
  }
  at::Tensor empty_grid(const char* name) const {
    return device_empty({s.batch, s.channels, g.n, g.m}, options, name);
  }

  static Complex<T>* spectrum(const at::Tensor& t, const char* name) {
    return mutable_device_data<Complex<T>>(t, name);
  }

  Observed<T> observed(const at::Tensor& observation, const at::Tensor& mask) const {
    Observed<T> o{device_data<T>(observation, "observation"), nullptr, 0, 0};
    if (mask.defined()) {
      o.mask = device_data<T>(mask, "mask");
      o.mask_stride_c = mask.size(1) == 1 ? 0 : 1;
      o.mask_stride_b = mask.size(0) == 1 ? 0 : mask.size(1);
    }
    return o;
  }

  void sum_losses(const at::Tensor& losses, const at::Tensor& loss) const {
    sum_losses_cuda<T>(s.batch, s.channels * losses.size(1), device_data<double>(losses, "losses"),
                       mutable_device_data<T>(loss, "loss"), stream);
  }

  // Direct path ------------------------------------------------------------------------------

  at::Tensor direct_output(const at::Tensor& image, const at::Tensor& kernel) const {
    const auto out = empty_output("output");
    DirectForward<T> p{};
    p.s = s;
    p.image = device_data<T>(image, "image");
    p.kernel = device_data<T>(kernel, "kernel");
    p.output = mutable_device_data<T>(out, "output");
    direct_forward_cuda<T>(p, stream);
    return out;
  }

  // The residual, if wanted, and the loss.
  at::Tensor direct_residual(const at::Tensor& image, const at::Tensor& kernel,
                             const at::Tensor& observation, const at::Tensor& mask,
                             bool keep_residual, const at::Tensor& loss) const {
    const int64_t tiles = tiles_per_plane(s.output_height(), s.output_width());
    const auto losses = empty_losses(tiles);
    at::Tensor residual;
    DirectForward<T> p{};
    p.s = s;
    p.image = device_data<T>(image, "image");
    p.kernel = device_data<T>(kernel, "kernel");
    p.has_observation = true;
    p.observed = observed(observation, mask);
    if (keep_residual) {
      residual = empty_output("residual");
      p.output = mutable_device_data<T>(residual, "residual");
    }
    p.losses = mutable_device_data<double>(losses, "losses");
    direct_forward_cuda<T>(p, stream);
    sum_losses(losses, loss);
    return residual;
  }

  // Gradients in the image, and in the kernel, where the tensors to write to are defined.
  void direct_gradients(const at::Tensor& image, const at::Tensor& kernel,
                        const at::Tensor& residual, const at::Tensor& grad_image,
                        const at::Tensor& grad_kernel) const {
    const int64_t tiles = tiles_per_plane(s.height, s.width);
    DirectGradients<T> p{};
    p.s = s;
    p.residual = device_data<T>(residual, "residual");
    if (grad_image.defined()) {
      p.kernel = device_data<T>(kernel, "kernel");
      p.grad_image = mutable_device_data<T>(grad_image, "grad_image");
    }
    at::Tensor grad_taps;
    if (grad_kernel.defined()) {
      grad_taps =
          device_empty({s.planes(), tiles, s.kernel_height * s.kernel_width}, options, "grad_taps");
      p.image = device_data<T>(image, "image");
      p.grad_taps = mutable_device_data<T>(grad_taps, "grad_taps");
    }
    direct_gradients_cuda<T>(p, stream);
    if (grad_kernel.defined())
      sum_taps_cuda<T>(s, tiles, p.grad_taps, mutable_device_data<T>(grad_kernel, "grad_kernel"),
                       stream);
  }

  // Spectral path ----------------------------------------------------------------------------

  at::Tensor image_spectrum(const at::Tensor& image) const {
    if (in_place) return forward_fft(image, g);
    const auto grid = empty_grid("image_grid");
    image_to_grid_cuda<T>(s, g, s.keeps_size(), device_data<T>(image, "image"),
                          mutable_device_data<T>(grid, "image_grid"), stream);
    return forward_fft(grid, g);
  }

  at::Tensor residual_spectrum(const at::Tensor& residual) const {
    if (in_place) return forward_fft(residual, g);
    const auto grid = empty_grid("residual_grid");
    residual_to_grid_cuda<T>(s, g, device_data<T>(residual, "residual"),
                             mutable_device_data<T>(grid, "residual_grid"), stream);
    return forward_fft(grid, g);
  }

  at::Tensor kernel_spectrum(const at::Tensor& kernel) const {
    const auto grid = device_empty({kernels(), g.n, g.m}, options, "kernel_grid");
    kernel_to_grid_cuda<T>(s, g, device_data<T>(kernel, "kernel"),
                           mutable_device_data<T>(grid, "kernel_grid"), stream);
    return forward_fft(grid, g);
  }

  // K X on the grid, in place of the image's spectrum X.
  at::Tensor prediction(const at::Tensor& image_spectrum, const at::Tensor& kernel) const {
    const auto k = kernel_spectrum(kernel);
    multiply_spectra_cuda<T>(s, g, spectrum(k, "kernel_spectrum"),
                             spectrum(image_spectrum, "image_spectrum"), stream);
    return inverse_fft(image_spectrum, g).contiguous();
  }

  // The residual in place of the prediction, if wanted, and the loss.
  void grid_residual(const at::Tensor& prediction, const at::Tensor& observation,
                     const at::Tensor& mask, bool keep_residual, const at::Tensor& loss) const {
    const auto losses = empty_losses(loss_chunks(g));
    GridResidual<T> p{};
    p.s = s;
    p.g = g;
    p.observed = observed(observation, mask);
    p.prediction = mutable_device_data<T>(prediction, "prediction");
    p.keep_residual = keep_residual;
    p.losses = mutable_device_data<double>(losses, "losses");
    grid_residual_cuda<T>(p, stream);
    sum_losses(losses, loss);
  }

  at::Tensor image_from_spectrum(const at::Tensor& from) const {
    const auto grid = inverse_fft(from, g).contiguous();
    if (in_place) return grid;
    const auto out = empty_image("grad_image");
    grid_to_image_cuda<T>(s, g, device_data<T>(grid, "grad_grid"),
                          mutable_device_data<T>(out, "grad_image"), stream);
    return out;
  }

  // Gradients from the spectra of image (or undefined), kernel (or undefined) and second, the
  // residual's or, if `loss` is defined, the observation's spectrum; see SpectralGradients.
  std::tuple<at::Tensor, at::Tensor> spectral_gradients(const at::Tensor& image,
                                                        const at::Tensor& kernel,
                                                        const at::Tensor& second,
                                                        const at::Tensor& loss) const {
    SpectralGradients<T> p{};
    p.s = s;
    p.g = g;
    p.groups = image.defined() ? plane_groups(s, g) : s.planes() / kernels();
    if (image.defined()) p.image = spectrum(image, "image_spectrum");
    if (kernel.defined()) p.kernel = spectrum(kernel, "kernel_spectrum");
    p.second = spectrum(second, "second_spectrum");
    at::Tensor losses, partial;
    if (loss.defined()) {
      losses = empty_losses(bin_blocks(g));
      p.second_is_observation = true;
      p.losses = mutable_device_data<double>(losses, "losses");
    }
    if (image.defined()) {
      partial = device_empty({p.groups, kernels(), g.n, g.columns()},
                             options.dtype(c10::toComplexType(options.dtype().toScalarType())),
                             "grad_spectrum");
      p.grad_kernel = spectrum(partial, "grad_spectrum");
    }
    spectral_gradients_cuda<T>(p, stream);
    if (loss.defined()) sum_losses(losses, loss);
    at::Tensor grad_kernel;
    if (image.defined()) {
      if (p.groups > 1) sum_groups_cuda<T>(p.groups, kernels() * g.bins(), p.grad_kernel, stream);
      const auto grid = inverse_fft(partial.select(0, 0), g).contiguous();
      grad_kernel = empty_kernel();
      grid_to_kernel_cuda<T>(s, g, device_data<T>(grid, "kernel_grid"),
                             mutable_device_data<T>(grad_kernel, "grad_kernel"), stream);
    }
    return {kernel.defined() ? image_from_spectrum(second) : at::Tensor(), grad_kernel};
  }

  // Operators --------------------------------------------------------------------------------

  at::Tensor forward(const at::Tensor& image, const at::Tensor& kernel) const {
    if (direct) return direct_output(image, kernel);
    return prediction(image_spectrum(image), kernel)
        .narrow(2, 0, s.output_height())
        .narrow(3, 0, s.output_width())
        .contiguous();
  }

  at::Tensor adjoint(const at::Tensor& residual, const at::Tensor& kernel) const {
    if (direct) {
      const auto out = empty_image("grad_image");
      direct_gradients({}, kernel, residual, out, {});
      return out;
    }
    return std::get<0>(
        spectral_gradients({}, kernel_spectrum(kernel), residual_spectrum(residual), {}));
  }

  at::Tensor kernel_adjoint(const at::Tensor& image, const at::Tensor& residual) const {
    if (direct) {
      const auto out = empty_kernel();
      direct_gradients(image, {}, residual, {}, out);
      return out;
    }
    return std::get<1>(
        spectral_gradients(image_spectrum(image), {}, residual_spectrum(residual), {}));
  }

  at::Tensor data_term(const at::Tensor& image, const at::Tensor& kernel,
                       const at::Tensor& observation, const at::Tensor& mask) const {
    const auto loss = device_empty({s.batch}, options, "loss");
    if (direct)
      direct_residual(image, kernel, observation, mask, false, loss);
    else
      grid_residual(prediction(image_spectrum(image), kernel), observation, mask, false, loss);
    return loss;
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& image,
                                                           const at::Tensor& kernel,
                                                           const at::Tensor& observation,
                                                           const at::Tensor& mask) const {
    const auto loss = device_empty({s.batch}, options, "loss");
    if (direct) {
      const auto r = direct_residual(image, kernel, observation, mask, true, loss);
      const auto grad_image = empty_image("grad_image"), grad_kernel = empty_kernel();
      direct_gradients(image, kernel, r, grad_image, grad_kernel);
      return {loss, grad_image, grad_kernel};
    }
    const auto x = image_spectrum(image), k = kernel_spectrum(kernel);
    // Without a mask a periodic residual never has to leave the spectrum.
    if (in_place && !mask.defined()) {
      const auto [grad_image, grad_kernel] =
          spectral_gradients(x, k, forward_fft(observation, g), loss);
      return {loss, grad_image, grad_kernel};
    }
    const auto product = x.clone();
    multiply_spectra_cuda<T>(s, g, spectrum(k, "kernel_spectrum"), spectrum(product, "product"),
                             stream);
    const auto residual = inverse_fft(product, g).contiguous();
    grid_residual(residual, observation, mask, true, loss);
    const auto [grad_image, grad_kernel] = spectral_gradients(x, k, forward_fft(residual, g), {});
    return {loss, grad_image, grad_kernel};
  }
};

}  // namespace cuda
}  // namespace latentdem
