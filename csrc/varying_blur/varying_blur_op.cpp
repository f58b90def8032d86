// Torch glue of spatially varying blur: checks, layout, dtype, the patches' grid and the FFTs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "bindings/api.h"
#include "blur/blur_glue.h"
#include "common/dispatch.h"
#include "varying_blur/varying_blur.h"
#include "varying_blur/varying_blur_glue.h"

namespace latentdem {
namespace {

int64_t grid_side(int64_t box, int64_t kernel, int64_t image, Boundary boundary) {
  const int64_t filled = box + kernel - 1;
  // Around a circle that is itself a good transform length, the transform wraps as the blur does.
  if (boundary == Boundary::kCircular && filled >= image && is_fft_size(image)) return image;
  return next_fft_size(filled);
}

template <class T>
struct VaryingBlur {
  std::vector<PatchBox> boxes;
  VaryingShape s;
  at::Tensor weights;
  at::TensorOptions options;

  VaryingBlur(const BlurShape& blur, int64_t kernel_batch, const at::Tensor& patch_weights)
      : boxes(patch_weights.size(0)), weights(patch_weights), options(patch_weights.options()) {
    find_boxes_cpu<T>(blur, weights.size(0), weights.const_data_ptr<T>(), boxes.data());
    int64_t height = 1, width = 1;
    for (const PatchBox& box : boxes) {
      height = std::max(height, box.height);
      width = std::max(width, box.width);
    }
    s = {blur,
         weights.size(0),
         kernel_batch,
         boxes.data(),
         grid_side(height, blur.kernel_height, blur.height, blur.boundary),
         grid_side(width, blur.kernel_width, blur.width, blur.boundary)};
  }
  VaryingBlur(const VaryingBlur&) = delete;  // the shape points to the boxes
  VaryingBlur& operator=(const VaryingBlur&) = delete;

  SpectralGrid grid() const { return {s.n, s.m, 0, 0}; }

  at::Tensor empty_grids() const { return at::empty({s.patch_planes(), s.n, s.m}, options); }

  at::Tensor kernel_spectrum(const at::Tensor& kernels) const {
    const int64_t count = s.kernel_batch * s.patches;
    auto taps = at::empty({count, s.n, s.m}, options);
    embed_kernel_cpu<T>(s.blur, grid(), count, kernels.const_data_ptr<T>(),
                        taps.template mutable_data_ptr<T>());
    return forward_fft(taps, grid());
  }

  at::Tensor source_spectra(const at::Tensor& image) const {
    auto grids = empty_grids();
    cut_source_cpu<T>(s, weights.const_data_ptr<T>(), image.const_data_ptr<T>(),
                      grids.template mutable_data_ptr<T>());
    return forward_fft(grids, grid());
  }

  at::Tensor target_spectra(const at::Tensor& residual) const {
    auto grids = empty_grids();
    cut_target_cpu<T>(s, residual.const_data_ptr<T>(), grids.template mutable_data_ptr<T>());
    return forward_fft(grids, grid());
  }

  at::Tensor image_from(const at::Tensor& spectra) const {
    const auto grids = inverse_fft(spectra, grid()).contiguous();
    auto out = at::empty({s.blur.batch, s.blur.channels, s.blur.height, s.blur.width}, options);
    add_source_cpu<T>(s, weights.const_data_ptr<T>(), grids.template const_data_ptr<T>(),
                      out.template mutable_data_ptr<T>());
    return out;
  }

  at::Tensor blurred_from(const at::Tensor& spectra) const {
    const auto grids = inverse_fft(spectra, grid()).contiguous();
    auto out = at::empty(output_size(s.blur), options);
    add_target_cpu<T>(s, grids.template const_data_ptr<T>(), out.template mutable_data_ptr<T>());
    return out;
  }

  at::Tensor kernels_from(const at::Tensor& spectrum) const {
    const auto grids = inverse_fft(spectrum, grid()).contiguous();
    auto out =
        at::empty({s.kernel_batch, s.patches, s.blur.kernel_height, s.blur.kernel_width}, options);
    gather_kernel_cpu<T>(s.blur, grid(), s.kernel_batch * s.patches,
                         grids.template const_data_ptr<T>(), out.template mutable_data_ptr<T>());
    return out;
  }

  void multiply_by(const at::Tensor& kernel, bool conjugate, at::Tensor& spectra) const {
    patch_multiply_cpu<T>(s, spectrum_data<T>(kernel), conjugate, mutable_spectrum<T>(spectra));
  }

  at::Tensor forward(const at::Tensor& image, const at::Tensor& kernels) const {
    auto spectra = source_spectra(image);
    multiply_by(kernel_spectrum(kernels), false, spectra);
    return blurred_from(spectra);
  }

  at::Tensor adjoint(const at::Tensor& residual, const at::Tensor& kernels) const {
    auto spectra = target_spectra(residual);
    multiply_by(kernel_spectrum(kernels), true, spectra);
    return image_from(spectra);
  }

  // Gradient in the kernels; `residual` holds spectra and, given a kernel, those of the image
  // gradient afterwards.
  at::Tensor kernel_gradient(const at::Tensor& image, const at::Tensor& kernel,
                             at::Tensor& residual) const {
    auto spectrum = at::empty({s.kernel_batch * s.patches, s.n, s.m / 2 + 1}, image.options());
    PatchGradientParams<T> p{};
    p.image = spectrum_data<T>(image);
    p.kernel = kernel.defined() ? spectrum_data<T>(kernel) : nullptr;
    p.residual = mutable_spectrum<T>(residual);
    p.grad_kernel = mutable_spectrum<T>(spectrum);
    patch_gradients_cpu<T>(s, p);
    return kernels_from(spectrum);
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& image,
                                                           const at::Tensor& kernels,
                                                           const at::Tensor& observation,
                                                           const at::Tensor& mask) const {
    const auto x = source_spectra(image), k = kernel_spectrum(kernels);
    auto work = x.clone();
    multiply_by(k, false, work);
    auto loss = at::empty({s.blur.batch}, options);
    const Blur<T> blur{s.blur, options};
    work = target_spectra(blur.residual(blurred_from(work), observation, mask, loss));
    const auto grad_kernels = kernel_gradient(x, k, work);
    return {loss, image_from(work), grad_kernels};
  }
};

}  // namespace

at::Tensor varying_blur2d(const at::Tensor& image, const at::Tensor& kernels,
                          const at::Tensor& weights, std::string_view boundary) {
  check_tensors(image, "image", kernels, weights);
  const auto s = check_patches(image.sizes(), kernels.sizes(), weights, boundary);
  if (s.planes() == 0) return at::zeros(output_size(s), image.options());
  const auto type = compute_type(image, kernels);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type));
    return blur.forward(prepare(image, type), prepare(kernels, type)).to(image.scalar_type());
  });
}

at::Tensor varying_blur2d_adjoint(const at::Tensor& residual, const at::Tensor& kernels,
                                  const at::Tensor& weights, std::string_view boundary) {
  check_tensors(residual, "residual", kernels, weights);
  const auto full = unblurred_size(residual, weights);
  const auto s = check_patches(full, kernels.sizes(), weights, boundary);
  check_blurred(s, residual);
  if (s.planes() == 0) return at::zeros(full, residual.options());
  const auto type = compute_type(residual, kernels);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type));
    return blur.adjoint(prepare(residual, type), prepare(kernels, type)).to(residual.scalar_type());
  });
}

at::Tensor varying_blur2d_kernels(const at::Tensor& image, const at::Tensor& residual,
                                  const at::Tensor& weights, std::string_view boundary,
                                  at::IntArrayRef kernels_size) {
  check_tensors(image, "image", residual, weights);
  const auto s = check_patches(image.sizes(), kernels_size, weights, boundary);
  check_observation(s, image, residual, std::nullopt);
  if (s.planes() == 0) return at::zeros(kernels_size, image.options());
  const auto type = compute_type(image, residual);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const VaryingBlur<T> blur(s, kernels_size[0], prepare(weights, type));
    auto spectra = blur.target_spectra(prepare(residual, type));
    return blur.kernel_gradient(blur.source_spectra(prepare(image, type)), at::Tensor(), spectra)
        .to(image.scalar_type());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varying_blur_gradients(
    const at::Tensor& image, const at::Tensor& kernels, const at::Tensor& weights,
    const at::Tensor& observation, const std::optional<at::Tensor>& mask,
    std::string_view boundary) {
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
    const VaryingBlur<T> blur(s, kernels.size(0), prepare(weights, type));
    const auto [loss, grad_image, grad_kernels] =
        blur.gradients(prepare(image, type), prepare(kernels, type), prepare(observation, type),
                       mask ? prepare(*mask, type) : at::Tensor());
    return std::make_tuple(loss, grad_image.to(image.scalar_type()),
                           grad_kernels.to(kernels.scalar_type()));
  });
}

}  // namespace latentdem
