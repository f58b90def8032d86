// Torch glue of the kernel estimate on CUDA; compiled for the emulator as well.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "bindings/api_cuda.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "kernel_map/kernel_map_cuda.h"
#include "kernel_map/kernel_map_glue.h"

namespace latentdem {
namespace cuda {
namespace {

template <class T>
T* workspace(const at::Tensor& t, const char* name) {
  return mutable_device_data<T>(t, name);
}

// Images, window and sizes of one call.
template <class T>
struct Problem {
  FieldShape shape;
  int64_t kh, kw;
  std::array<int64_t, 2> grid;
  at::Tensor window;
  cudaStream_t stream;

  Problem(const at::Tensor& image, const std::optional<at::Tensor>& weight, int64_t height,
          int64_t width, bool gradient, at::ScalarType type, cudaStream_t where)
      : kh(height),
        kw(width),
        window(weight ? weight->to(type).contiguous() : at::Tensor()),
        stream(where) {
    shape = field_shape(image, window, gradient);
    grid = grid_size(shape, window.defined(), kh, kw);
  }

  int64_t bins() const { return grid[0] * (grid[1] / 2 + 1); }

  // Spectra [B,F,n,M] of the fields.
  at::Tensor transform(const at::Tensor& image) const {
    if (!shape.gradient && !window.defined()) return forward_fft(image, grid[0], grid[1]);
    auto fields =
        device_empty({shape.batch, shape.fields(), grid[0], grid[1]}, image.options(), "fields");
    make_fields_cuda<T>(shape, grid[0], grid[1], device_data<T>(image, "image"),
                        window.defined() ? device_data<T>(window, "window") : nullptr,
                        workspace<T>(fields, "fields"), stream);
    return forward_fft(fields, grid[0], grid[1]);
  }

  // Spectra that kernel_map_prepare made.
  at::Tensor check_prepared(const at::Tensor& prepared) const {
    const auto type = c10::CppTypeToScalarType<T>::value;
    const std::array<int64_t, 3> size{shape.batch, shape.fields(), 2 * bins()};
    TORCH_CHECK_VALUE(
        prepared.sizes() == at::IntArrayRef(size) && prepared.scalar_type() == type,
        "prepared must come from kernel_map_prepare with this image size, kernel size, "
        "window, domain and dtype: expected ",
        type, " ", at::IntArrayRef(size), ", found ", prepared.scalar_type(), " ",
        prepared.sizes());
    return prepared.contiguous();
  }

  // Pooled power and cross spectrum [2,B,n,M].
  at::Tensor pool(const at::Tensor& image, const at::Tensor& observation,
                  const std::optional<at::Tensor>& prepared) const {
    at::Tensor ready;
    if (prepared) {
      check_same_device(*prepared, image, "prepared", "image");
      ready = check_prepared(*prepared);
    }
    const auto type = c10::CppTypeToScalarType<T>::value;
    const auto x = transform(image.to(type).contiguous());
    auto pooled = device_empty({2, shape.batch, grid[0], grid[1] / 2 + 1}, x.options(), "pooled");
    at::Tensor y;
    const Complex<T>* values;
    if (prepared) {
      values = reinterpret_cast<const Complex<T>*>(device_data<T>(ready, "prepared"));
    } else {
      y = transform(observation.to(type).contiguous());
      values = device_data<Complex<T>>(y, "observation's spectrum");
    }
    pool_spectra_cuda<T>(shape.batch, shape.fields(), bins(),
                         device_data<Complex<T>>(x, "image's spectrum"), values,
                         workspace<Complex<T>>(pooled, "pooled"), stream);
    return pooled;
  }

  // The sum of the squared weights stays on the device; `energy` keeps it alive.
  NoisePower noise(double variance, at::Tensor& energy) const {
    const auto channels = static_cast<double>(shape.channels);
    if (!window.defined() || variance == 0)
      return {variance * channels * static_cast<double>(shape.height * shape.width), nullptr, 0};
    energy = window.square().sum({1, 2, 3}, false, at::kDouble);
    return {variance * channels, device_data<double>(energy, "window's energy"),
            shape.window_stride_b};
  }

  std::tuple<at::Tensor, at::Tensor> lags(const at::Tensor& pooled, double variance) const {
    const auto correlations = inverse_fft(pooled, grid[0], grid[1]);
    auto autocorrelation = device_empty({shape.batch, 2 * kh - 1, 2 * kw - 1},
                                        correlations.options(), "autocorrelation");
    auto crosscorrelation =
        device_empty({shape.batch, kh, kw}, correlations.options(), "crosscorrelation");
    at::Tensor energy;
    gather_lags_cuda<T>({shape.batch, grid[0], grid[1], kh, kw, shape.gradient,
                         noise(variance, energy), device_data<T>(correlations, "correlations"),
                         workspace<T>(autocorrelation, "autocorrelation"),
                         workspace<T>(crosscorrelation, "crosscorrelation")},
                        stream);
    return {autocorrelation, crosscorrelation};
  }
};

template <class T>
SupportLoopParams<T> loop_params(const at::Tensor& split, const at::Tensor& solution,
                                 double alpha) {
  SupportLoopParams<T> p{};
  p.batch = solution.size(0);
  p.kernel_height = solution.size(-2);
  p.kernel_width = solution.size(-1);
  p.split = workspace<T>(split, "split");
  p.solution = workspace<T>(solution, "solution");
  p.alpha = alpha;
  return p;
}

// The loop by batched transforms, for kernels that no block's shared memory holds.
template <class T>
void loop_by_transforms(SupportLoopParams<T> p, const at::TensorOptions& options,
                        cudaStream_t stream) {
  const int64_t n = p.n = next_fft_size(2 * p.kernel_height - 1);
  const int64_t m = p.m = next_fft_size(2 * p.kernel_width - 1);
  const std::array<int64_t, 3> size{p.batch, p.kernel_height, p.kernel_width};
  const int64_t bins = p.batch * n * (m / 2 + 1);
  auto residual = device_empty(size, options, "residual");
  auto direction = device_empty(size, options, "direction");
  auto energy = device_empty({p.batch}, options.dtype(at::kDouble), "energy");
  auto wrapped = device_empty({p.batch, n, m}, options, "wrapped lags");
  wrap_lags_cuda<T>(p, workspace<T>(wrapped, "wrapped lags"), stream);
  const auto symbol = forward_fft(wrapped, n, m);
  const auto grid = at::zeros({p.batch, n, m}, options);
  SupportStep<T> step{p,
                      workspace<T>(residual, "residual"),
                      workspace<T>(direction, "direction"),
                      workspace<double>(energy, "energy"),
                      nullptr,
                      workspace<T>(grid, "grid")};
  const auto multiply = [&] {
    const auto z = forward_fft(grid, n, m);
    scale_spectrum_cuda<T>(bins, device_data<Complex<T>>(symbol, "symbol"),
                           workspace<Complex<T>>(z, "spectrum"), stream);
    return inverse_fft(z, n, m);
  };
  const auto advance = [&](SupportPhase phase, const at::Tensor& product) {
    step.product = product.defined() ? device_data<T>(product, "product") : step.grid;
    support_step_cuda<T>(step, phase, stream);
  };
  advance(SupportPhase::kLoad, {});
  for (int64_t i = 0; i < p.iterations; ++i) {
    advance(SupportPhase::kStart, multiply());
    for (int64_t j = 0; j < p.steps; ++j) advance(SupportPhase::kStep, multiply());
    if (p.project) advance(SupportPhase::kProject, {});
  }
}

// solution <- the loop's result.
template <class T>
void run_loop(SupportLoopParams<T>& p, const at::Tensor& lags, const at::Tensor& rhs,
              cudaStream_t stream) {
  p.autocorrelation = device_data<T>(lags, "autocorrelation");
  p.rhs = device_data<T>(rhs, "crosscorrelation");
  if (!support_loop_cuda<T>(p, stream)) loop_by_transforms<T>(p, rhs.options(), stream);
}

template <class T>
void run_full_grid(SupportLoopParams<T> p, const Problem<T>& problem, const at::Tensor& pooled,
                   double variance, const at::TensorOptions& options) {
  const int64_t n = p.n = problem.grid[0], m = p.m = problem.grid[1];
  const auto stream = problem.stream;
  const auto grid = at::zeros({p.batch, n, m}, options);
  at::Tensor energy;
  const auto noise = problem.noise(variance, energy);
  const Complex<T>* power = device_data<Complex<T>>(pooled, "pooled");
  SupportStep<T> step{
      p, nullptr, nullptr, nullptr, workspace<T>(grid, "grid"), workspace<T>(grid, "grid")};
  full_grid_project_cuda<T>(step, true, stream);
  for (int64_t i = 0; i < p.iterations; ++i) {
    const auto z = forward_fft(grid, n, m);
    full_grid_step_cuda<T>({p.batch, n, m, problem.shape.gradient, p.alpha, noise, power,
                            power + p.batch * problem.bins(), workspace<Complex<T>>(z, "z")},
                           stream);
    const auto product = inverse_fft(z, n, m);
    step.product = device_data<T>(product, "product");
    full_grid_project_cuda<T>(step, false, stream);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> kernel_map_statistics(
    const at::Tensor& image, const at::Tensor& observation, const std::optional<at::Tensor>& window,
    at::IntArrayRef kernel_size, std::string_view domain, double image_variance,
    const std::optional<at::Tensor>& prepared) {
  const DeviceScope scope(image);
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
    const Problem<T> problem(image, window, kh, kw, gradient, type, scope.stream());
    return problem.lags(problem.pool(image, observation, prepared), image_variance);
  });
}

at::Tensor kernel_map_prepare(const at::Tensor& observation,
                              const std::optional<at::Tensor>& window, at::IntArrayRef kernel_size,
                              std::string_view domain) {
  check_rank(observation, 4, "observation", "[B,C,H,W]");
  check_real(observation, "observation");
  const DeviceScope scope(observation);
  check_images(observation, observation, window, kernel_size);
  const bool gradient = parse_domain(domain);
  const auto type = compute_type(observation, observation);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(observation, window, kernel_size[0], kernel_size[1], gradient, type,
                             scope.stream());
    const std::array<int64_t, 3> size{problem.shape.batch, problem.shape.fields(),
                                      2 * problem.bins()};
    if (observation.numel() == 0) return at::empty(size, observation.options().dtype(type));
    return at::view_as_real(problem.transform(observation.to(type).contiguous())).view(size);
  });
}

at::Tensor kernel_map_solve(const at::Tensor& autocorrelation, const at::Tensor& crosscorrelation,
                            const at::Tensor& target, const at::Tensor& start, double alpha,
                            int64_t steps) {
  const DeviceScope scope(crosscorrelation);
  check_solve(autocorrelation, crosscorrelation, target, start, alpha, steps);
  const auto type = compute_type(crosscorrelation, autocorrelation);
  auto solution = start.to(type).contiguous().clone();
  if (solution.numel() == 0) return solution;
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const auto lags = autocorrelation.to(type).contiguous();
    const auto rhs = crosscorrelation.to(type).contiguous();
    const auto split = target.to(type).contiguous();
    auto p = loop_params<T>(split, solution, alpha);
    p.iterations = 1;
    p.steps = steps;
    run_loop<T>(p, lags, rhs, scope.stream());
    return solution;
  });
}

at::Tensor kernel_map_update(const at::Tensor& image, const at::Tensor& observation,
                             const at::Tensor& kernel, const std::optional<at::Tensor>& window,
                             double noise_std, double penalty, double regularization,
                             int64_t iterations, std::string_view prior, std::string_view domain,
                             bool support_exact, double image_variance, int64_t solver_steps,
                             const std::optional<at::Tensor>& prepared) {
  const DeviceScope scope(image);
  check_update(image, observation, kernel, window, noise_std, penalty, regularization, iterations,
               image_variance, solver_steps);
  const bool gradient = parse_domain(domain);
  const auto kind = parse_prior(prior);
  const auto type = compute_type(image, observation);
  if (image.numel() == 0) return kernel.clone();
  const auto split = kernel.to(type).contiguous().clone();
  const auto solution = split.clone();
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(image, window, kernel.size(2), kernel.size(3), gradient, type,
                             scope.stream());
    const auto pooled = problem.pool(image, observation, support_exact ? prepared : std::nullopt);
    auto p = loop_params<T>(split, solution, noise_std * noise_std * penalty);
    p.iterations = iterations;
    p.steps = solver_steps;
    p.project = true;
    p.prior = kind;
    p.regularization = regularization;
    p.penalty = penalty;
    if (support_exact) {
      const auto [lags, rhs] = problem.lags(pooled, image_variance);
      run_loop<T>(p, lags, rhs, scope.stream());
    } else {
      run_full_grid<T>(p, problem, pooled, image_variance, split.options());
    }
    return solution.to(kernel.scalar_type());
  });
}

at::Tensor project_simplex(const at::Tensor& kernel) {
  const DeviceScope scope(kernel);
  check_planes(kernel);
  const auto type = compute_type(kernel, kernel);
  if (kernel.numel() == 0) return at::empty_like(kernel);
  const auto input = kernel.to(type).contiguous();
  auto out = device_empty(input.sizes(), input.options(), "projected");
  const int64_t size = input.size(-1) * input.size(-2);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    project_simplex_cuda<T>(input.numel() / size, size, device_data<T>(input, "kernel"),
                            workspace<T>(out, "projected"), scope.stream());
    return out.to(kernel.scalar_type());
  });
}

at::Tensor recenter_kernel(const at::Tensor& kernel, bool subpixel) {
  const DeviceScope scope(kernel);
  check_planes(kernel);
  const auto type = compute_type(kernel, kernel);
  if (kernel.numel() == 0) return at::empty_like(kernel);
  const auto input = kernel.to(type).contiguous();
  auto out = device_empty(input.sizes(), input.options(), "recentred");
  const int64_t kh = input.size(-2), kw = input.size(-1);
  return dispatch_real(type, [&](auto zero) {
    using T = decltype(zero);
    recenter_kernel_cuda<T>(input.numel() / (kh * kw), kh, kw, subpixel,
                            device_data<T>(input, "kernel"), workspace<T>(out, "recentred"),
                            scope.stream());
    return out.to(kernel.scalar_type());
  });
}

}  // namespace cuda
}  // namespace latentdem
