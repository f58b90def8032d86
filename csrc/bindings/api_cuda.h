// The CUDA implementations: the same signatures as in api.h.
#pragma once

#include "bindings/api.h"

namespace torch {
class Library;
}

namespace latentdem {
namespace cuda {

decltype(latentdem::blur_conv2d) blur_conv2d;
decltype(latentdem::blur_conv2d_adjoint) blur_conv2d_adjoint;
decltype(latentdem::blur_conv2d_kernel) blur_conv2d_kernel;
decltype(latentdem::blur_downsample2d) blur_downsample2d;
decltype(latentdem::blur_downsample2d_adjoint) blur_downsample2d_adjoint;
decltype(latentdem::blur_data_term) blur_data_term;
decltype(latentdem::blur_gradients) blur_gradients;
decltype(latentdem::volume_render) volume_render;
decltype(latentdem::volume_render_backward) volume_render_backward;

decltype(latentdem::kernel_map_statistics) kernel_map_statistics;
decltype(latentdem::kernel_map_prepare) kernel_map_prepare;
decltype(latentdem::kernel_map_solve) kernel_map_solve;
decltype(latentdem::kernel_map_update) kernel_map_update;
decltype(latentdem::project_simplex) project_simplex;
decltype(latentdem::recenter_kernel) recenter_kernel;
decltype(latentdem::wiener_deconv2d) wiener_deconv2d;
decltype(latentdem::wiener_deconv2d_backward) wiener_deconv2d_backward;
decltype(latentdem::richardson_lucy) richardson_lucy;
decltype(latentdem::varying_blur2d) varying_blur2d;
decltype(latentdem::varying_blur2d_adjoint) varying_blur2d_adjoint;
decltype(latentdem::varying_blur2d_kernels) varying_blur2d_kernels;
decltype(latentdem::varying_blur_gradients) varying_blur_gradients;

// Registers all of the above in `library`.
void implement(torch::Library& library);

}  // namespace cuda
}  // namespace latentdem
