// Torch glue of the Wiener step on CUDA: dtype, FFTs and the order of the passes. Compiled for the
// emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <vector>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda_glue.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "deconv/deconv_cuda.h"
#include "deconv/wiener_glue.h"

namespace latentdem {
namespace cuda {
namespace {

// All tensors contiguous and of the compute dtype; the grid is the canvas.
template <class T>
struct Wiener {
  Blur<T> blur;
  at::Tensor estimate, observation, ratio, mask;
  at::Tensor transfer;
  int64_t passes;

  Wiener(const BlurShape& s, const WienerInputs& in, at::ScalarType type, cudaStream_t stream)
      : blur(s, in.estimate.options().dtype(type), stream),
        estimate(prepare(in.estimate, type)),
        observation(prepare(in.observation, type)),
        ratio(prepare(in.ratio, type)),
        mask(in.mask ? prepare(*in.mask, type) : at::Tensor()),
        passes(in.passes) {
    blur.g = {s.height, s.width, s.kernel_height / 2, s.kernel_width / 2};
    blur.in_place = true;
    transfer = blur.kernel_spectrum(prepare(in.kernel, type));
  }

  const BlurShape& s() const { return blur.s; }
  const SpectralGrid& g() const { return blur.g; }
  static Complex<T>* spectrum(const at::Tensor& t, const char* name) {
    return Blur<T>::spectrum(t, name);
  }

  WienerGrid<T> grid() const {
    WienerGrid<T> p{};
    p.s = s();
    p.g = g();
    p.filter.kernel = device_data<Complex<T>>(transfer, "transfer");
    p.filter.ratio = device_data<T>(ratio, "ratio");
    set_ratio_strides(p.filter, ratio, g());
    p.scale = static_cast<T>(1.0 / (static_cast<double>(g().n) * static_cast<double>(g().m)));
    return p;
  }
  MaskParams<T> mask_params() const {
    return {device_data<T>(mask, "mask"), mask.size(0) == 1 ? 0 : 1};
  }
  int64_t observation_stride() const { return observation.size(0) == 1 ? 0 : 1; }

  std::array<int64_t, 4> bins_size() const {
    return {s().batch, s().channels, g().n, g().columns()};
  }
  at::Tensor empty_spectrum(const char* name) const {
    return device_empty(bins_size(),
                        blur.options.dtype(c10::toComplexType(blur.options.dtype().toScalarType())),
                        name);
  }

  void filter(const WienerFilterPass<T>& pass) const {
    wiener_filter_cuda<T>(grid(), pass, blur.stream);
  }

  // mask * (y - k * x_hat) from the spectrum of x_hat.
  at::Tensor misfit(const at::Tensor& image) const {
    const auto product = empty_spectrum("product");
    TransferParams<T> p{};
    p.s = s();
    p.g = g();
    p.kernel = device_data<Complex<T>>(transfer, "transfer");
    p.factor = 1;
    p.input = device_data<Complex<T>>(image, "image_spectrum");
    p.output = spectrum(product, "product");
    apply_transfer_cuda<T>(p, blur.stream);
    const auto field = unscaled_inverse_fft(product, g());
    masked_misfit_cuda<T>(grid(), mask_params(), device_data<T>(observation, "observation"),
                          observation_stride(), mutable_device_data<T>(field, "misfit"),
                          blur.stream);
    return field;
  }

  // The spectrum of the misfit of every pass; `keep` asks for all, else only the last is there.
  std::vector<at::Tensor> misfit_spectra(const at::Tensor& first, bool keep) const {
    std::vector<at::Tensor> spectra{forward_fft(first, g())};
    for (int64_t pass = 1; pass < passes; ++pass) {
      const auto echo = keep ? spectra.back().clone() : spectra.back();
      filter({WienerFilter::kEcho, spectrum(echo, "echo"), nullptr, nullptr, false});
      const auto change = unscaled_inverse_fft(echo, g());
      impute_cuda<T>(grid(), mask_params(), device_data<T>(first, "misfit"),
                     mutable_device_data<T>(change, "change"), blur.stream);
      if (!keep) spectra.clear();
      spectra.push_back(forward_fft(change, g()));
    }
    return spectra;
  }

  at::Tensor solve() const {
    const auto image = forward_fft(estimate, g());
    if (!mask.defined()) {
      const auto target = forward_fft(observation, g());
      wiener_solve_cuda<T>(grid(), device_data<Complex<T>>(target, "observation_spectrum"),
                           observation_stride(), spectrum(image, "image_spectrum"), blur.stream);
      return unscaled_inverse_fft(image, g());
    }
    const auto change = misfit_spectra(misfit(image), false).back();
    wiener_correct_cuda<T>(grid(), device_data<Complex<T>>(image, "image_spectrum"),
                           spectrum(change, "misfit_spectrum"), blur.stream);
    return unscaled_inverse_fft(change, g());
  }

  // Under a mask: the gradient in the observation, by the recursion in reverse. The echo's
  // gradient is gathered if it is defined.
  at::Tensor observation_gradient(const at::Tensor& grad_spectrum,
                                  const std::vector<at::Tensor>& misfits,
                                  const at::Tensor& echo) const {
    const auto total = blur.empty_image("grad_observation");
    auto back = grad_spectrum.clone();
    filter(
        {WienerFilter::kGainTransposed, spectrum(back, "grad_spectrum"), nullptr, nullptr, false});
    for (int64_t pass = passes - 1; pass >= 0; --pass) {
      const auto field = unscaled_inverse_fft(back, g());
      impute_transposed_cuda<T>(grid(), mask_params(), pass == passes - 1, pass == 0,
                                mutable_device_data<T>(total, "grad_observation"),
                                mutable_device_data<T>(field, "grad_misfit"), blur.stream);
      if (pass == 0) break;
      back = forward_fft(field, g());
      WienerFilterPass<T> step{WienerFilter::kEcho, spectrum(back, "grad_spectrum"), nullptr,
                               nullptr, pass < passes - 1};
      if (echo.defined()) {
        step.misfit = device_data<Complex<T>>(misfits[pass - 1], "misfit_spectrum");
        step.echo = mutable_device_data<T>(echo, "echo_gradient");
      }
      filter(step);
    }
    return total;
  }

  std::vector<at::Tensor> backward(const at::Tensor& grad, bool need_observation, bool need_kernel,
                                   bool need_ratio) const {
    const bool need_filter = need_kernel || need_ratio;
    const auto none = at::empty({0}, blur.options);
    const auto grad_spectrum = forward_fft(grad, g());
    at::Tensor image, target, echo, observed, grad_observation = none, grad_kernel = none,
                                              grad_ratio = none, partial;
    std::vector<at::Tensor> misfits;
    WienerBackward<T> b{};
    b.groups = need_kernel ? plane_groups(s(), g()) : s().planes() / blur.kernels();
    b.observation_stride_b = observation_stride();
    if (need_filter) {
      image = forward_fft(estimate, g());
      b.image = device_data<Complex<T>>(image, "image_spectrum");
      if (mask.defined()) {
        misfits = misfit_spectra(misfit(image), true);
        b.misfit = device_data<Complex<T>>(misfits.back(), "misfit_spectrum");
      } else {
        target = forward_fft(observation, g());
        b.observation = device_data<Complex<T>>(target, "observation_spectrum");
      }
    }
    if (mask.defined()) {
      if (need_filter && passes > 1) {
        echo = device_empty(bins_size(), blur.options, "echo_gradient");
        b.echo = mutable_device_data<T>(echo, "echo_gradient");
      }
      const auto total = observation_gradient(grad_spectrum, misfits, echo);
      observed = forward_fft(total, g());
      b.observed = device_data<Complex<T>>(observed, "grad_observation_spectrum");
      if (need_observation) grad_observation = total;
    } else if (need_observation) {
      observed = empty_spectrum("grad_observation_spectrum");
      b.grad_observation = spectrum(observed, "grad_observation_spectrum");
    }
    b.grad = spectrum(grad_spectrum, "grad_spectrum");
    if (need_kernel) {
      partial = device_empty({b.groups, blur.kernels(), g().n, g().columns()},
                             grad_spectrum.options(), "grad_kernel_spectrum");
      b.grad_kernel = spectrum(partial, "grad_kernel_spectrum");
    }
    if (need_ratio) {
      grad_ratio = device_empty(bins_size(), blur.options, "grad_ratio");
      b.grad_ratio = mutable_device_data<T>(grad_ratio, "grad_ratio");
    }
    wiener_backward_cuda<T>(grid(), b, blur.stream);
    if (need_kernel) grad_kernel = kernel_from(b.groups, partial);
    if (need_observation && !mask.defined()) grad_observation = unscaled_inverse_fft(observed, g());
    return {unscaled_inverse_fft(grad_spectrum, g()), grad_observation, grad_kernel, grad_ratio};
  }

  // Sums over groups of planes [groups,kernels,n,M] -> the kernel's gradient.
  at::Tensor kernel_from(int64_t groups, const at::Tensor& partial) const {
    if (groups > 1)
      sum_groups_cuda<T>(groups, blur.kernels() * g().bins(),
                         spectrum(partial, "grad_kernel_spectrum"), blur.stream);
    const auto field = unscaled_inverse_fft(partial.select(0, 0), g());
    const auto out = blur.empty_kernel();
    grid_to_kernel_cuda<T>(s(), g(), device_data<T>(field, "kernel_grid"),
                           mutable_device_data<T>(out, "grad_kernel"), blur.stream);
    return out;
  }
};

}  // namespace

at::Tensor wiener_deconv2d(const at::Tensor& image_hat, const at::Tensor& observation,
                           const at::Tensor& kernel, const at::Tensor& ratio,
                           const std::optional<at::Tensor>& mask, int64_t passes) {
  const DeviceScope scope(image_hat);
  const WienerInputs in{image_hat, observation, kernel, ratio, mask, passes};
  const auto s = check_wiener(in);
  if (s.planes() == 0) return at::zeros(image_hat.sizes(), image_hat.options());
  const auto type = compute_type(image_hat, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    return Wiener<T>(s, in, type, scope.stream())
        .solve()
        .contiguous(format_of(image_hat))
        .to(image_hat.scalar_type());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wiener_deconv2d_backward(
    const at::Tensor& grad, const at::Tensor& image_hat, const at::Tensor& observation,
    const at::Tensor& kernel, const at::Tensor& ratio, const std::optional<at::Tensor>& mask,
    int64_t passes, bool need_observation, bool need_kernel, bool need_ratio) {
  const DeviceScope scope(image_hat);
  const WienerInputs in{image_hat, observation, kernel, ratio, mask, passes};
  const auto s = check_wiener(in);
  TORCH_CHECK_VALUE(grad.sizes() == image_hat.sizes(), "grad must have the shape of image_hat ",
                    image_hat.sizes(), ", found ", grad.sizes());
  check_same_device(grad, image_hat, "grad", "image_hat");
  const auto type = compute_type(image_hat, kernel);
  if (s.planes() == 0) {
    const auto options = image_hat.options().dtype(type);
    const auto none = at::zeros({0}, options);
    return {
        at::zeros(image_hat.sizes(), options),
        need_observation ? at::zeros(image_hat.sizes(), options) : none,
        need_kernel ? at::zeros(kernel.sizes(), options) : none,
        need_ratio ? at::zeros({s.batch, s.channels, s.height, s.width / 2 + 1}, options) : none};
  }
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto out = Wiener<T>(s, in, type, scope.stream())
                         .backward(prepare(grad, type), need_observation, need_kernel, need_ratio);
    return std::make_tuple(out[0], out[1], out[2], out[3]);
  });
}

}  // namespace cuda
}  // namespace latentdem
