// The schema of every operator, in one table, and its CPU implementation.
#include <torch/library.h>

#include "bindings/api.h"

TORCH_LIBRARY(latentdem, m) {
  m.def("blur_conv2d(Tensor image, Tensor kernel, str boundary) -> Tensor");
  m.def(
      "blur_conv2d_adjoint(Tensor residual, Tensor kernel, str boundary, SymInt[] image_size)"
      " -> Tensor");
  m.def(
      "blur_conv2d_kernel(Tensor image, Tensor residual, str boundary, SymInt[] kernel_size)"
      " -> Tensor");
  m.def("blur_downsample2d(Tensor image, Tensor kernel, str boundary, int factor) -> Tensor");
  m.def(
      "blur_downsample2d_adjoint(Tensor residual, Tensor kernel, str boundary, int factor,"
      " SymInt[] image_size) -> Tensor");
  m.def(
      "blur_data_term(Tensor image, Tensor kernel, Tensor observation, Tensor? mask,"
      " str boundary) -> Tensor");
  m.def(
      "blur_gradients(Tensor image, Tensor kernel, Tensor observation, Tensor? mask,"
      " str boundary) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kernel_map_statistics(Tensor image, Tensor observation, Tensor? window,"
      " SymInt[] kernel_size, str domain, float image_variance, Tensor? prepared)"
      " -> (Tensor, Tensor)");
  m.def(
      "kernel_map_prepare(Tensor observation, Tensor? window, SymInt[] kernel_size, str domain)"
      " -> Tensor");
  m.def(
      "kernel_map_solve(Tensor autocorrelation, Tensor crosscorrelation, Tensor target,"
      " Tensor start, float alpha, int steps) -> Tensor");
  m.def(
      "kernel_map_update(Tensor image, Tensor observation, Tensor kernel, Tensor? window,"
      " float noise_std, float penalty, float regularization, int iterations, str prior,"
      " str domain, bool support_exact, float image_variance, int solver_steps,"
      " Tensor? prepared) -> Tensor");
  m.def("project_simplex(Tensor kernel) -> Tensor");
  m.def("recenter_kernel(Tensor kernel, bool subpixel) -> Tensor");
  m.def(
      "wiener_deconv2d(Tensor image_hat, Tensor observation, Tensor kernel, Tensor ratio,"
      " Tensor? mask, int passes) -> Tensor");
  m.def(
      "wiener_deconv2d_backward(Tensor grad, Tensor image_hat, Tensor observation, Tensor kernel,"
      " Tensor ratio, Tensor? mask, int passes, bool need_observation, bool need_kernel,"
      " bool need_ratio) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "richardson_lucy(Tensor observation, Tensor kernel, Tensor initial, Tensor? mask,"
      " str boundary, int iterations, float total_variation, float eps) -> Tensor");
  m.def("varying_blur2d(Tensor image, Tensor kernels, Tensor weights, str boundary) -> Tensor");
  m.def(
      "varying_blur2d_adjoint(Tensor residual, Tensor kernels, Tensor weights, str boundary)"
      " -> Tensor");
  m.def(
      "varying_blur2d_kernels(Tensor image, Tensor residual, Tensor weights, str boundary,"
      " SymInt[] kernels_size) -> Tensor");
  m.def(
      "varying_blur_gradients(Tensor image, Tensor kernels, Tensor weights, Tensor observation,"
      " Tensor? mask, str boundary) -> (Tensor, Tensor, Tensor)");
  m.def(
      "volume_render(Tensor density, Tensor color, Tensor camera_to_world, Tensor intrinsics,"
      " SymInt[] image_size, float near, float far, int samples_per_ray, float? early_stop_eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "volume_render_backward(Tensor grad_color, Tensor grad_opacity, Tensor grad_depth,"
      " Tensor density, Tensor color, Tensor camera_to_world, Tensor intrinsics,"
      " float near, float far,"
      " int samples_per_ray, float? early_stop_eps, bool need_density, bool need_color,"
      " bool need_cameras) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(latentdem, CPU, m) {
  m.impl("blur_conv2d", latentdem::blur_conv2d);
  m.impl("blur_conv2d_adjoint", latentdem::blur_conv2d_adjoint);
  m.impl("blur_conv2d_kernel", latentdem::blur_conv2d_kernel);
  m.impl("blur_downsample2d", latentdem::blur_downsample2d);
  m.impl("blur_downsample2d_adjoint", latentdem::blur_downsample2d_adjoint);
  m.impl("blur_data_term", latentdem::blur_data_term);
  m.impl("blur_gradients", latentdem::blur_gradients);
  m.impl("kernel_map_statistics", latentdem::kernel_map_statistics);
  m.impl("kernel_map_prepare", latentdem::kernel_map_prepare);
  m.impl("kernel_map_solve", latentdem::kernel_map_solve);
  m.impl("kernel_map_update", latentdem::kernel_map_update);
  m.impl("project_simplex", latentdem::project_simplex);
  m.impl("recenter_kernel", latentdem::recenter_kernel);
  m.impl("wiener_deconv2d", latentdem::wiener_deconv2d);
  m.impl("wiener_deconv2d_backward", latentdem::wiener_deconv2d_backward);
  m.impl("richardson_lucy", latentdem::richardson_lucy);
  m.impl("varying_blur2d", latentdem::varying_blur2d);
  m.impl("varying_blur2d_adjoint", latentdem::varying_blur2d_adjoint);
  m.impl("varying_blur2d_kernels", latentdem::varying_blur2d_kernels);
  m.impl("varying_blur_gradients", latentdem::varying_blur_gradients);
  m.impl("volume_render", latentdem::volume_render);
  m.impl("volume_render_backward", latentdem::volume_render_backward);
}
