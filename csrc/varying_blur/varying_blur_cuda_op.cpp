// Torch glue of spatially varying blur on CUDA: dtype, the choice of path and the FFTs. Compiled
// for the emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings/api_cuda.h"
#include "blur/blur_cuda_glue.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "varying_blur/varying_blur_cuda.h"
#include "varying_blur/varying_blur_glue.h"
#include "varying_blur/varying_blur_path_cuda.h"

namespace latentdem {
namespace cuda {
namespace {

// All tensors contiguous and of the compute dtype.
template <class T>
struct VaryingBlur {
  Blur<T> blur;
  PatchShape s;
  at::Tensor weights;
  bool direct;
  T scale;

  VaryingBlur(const BlurShape& shape, int64_t kernel_batch, const at::Tensor& patch_weights,
              cudaStream_t stream)
      : blur(shape, patch_weights.options(), stream),
        s{shape, patch_weights.size(0), kernel_batch},
        weights(patch_weights),
        direct(prefer_direct(s, blur.g)),
        scale(
            static_cast<T>(1.0 / (static_cast<double>(blur.g.n) * static_cast<double>(blur.g.m)))) {
  }

  const BlurShape& shape() const { return blur.s; }
  const SpectralGrid& g() const { return blur.g; }
  bool extends() const { return !blur.in_place && shape().keeps_size(); }
  const T* weights_data() const { return device_data<T>(weights, "weights"); }
  static Complex<T>* spectrum(const at::Tensor& t, const char* name) {
    return Blur<T>::spectrum(t, name);
  }
  at::Tensor empty_spectrum(at::IntArrayRef planes, const char* name) const {
    auto size = planes.vec();
    size.insert(size.end(), {g().n, g().columns()});
    return device_empty(
        size, blur.options.dtype(c10::toComplexType(blur.options.dtype().toScalarType())), name);
  }
  at::Tensor empty_kernels() const {
    return device_empty({s.kernel_batch, s.patches, shape().kernel_height, shape().kernel_width},
                        blur.options, "grad_kernels");
  }

  // Direct path ------------------------------------------------------------------------------

  VaryingForward<T> forward_params(const at::Tensor& image, const at::Tensor& kernels) const {
    VaryingForward<T> p{};
    p.s = s;
    p.image = device_data<T>(image, "image");
    p.kernels = device_data<T>(kernels, "kernels");
    p.weights = weights_data();
    return p;
  }

  at::Tensor direct_adjoint(const at::Tensor& residual, const at::Tensor& kernels) const {
    const auto out = blur.empty_image("grad_image");
    VaryingAdjoint<T> p{};
    p.s = s;
    p.residual = device_data<T>(residual, "residual");
    p.kernels = device_data<T>(kernels, "kernels");
    p.weights = weights_data();
    p.grad_image = mutable_device_data<T>(out, "grad_image");
    varying_adjoint_cuda<T>(p, blur.stream);
    return out;
  }

  at::Tensor direct_kernels(const at::Tensor& image, const at::Tensor& residual) const {
    const int64_t tiles = tiles_per_plane(shape().output_height(), shape().output_width());
    const int64_t columns = s.patches * shape().kernel_height * shape().kernel_width;
    const auto grad_taps =
        device_empty({shape().planes() * tiles, columns}, blur.options, "grad_taps");
    VaryingTaps<T> p{};
    p.s = s;
    p.image = device_data<T>(image, "image");
    p.residual = device_data<T>(residual, "residual");
    p.weights = weights_data();
    p.grad_taps = mutable_device_data<T>(grad_taps, "grad_taps");
    varying_taps_cuda<T>(p, blur.stream);
    const auto out = empty_kernels();
    sum_rows_cuda<T>(s.kernel_batch, s.shared_planes() * tiles, columns, p.grad_taps,
                     mutable_device_data<T>(out, "grad_kernels"), blur.stream);
    return out;
  }

  // Spectral path ----------------------------------------------------------------------------

  // [B,C,P,n,M]
  at::Tensor source_spectra(const at::Tensor& image) const {
    const auto grids =
        device_empty({shape().planes(), s.patches, g().n, g().m}, blur.options, "patch_grids");
    cut_patches_cuda<T>(s, g(), extends(), device_data<T>(image, "image"), weights_data(),
                        mutable_device_data<T>(grids, "patch_grids"), blur.stream);
    return forward_fft(grids, g());
  }

  // [Bk,P,n,M]
  at::Tensor kernel_spectra(const at::Tensor& kernels) const {
    const auto grids = device_empty({s.kernels(), g().n, g().m}, blur.options, "kernel_grids");
    kernel_to_grid_cuda<T>(kernel_shape(), g(), device_data<T>(kernels, "kernels"),
                           mutable_device_data<T>(grids, "kernel_grids"), blur.stream);
    return forward_fft(grids, g());
  }

  // The blurred image in the corner of its grid [B,C,n,m].
  at::Tensor prediction(const at::Tensor& sources, const at::Tensor& kernels) const {
    const auto sum = empty_spectrum({shape().batch, shape().channels}, "prediction_spectrum");
    sum_patches_cuda<T>(s, g(), scale, device_data<Complex<T>>(sources, "patch_spectra"),
                        device_data<Complex<T>>(kernels, "kernel_spectra"),
                        spectrum(sum, "prediction_spectrum"), blur.stream);
    return unscaled_inverse_fft(sum, g());
  }

  // Gradients in image, given the kernels' spectra, and in the kernels, given those of the
  // sources, whose memory is used up.
  std::tuple<at::Tensor, at::Tensor> spectral_gradients(const at::Tensor& sources,
                                                        const at::Tensor& kernels,
                                                        const at::Tensor& residual) const {
    PatchGradients<T> p{};
    p.s = s;
    p.g = g();
    p.scale = scale;
    p.groups = sources.defined() ? group_count(g(), s.kernels(), s.shared_planes()) : 1;
    p.residual = device_data<Complex<T>>(residual, "residual_spectrum");
    at::Tensor partial, patches, grad_image, grad_kernels;
    if (sources.defined()) {
      p.image = device_data<Complex<T>>(sources, "patch_spectra");
      partial = empty_spectrum({p.groups, s.kernels()}, "grad_spectra");
      p.grad_kernels = spectrum(partial, "grad_spectra");
    }
    if (kernels.defined()) {
      p.kernels = device_data<Complex<T>>(kernels, "kernel_spectra");
      patches = sources.defined() ? sources
                                  : empty_spectrum({shape().planes(), s.patches}, "patch_spectra");
      p.patches = spectrum(patches, "patch_spectra");
    }
    patch_gradients_cuda<T>(p, blur.stream);
    if (sources.defined()) {
      if (p.groups > 1)
        sum_groups_cuda<T>(p.groups, s.kernels() * g().bins(), p.grad_kernels, blur.stream);
      const auto grids = unscaled_inverse_fft(partial.select(0, 0), g());
      grad_kernels = empty_kernels();
      grid_to_kernel_cuda<T>(kernel_shape(), g(), device_data<T>(grids, "kernel_grids"),
                             mutable_device_data<T>(grad_kernels, "grad_kernels"), blur.stream);
    }
    if (kernels.defined()) {
      const auto grids = unscaled_inverse_fft(patches, g());
      grad_image = blur.empty_image("grad_image");
      fold_patches_cuda<T>(s, g(), extends(), device_data<T>(grids, "patch_grids"), weights_data(),
                           mutable_device_data<T>(grad_image, "grad_image"), blur.stream);
    }
    return {grad_image, grad_kernels};
  }

  // Operators --------------------------------------------------------------------------------

  at::Tensor forward(const at::Tensor& image, const at::Tensor& kernels) const {
    if (direct) {
      const auto out = blur.empty_output("output");
      auto p = forward_params(image, kernels);
      p.output = mutable_device_data<T>(out, "output");
      varying_forward_cuda<T>(p, blur.stream);
      return out;
    }
    return prediction(source_spectra(image), kernel_spectra(kernels))
        .narrow(2, 0, shape().output_height())
        .narrow(3, 0, shape().output_width())
        .contiguous();
  }

  at::Tensor adjoint(const at::Tensor& residual, const at::Tensor& kernels) const {
    if (direct) return direct_adjoint(residual, kernels);
    return std::get<0>(
        spectral_gradients({}, kernel_spectra(kernels), blur.residual_spectrum(residual)));
  }

  at::Tensor kernel_adjoint(const at::Tensor& image, const at::Tensor& residual) const {
    if (direct) return direct_kernels(image, residual);
    return std::get<1>(
        spectral_gradients(source_spectra(image), {}, blur.residual_spectrum(residual)));
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& image,
                                                           const at::Tensor& kernels,
                                                           const at::Tensor& observation,
                                                           const at::Tensor& mask) const {
    const auto loss = device_empty({shape().batch}, blur.options, "loss");
    if (direct) {
      const auto losses =
          blur.empty_losses(tiles_per_plane(shape().output_height(), shape().output_width()));
      const auto residual = blur.empty_output("residual");
      auto p = forward_params(image, kernels);
      p.has_observation = true;
      p.observed = blur.observed(observation, mask);
      p.output = mutable_device_data<T>(residual, "residual");
      p.losses = mutable_device_data<double>(losses, "losses");
      varying_forward_cuda<T>(p, blur.stream);
      blur.sum_losses(losses, loss);
      return {loss, direct_adjoint(residual, kernels), direct_kernels(image, residual)};
    }
    const auto x = source_spectra(image), k = kernel_spectra(kernels);
    const auto residual = prediction(x, k);
    blur.grid_residual(residual, observation, mask, true, loss);
    const auto [grad_image, grad_kernels] = spectral_gradients(x, k, forward_fft(residual, g()));
    return {loss, grad_image, grad_kernels};
  }

 private:
  // As many kernels of that size, for the steps of the uniform blur.
  BlurShape kernel_shape() const {
    BlurShape k = shape();
    k.batch = s.kernel_batch;
    k.channels = s.patches;
    k.kernel_stride_b = s.kernel_batch == 1 ? 0 : s.patches;
    k.kernel_stride_c = 1;
    return k;
  }
};

}  // namespace

at::Tensor varying_blur2d(const at::Tensor& image, const at::Tensor& kernels,
                          const at::Tensor& weights, std::string_view boundary) {
  const DeviceScope scope(image);
  check_tensors(image, "image", kernels, weights);
  const auto s = check_patches(image.sizes(), kernels.sizes(), weights, boundary);
  if (s.planes() == 0) return at::zeros(output_size(s), image.options());
  const auto type = compute_type(image, kernels);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type), scope.stream());
    return blur.forward(prepare(image, type), prepare(kernels, type)).to(image.scalar_type());
  });
}

at::Tensor varying_blur2d_adjoint(const at::Tensor& residual, const at::Tensor& kernels,
                                  const at::Tensor& weights, std::string_view boundary) {
  const DeviceScope scope(residual);
  check_tensors(residual, "residual", kernels, weights);
  const auto full = unblurred_size(residual, weights);
  const auto s = check_patches(full, kernels.sizes(), weights, boundary);
  check_blurred(s, residual);
  if (s.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernels);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type), scope.stream());
    return blur.adjoint(prepare(residual, type), prepare(kernels, type)).to(residual.scalar_type());
  });
}

at::Tensor varying_blur2d_kernels(const at::Tensor& image, const at::Tensor& residual,
                                  const at::Tensor& weights, std::string_view boundary,
                                  at::IntArrayRef kernels_size) {
  const DeviceScope scope(image);
  check_tensors(image, "image", residual, weights);
  const auto s = check_patches(image.sizes(), kernels_size, weights, boundary);
  check_observation(s, image, residual, std::nullopt);
  if (s.planes() == 0) return at::zeros(kernels_size, image.options());
  const auto type = compute_type(image, residual);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels_size[0], prepare(weights, type), scope.stream());
    return blur.kernel_adjoint(prepare(image, type), prepare(residual, type))
        .to(image.scalar_type());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varying_blur_gradients(
    const at::Tensor& image, const at::Tensor& kernels, const at::Tensor& weights,
    const at::Tensor& observation, const std::optional<at::Tensor>& mask,
    std::string_view boundary) {
  const DeviceScope scope(image);
  check_tensors(image, "image", kernels, weights);
  const auto s = check_patches(image.sizes(), kernels.sizes(), weights, boundary);
  check_observation(s, image, observation, mask);
  const auto type = compute_type(image, kernels);
  if (s.planes() == 0)
    return {at::zeros({s.batch}, image.options().dtype(type)),
            at::zeros(image.sizes(), image.options()),
            at::zeros(kernels.sizes(), kernels.options())};
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type), scope.stream());
    const auto [loss, grad_image, grad_kernels] =
        blur.gradients(prepare(image, type), prepare(kernels, type), prepare(observation, type),
                       mask ? prepare(*mask, type) : at::Tensor());
    return std::make_tuple(loss, grad_image.to(image.scalar_type()),
                           grad_kernels.to(kernels.scalar_type()));
  });
}

}  // namespace cuda
}  // namespace latentdem
