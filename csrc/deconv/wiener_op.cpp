// Torch glue of the Wiener step: checks, layout, dtype, FFTs and the order of the passes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "bindings/api.h"
#include "blur/blur_glue.h"
#include "common/dispatch.h"
#include "deconv/deconv.h"
#include "deconv/deconv_spectral.h"
#include "deconv/wiener_glue.h"

namespace latentdem {
namespace {

template <class T, class Params>
void set_ratio(Params& p, const at::Tensor& ratio, const SpectralGrid& g) {
  p.ratio = ratio.const_data_ptr<T>();
  set_ratio_strides(p, ratio, g);
}

// For canvases of any size, and for gradients, with ATen's transforms. All tensors contiguous and
// of the compute dtype.
template <class T>
struct Wiener {
  Blur<T> blur;
  SpectralGrid g;
  at::Tensor estimate, observation, ratio, mask;
  at::Tensor transfer;
  int64_t passes;

  Wiener(const BlurShape& s, const WienerInputs& in, at::ScalarType type)
      : blur{s, in.estimate.options().dtype(type)},
        g{s.height, s.width, s.kernel_height / 2, s.kernel_width / 2},
        estimate(prepare(in.estimate, type)),
        observation(prepare(in.observation, type)),
        ratio(prepare(in.ratio, type)),
        mask(in.mask ? prepare(*in.mask, type) : at::Tensor()),
        transfer(kernel_spectrum(prepare(in.kernel, type))),
        passes(in.passes) {}

  const BlurShape& s() const { return blur.s; }

  WienerParams<T> params() const {
    WienerParams<T> p{};
    p.kernel = spectrum_data<T>(transfer);
    set_ratio<T>(p, ratio, g);
    return p;
  }

  MaskParams<T> mask_params() const {
    return {mask.const_data_ptr<T>(), mask.size(0) == 1 ? 0 : 1};
  }

  at::Tensor kernel_spectrum(const at::Tensor& kernel) const {
    const int64_t count = s().kernel_batch() * s().kernel_channels();
    auto grid = at::empty({count, g.n, g.m}, blur.options);
    embed_kernel_cpu<T>(s(), g, count, kernel.const_data_ptr<T>(),
                        grid.template mutable_data_ptr<T>());
    return forward_fft(grid, g);
  }

  at::Tensor kernel_from(const at::Tensor& spectrum) const {
    const int64_t count = s().kernel_batch() * s().kernel_channels();
    auto field = inverse_fft(spectrum, g).contiguous();
    auto out = blur.empty_kernel();
    gather_kernel_cpu<T>(s(), g, count, field.const_data_ptr<T>(),
                         out.template mutable_data_ptr<T>());
    return out;
  }

  // k * x from the spectrum of x, which is left as it is.
  at::Tensor predict(const at::Tensor& spectrum) const {
    auto product = spectrum.clone();
    spectrum_multiply_cpu<T>(s(), g, spectrum_data<T>(transfer), false,
                             mutable_spectrum<T>(product));
    return inverse_fft(product, g).contiguous();
  }

  int64_t observation_stride() const { return observation.size(0) == 1 ? 0 : 1; }

  void filter(WienerFilter kind, at::Tensor& spectrum) const {
    wiener_filter_cpu<T>(s(), g, params(), kind, mutable_spectrum<T>(spectrum));
  }

  // mask * (y - k * x_hat), given the spectrum of x_hat, which is left as it is.
  at::Tensor misfit(const at::Tensor& spectrum) const {
    auto field = predict(spectrum);
    masked_misfit_cpu<T>(s(), mask_params(), observation.const_data_ptr<T>(), observation_stride(),
                         field.template mutable_data_ptr<T>());
    return field;
  }

  // The spectrum of the misfit of every pass; `keep` asks for all, else only the last is there.
  std::vector<at::Tensor> misfit_spectra(const at::Tensor& first, bool keep) const {
    std::vector<at::Tensor> spectra{forward_fft(first, g)};
    for (int64_t pass = 1; pass < passes; ++pass) {
      auto echo = keep ? spectra.back().clone() : spectra.back();
      filter(WienerFilter::kEcho, echo);
      auto change = inverse_fft(echo, g).contiguous();
      impute_cpu<T>(s(), mask_params(), first.const_data_ptr<T>(),
                    change.template mutable_data_ptr<T>());
      if (!keep) spectra.clear();
      spectra.push_back(forward_fft(change, g));
    }
    return spectra;
  }

  at::Tensor solve() const {
    auto spectrum = forward_fft(estimate, g);
    if (!mask.defined()) {
      const auto target = forward_fft(observation, g);
      wiener_solve_cpu<T>(s(), g, params(), spectrum_data<T>(target), observation_stride(),
                          mutable_spectrum<T>(spectrum));
      return inverse_fft(spectrum, g);
    }
    auto change = misfit_spectra(misfit(spectrum), false).back();
    filter(WienerFilter::kGain, change);
    return inverse_fft(change, g).add_(estimate);
  }

  std::vector<at::Tensor> backward(const at::Tensor& grad, bool need_observation, bool need_kernel,
                                   bool need_ratio) const {
    const bool need_filter = need_kernel || need_ratio;
    const auto none = at::empty({0}, blur.options);
    const auto grad_spectrum = forward_fft(grad, g);
    at::Tensor image, echo, grad_observation, grad_prediction;
    std::vector<at::Tensor> misfits;
    if (need_filter) {
      image = forward_fft(estimate, g);
      if (mask.defined()) {
        misfits = misfit_spectra(misfit(image), true);
      } else {
        auto predicted = image.clone();
        spectrum_multiply_cpu<T>(s(), g, spectrum_data<T>(transfer), false,
                                 mutable_spectrum<T>(predicted));
        misfits.push_back(predicted.neg_().add_(forward_fft(observation, g)));
      }
    }
    auto back = grad_spectrum.clone();
    filter(WienerFilter::kGainTransposed, back);
    if (!mask.defined()) {
      if (need_observation) grad_observation = inverse_fft(back, g);
      grad_prediction = back.neg();
    } else {
      auto field = inverse_fft(back, g).contiguous();
      auto total = at::zeros_like(field);
      if (need_filter && passes > 1)
        echo = at::zeros({s().batch, s().channels, g.n, g.columns()}, blur.options);
      for (int64_t pass = passes - 1; pass >= 1; --pass) {
        impute_transposed_cpu<T>(s(), mask_params(), total.template mutable_data_ptr<T>(),
                                 field.template mutable_data_ptr<T>());
        auto spectrum = forward_fft(field, g);
        if (echo.defined())
          accumulate_echo_cpu<T>(s(), g, spectrum_data<T>(misfits[pass - 1]),
                                 spectrum_data<T>(spectrum), echo.template mutable_data_ptr<T>());
        filter(WienerFilter::kEcho, spectrum);
        field = inverse_fft(spectrum, g).contiguous();
      }
      grad_observation = total.add_(field);
      apply_mask_cpu<T>(s(), mask_params(), grad_observation.template mutable_data_ptr<T>());
      grad_prediction = forward_fft(grad_observation, g).neg_();
    }
    at::Tensor grad_kernel = none, grad_ratio = none;
    if (need_filter) {
      auto transfer_grad = at::empty_like(transfer);
      if (need_ratio)
        grad_ratio = at::empty({s().batch, s().channels, g.n, g.columns()}, blur.options);
      WienerGradientParams<T> p{};
      p.misfit = spectrum_data<T>(misfits.back());
      p.grad = spectrum_data<T>(grad_spectrum);
      p.echo = echo.defined() ? echo.template const_data_ptr<T>() : nullptr;
      p.image = spectrum_data<T>(image);
      p.grad_prediction = spectrum_data<T>(grad_prediction);
      p.grad_kernel = mutable_spectrum<T>(transfer_grad);
      p.grad_ratio = need_ratio ? grad_ratio.template mutable_data_ptr<T>() : nullptr;
      wiener_gradients_cpu<T>(s(), g, params(), p);
      if (need_kernel) grad_kernel = kernel_from(transfer_grad);
    }
    spectrum_multiply_cpu<T>(s(), g, spectrum_data<T>(transfer), true,
                             mutable_spectrum<T>(grad_prediction));
    auto grad_image = inverse_fft(grad_prediction, g).add_(grad);
    return {grad_image, need_observation ? grad_observation : none, grad_kernel, grad_ratio};
  }
};

// On canvases that the transforms of common/fft.h take.
template <class T>
at::Tensor solve_spectral(const BlurShape& s, const WienerInputs& in, at::ScalarType type,
                          at::MemoryFormat format) {
  const auto estimate = in.estimate.to(type), observation = in.observation.to(type);
  const auto kernel = prepare(in.kernel, type), ratio = prepare(in.ratio, type);
  const auto mask = in.mask ? in.mask->to(type) : at::Tensor();
  auto out = at::empty(estimate.sizes(), estimate.options(), format);
  WienerSpectral<T> p{};
  p.s = s;
  p.g = make_grid(s);
  p.kernel = kernel.template const_data_ptr<T>();
  set_ratio<T>(p, ratio, p.g);
  p.estimate = view<T>(estimate);
  p.observation = view<T>(observation);
  if (mask.defined()) p.mask = view<T>(mask);
  p.passes = in.passes;
  p.output = mutable_view<T>(out);
  wiener_spectral_cpu(p);
  return out;
}

}  // namespace

at::Tensor wiener_deconv2d(const at::Tensor& image_hat, const at::Tensor& observation,
                           const at::Tensor& kernel, const at::Tensor& ratio,
                           const std::optional<at::Tensor>& mask, int64_t passes) {
  const WienerInputs in{image_hat, observation, kernel, ratio, mask, passes};
  const auto s = check_wiener(in);
  if (s.planes() == 0) return at::zeros(image_hat.sizes(), image_hat.options());
  const auto type = compute_type(image_hat, kernel);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto format = format_of(image_hat);
    if (wraps_in_place(s))
      return solve_spectral<T>(s, in, type, format).to(image_hat.scalar_type());
    return Wiener<T>(s, in, type).solve().contiguous(format).to(image_hat.scalar_type());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wiener_deconv2d_backward(
    const at::Tensor& grad, const at::Tensor& image_hat, const at::Tensor& observation,
    const at::Tensor& kernel, const at::Tensor& ratio, const std::optional<at::Tensor>& mask,
    int64_t passes, bool need_observation, bool need_kernel, bool need_ratio) {
  const WienerInputs in{image_hat, observation, kernel, ratio, mask, passes};
  const auto s = check_wiener(in);
  TORCH_CHECK_VALUE(grad.sizes() == image_hat.sizes(), "grad must have the shape of image_hat ",
                    image_hat.sizes(), ", found ", grad.sizes());
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
    const auto out = Wiener<T>(s, in, type)
                         .backward(prepare(grad, type), need_observation, need_kernel, need_ratio);
    return std::make_tuple(out[0], out[1], out[2], out[3]);
  });
}

}  // namespace latentdem
