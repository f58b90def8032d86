// Torch glue of the kernel estimate: checks, transforms, and the half-quadratic loop.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/fft_irfft2.h>
#include <ATen/ops/fft_rfft2.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "bindings/api.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "common/fft_size.h"
#include "common/strided_glue.h"
#include "kernel_map/kernel_map_spectral.h"

namespace latentdem {
namespace {

bool parse_domain(std::string_view domain) {
  TORCH_CHECK_VALUE(domain == "image" || domain == "gradient",
                    "domain must be image or gradient, found '", std::string(domain), "'");
  return domain == "gradient";
}

KernelPrior parse_prior(std::string_view prior) {
  if (prior == "none") return KernelPrior::kNone;
  if (prior == "l1") return KernelPrior::kL1;
  TORCH_CHECK_VALUE(prior == "l2", "prior must be none, l1, l2 or a callable, found '",
                    std::string(prior), "'");
  return KernelPrior::kL2;
}

void check_images(const at::Tensor& image, const at::Tensor& observation,
                  const std::optional<at::Tensor>& window, at::IntArrayRef kernel_size) {
  check_rank(image, 4, "image", "[B,C,H,W]");
  check_real(image, "image");
  check_real(observation, "observation");
  check_same_device(observation, image, "observation", "image");
  TORCH_CHECK_VALUE(observation.sizes() == image.sizes(),
                    "observation must have the shape of image ", image.sizes(), ", found ",
                    observation.sizes());
  TORCH_CHECK_VALUE(kernel_size.size() == 2 && kernel_size[0] > 0 && kernel_size[1] > 0,
                    "kernel_size must be two positive sizes, found ", kernel_size);
  TORCH_CHECK_VALUE(kernel_size[0] <= image.size(2) && kernel_size[1] <= image.size(3),
                    "kernel must be no larger than image and observation (", image.size(2), " x ",
                    image.size(3), "), found ", kernel_size);
  if (!window.has_value()) return;
  check_real(*window, "window");
  check_same_device(*window, image, "window", "image");
  TORCH_CHECK_VALUE(window->dim() == 4 && window->size(1) == 1 &&
                        (window->size(0) == 1 || window->size(0) == image.size(0)) &&
                        window->size(2) == image.size(2) && window->size(3) == image.size(3),
                    "window must have shape [B|1,1,H,W] with image's H and W (", image.size(2),
                    " x ", image.size(3), "), found ", window->sizes());
}

void check_variance(double image_variance) {
  TORCH_CHECK_VALUE(image_variance >= 0 && std::isfinite(image_variance),
                    "image_variance must be finite and not negative, found ", image_variance);
}

template <class T>
Complex<T>* spectrum(const at::Tensor& t) {
  return reinterpret_cast<Complex<T>*>(t.mutable_data_ptr());
}

at::Tensor forward_fft(const at::Tensor& t, int64_t n, int64_t m) {
  return at::fft_rfft2(t, std::array<int64_t, 2>{n, m}).contiguous();
}

at::Tensor inverse_fft(const at::Tensor& t, int64_t n, int64_t m) {
  return at::fft_irfft2(t, std::array<int64_t, 2>{n, m}).contiguous();
}

// The transforms' grid: a window means that the fields end at the border, so that they are
// correlated without wrapping round.
std::array<int64_t, 2> grid_size(const FieldShape& s, bool linear, int64_t kh, int64_t kw) {
  if (!linear) return {s.height, s.width};
  return {next_fft_size(s.height + kh - 1), next_fft_size(s.width + kw - 1)};
}

// What is correlated: the image itself if nothing is to be done to it, else its fields.
template <class T>
at::Tensor make_fields(const FieldShape& s, const at::Tensor& image, const at::Tensor& window) {
  if (!s.gradient && !window.defined()) return image.contiguous();
  auto fields = at::empty({s.batch, s.fields(), s.height, s.width}, image.options());
  make_fields_cpu<T>(s, view<T>(image), window.defined() ? window.const_data_ptr<T>() : nullptr,
                     fields.template mutable_data_ptr<T>());
  return fields;
}

// Pooled power and cross spectra on the grid n x m.
template <class T>
struct Spectra {
  int64_t n, m;
  at::Tensor power, cross;  // [B,n,M]

  Spectra(const FieldShape& s, std::array<int64_t, 2> grid, const at::Tensor& image_fields,
          const at::Tensor& observation_fields)
      : n(grid[0]), m(grid[1]) {
    const auto x = forward_fft(image_fields, n, m), y = forward_fft(observation_fields, n, m);
    const int64_t bins = n * (m / 2 + 1);
    power = at::empty({s.batch, n, m / 2 + 1}, x.options());
    cross = at::empty_like(power);
    pool_spectra_cpu<T>(s.batch, s.fields(), bins, spectrum<T>(x), spectrum<T>(y),
                        spectrum<T>(power), spectrum<T>(cross));
  }
};

FieldShape field_shape(const at::Tensor& image, const at::Tensor& window, bool gradient) {
  FieldShape s{image.size(0), image.size(1), image.size(2), image.size(3), gradient, 0};
  s.window_stride_b = window.defined() && window.size(0) > 1 ? 1 : 0;
  return s;
}

// Whether the transforms of common/fft.h take this grid.
bool is_native(std::array<int64_t, 2> grid) {
  return grid[0] % 2 == 0 && is_fft_size(grid[0]) && is_fft_size(grid[1]);
}

// y is undefined where its prepared spectra are given.
template <class T>
std::tuple<at::Tensor, at::Tensor> correlations(const FieldShape& s, std::array<int64_t, 2> grid,
                                                const at::Tensor& x, const at::Tensor& y,
                                                const std::optional<at::Tensor>& prepared,
                                                int64_t kh, int64_t kw) {
  const auto [n, m] = grid;
  auto autocorrelation = at::empty({s.batch, 2 * kh - 1, 2 * kw - 1}, x.options());
  auto crosscorrelation = at::empty({s.batch, kh, kw}, x.options());
  T* const lags = autocorrelation.template mutable_data_ptr<T>();
  T* const cross = crosscorrelation.template mutable_data_ptr<T>();
  if (is_native(grid)) {
    correlations_cpu<T>({s.batch, s.fields(), s.height, s.width, n, m, kh, kw,
                         x.const_data_ptr<T>(), prepared ? nullptr : y.const_data_ptr<T>(),
                         prepared ? prepared->const_data_ptr<T>() : nullptr, lags, cross});
    return {autocorrelation, crosscorrelation};
  }
  // A periodic image of awkward size must be transformed at that size.
  const Spectra<T> spectra(s, grid, x, y);
  gather_wrapped_cpu<T>(s.batch, n, m, 2 * kh - 1, 2 * kw - 1, kh - 1, kw - 1,
                        inverse_fft(spectra.power, n, m).template const_data_ptr<T>(), lags);
  gather_wrapped_cpu<T>(s.batch, n, m, kh, kw, kh / 2, kw / 2,
                        inverse_fft(spectra.cross, n, m).template const_data_ptr<T>(), cross);
  return {autocorrelation, crosscorrelation};
}

// The prepared spectra if they can be used.
template <class T>
std::optional<at::Tensor> check_prepared(const std::optional<at::Tensor>& prepared,
                                         const FieldShape& s, std::array<int64_t, 2> grid) {
  if (!prepared.has_value()) return std::nullopt;
  const auto type = c10::CppTypeToScalarType<T>::value;
  const std::array<int64_t, 3> size{s.batch, s.fields(),
                                    is_native(grid) ? spectrum_values<T>(grid[0], grid[1]) : 0};
  TORCH_CHECK_VALUE(prepared->sizes() == at::IntArrayRef(size) && prepared->scalar_type() == type,
                    "prepared must come from kernel_map_prepare with this image size, kernel size, "
                    "window, domain and dtype: expected ",
                    type, " ", at::IntArrayRef(size), ", found ", prepared->scalar_type(), " ",
                    prepared->sizes());
  if (size[2] == 0) return std::nullopt;
  return prepared->contiguous();
}

template <class T>
SupportLoopParams<T> support_loop(const at::Tensor& lags, const at::Tensor& rhs,
                                  const at::Tensor& split, const at::Tensor& solution, double alpha,
                                  int64_t steps) {
  const int64_t kh = rhs.size(1), kw = rhs.size(2);
  SupportLoopParams<T> p{};
  p.batch = rhs.size(0);
  p.kernel_height = kh;
  p.kernel_width = kw;
  p.n = next_fft_size(2 * kh - 1);
  p.m = next_fft_size(2 * kw - 1);
  p.autocorrelation = lags.const_data_ptr<T>();
  p.rhs = rhs.const_data_ptr<T>();
  p.split = split.mutable_data_ptr<T>();
  p.solution = solution.mutable_data_ptr<T>();
  p.alpha = alpha;
  p.iterations = 1;
  p.steps = steps;
  return p;
}

// Noise power of each image's fields: image_variance times the squared weights they carry.
std::vector<double> noise_power(const FieldShape& s, const at::Tensor& window, double variance) {
  std::vector<double> power(s.batch,
                            variance * static_cast<double>(s.channels * s.height * s.width));
  if (!window.defined()) return power;
  for (int64_t b = 0; b < s.batch; ++b) {
    const auto plane = window[s.window_stride_b == 0 ? 0 : b];
    power[b] =
        variance * static_cast<double>(s.channels) * plane.square().sum(at::kDouble).item<double>();
  }
  return power;
}

template <class T>
void add_noise(const at::Tensor& autocorrelation, const std::vector<double>& noise, int64_t kh,
               int64_t kw, bool gradient) {
  T* lags = autocorrelation.mutable_data_ptr<T>();
  for (size_t b = 0; b < noise.size(); ++b)
    for (int64_t i = 0; i < 2 * kh - 1; ++i)
      for (int64_t j = 0; j < 2 * kw - 1; ++j)
        *lags++ +=
            static_cast<T>(noise[b] * noise_autocorrelation(i - kh + 1, j - kw + 1, gradient));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> kernel_map_statistics(
    const at::Tensor& image, const at::Tensor& observation, const std::optional<at::Tensor>& window,
    at::IntArrayRef kernel_size, std::string_view domain, double image_variance,
    const std::optional<at::Tensor>& prepared) {
  check_images(image, observation, window, kernel_size);
  check_variance(image_variance);
  const bool gradient = parse_domain(domain);
  const auto type = compute_type(image, observation);
  const auto options = image.options().dtype(type);
  const int64_t kh = kernel_size[0], kw = kernel_size[1];
  if (image.numel() == 0)
    return {at::zeros({image.size(0), 2 * kh - 1, 2 * kw - 1}, options),
            at::zeros({image.size(0), kh, kw}, options)};
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto weight = window ? window->to(type).contiguous() : at::Tensor();
    const auto s = field_shape(image, weight, gradient);
    const auto grid = grid_size(s, weight.defined(), kh, kw);
    const auto ready = check_prepared<T>(prepared, s, grid);
    auto result = correlations<T>(
        s, grid, make_fields<T>(s, image.to(type), weight),
        ready ? at::Tensor() : make_fields<T>(s, observation.to(type), weight), ready, kh, kw);
    add_noise<T>(std::get<0>(result), noise_power(s, weight, image_variance), kh, kw, gradient);
    return result;
  });
}

at::Tensor kernel_map_prepare(const at::Tensor& observation,
                              const std::optional<at::Tensor>& window, at::IntArrayRef kernel_size,
                              std::string_view domain) {
  check_rank(observation, 4, "observation", "[B,C,H,W]");
  check_real(observation, "observation");
  check_images(observation, observation, window, kernel_size);
  const bool gradient = parse_domain(domain);
  const auto type = compute_type(observation, observation);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto weight = window ? window->to(type).contiguous() : at::Tensor();
    const auto s = field_shape(observation, weight, gradient);
    const auto grid = grid_size(s, weight.defined(), kernel_size[0], kernel_size[1]);
    const int64_t values = is_native(grid) ? spectrum_values<T>(grid[0], grid[1]) : 0;
    auto spectra = at::empty({s.batch, s.fields(), values}, observation.options().dtype(type));
    if (spectra.numel() == 0) return spectra;
    const auto fields = make_fields<T>(s, observation.to(type), weight);
    transform_planes_cpu<T>({s.batch * s.fields(), s.height, s.width, grid[0], grid[1],
                             fields.template const_data_ptr<T>(),
                             spectra.template mutable_data_ptr<T>()});
    return spectra;
  });
}

at::Tensor kernel_map_solve(const at::Tensor& autocorrelation, const at::Tensor& crosscorrelation,
                            const at::Tensor& target, const at::Tensor& start, double alpha,
                            int64_t steps) {
  check_rank(crosscorrelation, 3, "crosscorrelation", "[B,kh,kw]");
  check_real(crosscorrelation, "crosscorrelation");
  const int64_t batch = crosscorrelation.size(0);
  const int64_t kh = crosscorrelation.size(1), kw = crosscorrelation.size(2);
  const std::array<int64_t, 3> lags{batch, 2 * kh - 1, 2 * kw - 1};
  TORCH_CHECK_VALUE(autocorrelation.sizes() == at::IntArrayRef(lags),
                    "autocorrelation must have shape [B,2kh-1,2kw-1] ", at::IntArrayRef(lags),
                    ", found ", autocorrelation.sizes());
  TORCH_CHECK_VALUE(
      target.sizes() == crosscorrelation.sizes() && start.sizes() == crosscorrelation.sizes(),
      "target and start must have the shape of crosscorrelation ", crosscorrelation.sizes(),
      ", found ", target.sizes(), " and ", start.sizes());
  TORCH_CHECK_VALUE(alpha >= 0 && std::isfinite(alpha),
                    "alpha must be finite and not negative, found ", alpha);
  TORCH_CHECK_VALUE(steps >= 0, "steps must not be negative, found ", steps);
  const auto type = compute_type(crosscorrelation, autocorrelation);
  auto solution = start.to(type).contiguous().clone();
  if (solution.numel() == 0) return solution;
  dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto a = autocorrelation.to(type).contiguous();
    const auto b = crosscorrelation.to(type).contiguous();
    const auto z = target.to(type).contiguous();
    support_loop_cpu(support_loop<T>(a, b, z, solution, alpha, steps));
    return 0;
  });
  return solution;
}

at::Tensor kernel_map_update(const at::Tensor& image, const at::Tensor& observation,
                             const at::Tensor& kernel, const std::optional<at::Tensor>& window,
                             double noise_std, double penalty, double regularization,
                             int64_t iterations, std::string_view prior, std::string_view domain,
                             bool support_exact, double image_variance, int64_t solver_steps,
                             const std::optional<at::Tensor>& prepared) {
  check_rank(kernel, 4, "kernel", "[B,1,kh,kw]");
  check_real(kernel, "kernel");
  check_images(image, observation, window, kernel.sizes().slice(2));
  check_same_device(kernel, image, "kernel", "image");
  TORCH_CHECK_VALUE(kernel.size(0) == image.size(0) && kernel.size(1) == 1,
                    "kernel must have shape [B,1,kh,kw] with image's batch (", image.size(0),
                    "), found ", kernel.sizes());
  TORCH_CHECK_VALUE(noise_std > 0 && std::isfinite(noise_std),
                    "noise_std must be positive and finite, found ", noise_std);
  TORCH_CHECK_VALUE(penalty > 0 && std::isfinite(penalty),
                    "penalty must be positive and finite, found ", penalty);
  TORCH_CHECK_VALUE(regularization >= 0 && std::isfinite(regularization),
                    "regularization must be finite and not negative, found ", regularization);
  TORCH_CHECK_VALUE(iterations > 0, "iterations must be positive, found ", iterations);
  check_variance(image_variance);
  TORCH_CHECK_VALUE(solver_steps > 0, "solver_steps must be positive, found ", solver_steps);
  const bool gradient = parse_domain(domain);
  const auto kind = parse_prior(prior);
  const auto type = compute_type(image, observation);
  const int64_t batch = image.size(0), kh = kernel.size(2), kw = kernel.size(3);
  const double alpha = noise_std * noise_std * penalty;
  auto z = kernel.to(type).contiguous().clone();
  if (image.numel() == 0) return z.to(kernel.scalar_type());
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto weight = window ? window->to(type).contiguous() : at::Tensor();
    const auto s = field_shape(image, weight, gradient);
    const auto grid = grid_size(s, weight.defined(), kh, kw);
    const auto x = make_fields<T>(s, image.to(type), weight);
    const auto ready =
        support_exact ? check_prepared<T>(prepared, s, grid) : std::optional<at::Tensor>();
    const auto y = ready ? at::Tensor() : make_fields<T>(s, observation.to(type), weight);
    const auto noise = noise_power(s, weight, image_variance);
    auto k = z.clone();
    T* data = k.mutable_data_ptr<T>();
    T* split = z.mutable_data_ptr<T>();
    if (support_exact) {
      auto [lags, rhs] = correlations<T>(s, grid, x, y, ready, kh, kw);
      add_noise<T>(lags, noise, kh, kw, gradient);
      auto p = support_loop<T>(lags, rhs, z, k, alpha, solver_steps);
      p.iterations = iterations;
      p.project = true;
      p.prior = kind;
      p.regularization = regularization;
      p.penalty = penalty;
      support_loop_cpu(p);
      return k.to(kernel.scalar_type());
    }
    const Spectra<T> spectra(s, grid, x, y);
    auto padded = at::empty({batch, spectra.n, spectra.m}, z.options());
    for (int64_t i = 0; i < iterations; ++i) {
      scatter_wrapped_cpu<T>(batch, spectra.n, spectra.m, kh, kw, kh / 2, kw / 2, split,
                             padded.template mutable_data_ptr<T>());
      auto zs = forward_fft(padded, spectra.n, spectra.m);
      full_grid_step_cpu<T>({batch, spectra.n, spectra.m, gradient, alpha, noise.data(),
                             spectrum<T>(spectra.power), spectrum<T>(spectra.cross),
                             spectrum<T>(zs)});
      gather_wrapped_cpu<T>(batch, spectra.n, spectra.m, kh, kw, kh / 2, kw / 2,
                            inverse_fft(zs, spectra.n, spectra.m).template const_data_ptr<T>(),
                            data);
      clamp_normalize_cpu<T>(batch, kh * kw, split, data);
      std::copy(data, data + batch * kh * kw, split);
      apply_prior_cpu<T>(batch, kh * kw, kind, regularization, penalty, split);
    }
    return k.to(kernel.scalar_type());
  });
}

at::Tensor project_simplex(const at::Tensor& kernel) {
  check_real(kernel, "kernel");
  TORCH_CHECK_VALUE(kernel.dim() >= 2, "kernel must have shape [...,kh,kw], found ",
                    kernel.sizes());
  const auto type = compute_type(kernel, kernel);
  const auto input = kernel.to(type).contiguous();
  auto out = at::empty_like(input);
  if (input.numel() == 0) return out.to(kernel.scalar_type());
  const int64_t size = input.size(-1) * input.size(-2);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    project_simplex_cpu<T>(input.numel() / size, size, input.const_data_ptr<T>(),
                           out.mutable_data_ptr<T>());
    return out.to(kernel.scalar_type());
  });
}

at::Tensor recenter_kernel(const at::Tensor& kernel, bool subpixel) {
  check_real(kernel, "kernel");
  TORCH_CHECK_VALUE(kernel.dim() >= 2, "kernel must have shape [...,kh,kw], found ",
                    kernel.sizes());
  const auto type = compute_type(kernel, kernel);
  const auto input = kernel.to(type).contiguous();
  auto out = at::empty_like(input);
  if (input.numel() == 0) return out.to(kernel.scalar_type());
  const int64_t kh = input.size(-2), kw = input.size(-1);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    recenter_kernel_cpu<T>(input.numel() / (kh * kw), kh, kw, subpixel, input.const_data_ptr<T>(),
                           out.mutable_data_ptr<T>());
    return out.to(kernel.scalar_type());
  });
}

}  // namespace latentdem
