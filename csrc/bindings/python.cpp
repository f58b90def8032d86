// The pybind11 module latentdem_ext._C: a second face over the dispatcher, and build_info().
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "latentdem_build_config.h"

namespace py = pybind11;

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <class Signature, class... Args>
auto call(const char* name, Args&&... args) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>().call(
      std::forward<Args>(args)...);
}

c10::SymIntArrayRef symbolic(const Sizes& sizes) {
  return c10::fromIntArrayRefSlow(at::IntArrayRef(sizes));
}

Tensor blur_conv2d(const Tensor& image, const Tensor& kernel, const std::string& boundary) {
  return call<Tensor(const Tensor&, const Tensor&, std::string_view)>("latentdem::blur_conv2d",
                                                                      image, kernel, boundary);
}

Tensor blur_conv2d_adjoint(const Tensor& residual, const Tensor& kernel,
                           const std::string& boundary, const Sizes& image_size) {
  return call<Tensor(const Tensor&, const Tensor&, std::string_view, c10::SymIntArrayRef)>(
      "latentdem::blur_conv2d_adjoint", residual, kernel, boundary, symbolic(image_size));
}

Tensor blur_conv2d_kernel(const Tensor& image, const Tensor& residual, const std::string& boundary,
                          const Sizes& kernel_size) {
  return call<Tensor(const Tensor&, const Tensor&, std::string_view, c10::SymIntArrayRef)>(
      "latentdem::blur_conv2d_kernel", image, residual, boundary, symbolic(kernel_size));
}

Tensor blur_downsample2d(const Tensor& image, const Tensor& kernel, const std::string& boundary,
                         int64_t factor) {
  return call<Tensor(const Tensor&, const Tensor&, std::string_view, int64_t)>(
      "latentdem::blur_downsample2d", image, kernel, boundary, factor);
}

Tensor blur_downsample2d_adjoint(const Tensor& residual, const Tensor& kernel,
                                 const std::string& boundary, int64_t factor,
                                 const Sizes& image_size) {
  return call<Tensor(const Tensor&, const Tensor&, std::string_view, int64_t, c10::SymIntArrayRef)>(
      "latentdem::blur_downsample2d_adjoint", residual, kernel, boundary, factor,
      symbolic(image_size));
}

Tensor blur_data_term(const Tensor& image, const Tensor& kernel, const Tensor& observation,
                      const OptionalTensor& mask, const std::string& boundary) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                     std::string_view)>("latentdem::blur_data_term", image, kernel, observation,
                                        mask, boundary);
}

std::tuple<Tensor, Tensor, Tensor> blur_gradients(const Tensor& image, const Tensor& kernel,
                                                  const Tensor& observation,
                                                  const OptionalTensor& mask,
                                                  const std::string& boundary) {
  return call<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                 const OptionalTensor&, std::string_view)>(
      "latentdem::blur_gradients", image, kernel, observation, mask, boundary);
}

std::tuple<Tensor, Tensor> kernel_map_statistics(const Tensor& image, const Tensor& observation,
                                                 const OptionalTensor& window,
                                                 const Sizes& kernel_size,
                                                 const std::string& domain, double image_variance,
                                                 const OptionalTensor& prepared) {
  return call<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, c10::SymIntArrayRef, std::string_view,
      double, const OptionalTensor&)>("latentdem::kernel_map_statistics", image, observation,
                                      window, symbolic(kernel_size), domain, image_variance,
                                      prepared);
}

Tensor kernel_map_prepare(const Tensor& observation, const OptionalTensor& window,
                          const Sizes& kernel_size, const std::string& domain) {
  return call<Tensor(const Tensor&, const OptionalTensor&, c10::SymIntArrayRef, std::string_view)>(
      "latentdem::kernel_map_prepare", observation, window, symbolic(kernel_size), domain);
}

Tensor kernel_map_solve(const Tensor& autocorrelation, const Tensor& crosscorrelation,
                        const Tensor& target, const Tensor& start, double alpha, int64_t steps) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, int64_t)>(
      "latentdem::kernel_map_solve", autocorrelation, crosscorrelation, target, start, alpha,
      steps);
}

Tensor kernel_map_update(const Tensor& image, const Tensor& observation, const Tensor& kernel,
                         const OptionalTensor& window, double noise_std, double penalty,
                         double regularization, int64_t iterations, const std::string& prior,
                         const std::string& domain, bool support_exact, double image_variance,
                         int64_t solver_steps, const OptionalTensor& prepared) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
                     double, double, int64_t, std::string_view, std::string_view, bool, double,
                     int64_t, const OptionalTensor&)>(
      "latentdem::kernel_map_update", image, observation, kernel, window, noise_std, penalty,
      regularization, iterations, prior, domain, support_exact, image_variance, solver_steps,
      prepared);
}

Tensor project_simplex(const Tensor& kernel) {
  return call<Tensor(const Tensor&)>("latentdem::project_simplex", kernel);
}

Tensor recenter_kernel(const Tensor& kernel, bool subpixel) {
  return call<Tensor(const Tensor&, bool)>("latentdem::recenter_kernel", kernel, subpixel);
}

Tensor wiener_deconv2d(const Tensor& image_hat, const Tensor& observation, const Tensor& kernel,
                       const Tensor& ratio, const OptionalTensor& mask, int64_t passes) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     const OptionalTensor&, int64_t)>("latentdem::wiener_deconv2d", image_hat,
                                                      observation, kernel, ratio, mask, passes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wiener_deconv2d_backward(
    const Tensor& grad, const Tensor& image_hat, const Tensor& observation, const Tensor& kernel,
    const Tensor& ratio, const OptionalTensor& mask, int64_t passes, bool need_observation,
    bool need_kernel, bool need_ratio) {
  return call<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, int64_t, bool, bool, bool)>(
      "latentdem::wiener_deconv2d_backward", grad, image_hat, observation, kernel, ratio, mask,
      passes, need_observation, need_kernel, need_ratio);
}

Tensor richardson_lucy(const Tensor& observation, const Tensor& kernel, const Tensor& initial,
                       const OptionalTensor& mask, const std::string& boundary, int64_t iterations,
                       double total_variation, double eps) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                     std::string_view, int64_t, double, double)>(
      "latentdem::richardson_lucy", observation, kernel, initial, mask, boundary, iterations,
      total_variation, eps);
}

Tensor varying_blur2d(const Tensor& image, const Tensor& kernels, const Tensor& weights,
                      const std::string& boundary) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, std::string_view)>(
      "latentdem::varying_blur2d", image, kernels, weights, boundary);
}

Tensor varying_blur2d_adjoint(const Tensor& residual, const Tensor& kernels, const Tensor& weights,
                              const std::string& boundary) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, std::string_view)>(
      "latentdem::varying_blur2d_adjoint", residual, kernels, weights, boundary);
}

Tensor varying_blur2d_kernels(const Tensor& image, const Tensor& residual, const Tensor& weights,
                              const std::string& boundary, const Sizes& kernels_size) {
  return call<Tensor(const Tensor&, const Tensor&, const Tensor&, std::string_view,
                     c10::SymIntArrayRef)>("latentdem::varying_blur2d_kernels", image, residual,
                                           weights, boundary, symbolic(kernels_size));
}

std::tuple<Tensor, Tensor, Tensor> varying_blur_gradients(
    const Tensor& image, const Tensor& kernels, const Tensor& weights, const Tensor& observation,
    const OptionalTensor& mask, const std::string& boundary) {
  return call<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                 const Tensor&, const OptionalTensor&,
                                                 std::string_view)>(
      "latentdem::varying_blur_gradients", image, kernels, weights, observation, mask, boundary);
}

std::tuple<Tensor, Tensor, Tensor> volume_render(const Tensor& density, const Tensor& color,
                                                 const Tensor& camera_to_world,
                                                 const Tensor& intrinsics, const Sizes& image_size,
                                                 double near, double far, int64_t samples_per_ray,
                                                 std::optional<double> early_stop_eps) {
  return call<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                 const Tensor&, c10::SymIntArrayRef, double, double,
                                                 int64_t, std::optional<double>)>(
      "latentdem::volume_render", density, color, camera_to_world, intrinsics, symbolic(image_size),
      near, far, samples_per_ray, early_stop_eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> volume_render_backward(
    const Tensor& grad_color, const Tensor& grad_opacity, const Tensor& grad_depth,
    const Tensor& density, const Tensor& color, const Tensor& camera_to_world,
    const Tensor& intrinsics, double near, double far, int64_t samples_per_ray,
    std::optional<double> early_stop_eps, bool need_density, bool need_color, bool need_cameras) {
  return call<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, double, double, int64_t, std::optional<double>, bool, bool, bool)>(
      "latentdem::volume_render_backward", grad_color, grad_opacity, grad_depth, density, color,
      camera_to_world, intrinsics, near, far, samples_per_ray, early_stop_eps, need_density,
      need_color, need_cameras);
}

py::list split(const std::string& joined) {
  py::list parts;
  for (size_t begin = 0; begin < joined.size();) {
    const size_t end = std::min(joined.find(';', begin), joined.size());
    parts.append(joined.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LATENTDEM_VERSION;
  info["torch"] = LATENTDEM_TORCH_VERSION;
  info["compiler"] = LATENTDEM_COMPILER;
  info["flags"] = LATENTDEM_FLAGS;
#if defined(_OPENMP)
  info["openmp"] = true;
  info["openmp_threads"] = omp_get_max_threads();
#else
  info["openmp"] = false;
  info["openmp_threads"] = 1;
#endif
  info["cpu_capability"] = latentdem::isa_name(latentdem::best_isa());
  const std::string cuda = LATENTDEM_CUDA_VERSION;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::str(cuda);
  info["cuda_archs"] = split(LATENTDEM_CUDA_ARCHS);
  info["cuda_kernels"] = split(LATENTDEM_CUDA_KERNELS);
  return info;
}

// The threads of GNU OpenMP, torch's and MKL's included, do not survive a fork, and a parallel
// region in the child would wait for them for ever. So a forked child computes on one thread,
// as torch's DataLoader workers do.
void compute_serially_after_fork() {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { at::set_num_threads(1); });
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of latentdem_ext; see latentdem_ext.ops for their documentation.";
  compute_serially_after_fork();
  m.def("build_info", &build_info);
  const auto release = py::call_guard<py::gil_scoped_release>();
  using py::arg;
  m.def("blur_conv2d", &blur_conv2d, arg("image"), arg("kernel"), arg("boundary"), release);
  m.def("blur_conv2d_adjoint", &blur_conv2d_adjoint, arg("residual"), arg("kernel"),
        arg("boundary"), arg("image_size"), release);
  m.def("blur_conv2d_kernel", &blur_conv2d_kernel, arg("image"), arg("residual"), arg("boundary"),
        arg("kernel_size"), release);
  m.def("blur_downsample2d", &blur_downsample2d, arg("image"), arg("kernel"), arg("boundary"),
        arg("factor"), release);
  m.def("blur_downsample2d_adjoint", &blur_downsample2d_adjoint, arg("residual"), arg("kernel"),
        arg("boundary"), arg("factor"), arg("image_size"), release);
  m.def("blur_data_term", &blur_data_term, arg("image"), arg("kernel"), arg("observation"),
        arg("mask"), arg("boundary"), release);
  m.def("blur_gradients", &blur_gradients, arg("image"), arg("kernel"), arg("observation"),
        arg("mask"), arg("boundary"), release);
  m.def("kernel_map_statistics", &kernel_map_statistics, arg("image"), arg("observation"),
        arg("window"), arg("kernel_size"), arg("domain"), arg("image_variance"), arg("prepared"),
        release);
  m.def("kernel_map_prepare", &kernel_map_prepare, arg("observation"), arg("window"),
        arg("kernel_size"), arg("domain"), release);
  m.def("kernel_map_solve", &kernel_map_solve, arg("autocorrelation"), arg("crosscorrelation"),
        arg("target"), arg("start"), arg("alpha"), arg("steps"), release);
  m.def("kernel_map_update", &kernel_map_update, arg("image"), arg("observation"), arg("kernel"),
        arg("window"), arg("noise_std"), arg("penalty"), arg("regularization"), arg("iterations"),
        arg("prior"), arg("domain"), arg("support_exact"), arg("image_variance"),
        arg("solver_steps"), arg("prepared"), release);
  m.def("project_simplex", &project_simplex, arg("kernel"), release);
  m.def("recenter_kernel", &recenter_kernel, arg("kernel"), arg("subpixel"), release);
  m.def("wiener_deconv2d", &wiener_deconv2d, arg("image_hat"), arg("observation"), arg("kernel"),
        arg("ratio"), arg("mask"), arg("passes"), release);
  m.def("wiener_deconv2d_backward", &wiener_deconv2d_backward, arg("grad"), arg("image_hat"),
        arg("observation"), arg("kernel"), arg("ratio"), arg("mask"), arg("passes"),
        arg("need_observation"), arg("need_kernel"), arg("need_ratio"), release);
  m.def("richardson_lucy", &richardson_lucy, arg("observation"), arg("kernel"), arg("initial"),
        arg("mask"), arg("boundary"), arg("iterations"), arg("total_variation"), arg("eps"),
        release);
  m.def("varying_blur2d", &varying_blur2d, arg("image"), arg("kernels"), arg("weights"),
        arg("boundary"), release);
  m.def("varying_blur2d_adjoint", &varying_blur2d_adjoint, arg("residual"), arg("kernels"),
        arg("weights"), arg("boundary"), release);
  m.def("varying_blur2d_kernels", &varying_blur2d_kernels, arg("image"), arg("residual"),
        arg("weights"), arg("boundary"), arg("kernels_size"), release);
  m.def("varying_blur_gradients", &varying_blur_gradients, arg("image"), arg("kernels"),
        arg("weights"), arg("observation"), arg("mask"), arg("boundary"), release);
  m.def("volume_render", &volume_render, arg("density"), arg("color"), arg("camera_to_world"),
        arg("intrinsics"), arg("image_size"), arg("near"), arg("far"), arg("samples_per_ray"),
        arg("early_stop_eps"), release);
  m.def("volume_render_backward", &volume_render_backward, arg("grad_color"), arg("grad_opacity"),
        arg("grad_depth"), arg("density"), arg("color"), arg("camera_to_world"), arg("intrinsics"),
        arg("near"), arg("far"), arg("samples_per_ray"), arg("early_stop_eps"), arg("need_density"),
        arg("need_color"), arg("need_cameras"), release);
}
