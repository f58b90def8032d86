// The CUDA implementation of the operators in library.cpp.
#include <torch/library.h>

#include "bindings/api_cuda.h"

namespace latentdem {
namespace cuda {

void implement(torch::Library& library) {
  library.impl("blur_conv2d", blur_conv2d);
  library.impl("blur_conv2d_adjoint", blur_conv2d_adjoint);
  library.impl("blur_conv2d_kernel", blur_conv2d_kernel);
  library.impl("blur_downsample2d", blur_downsample2d);
  library.impl("blur_downsample2d_adjoint", blur_downsample2d_adjoint);
  library.impl("blur_data_term", blur_data_term);
  library.impl("blur_gradients", blur_gradients);
  library.impl("volume_render", volume_render);
  library.impl("volume_render_backward", volume_render_backward);
  library.impl("kernel_map_statistics", kernel_map_statistics);
  library.impl("kernel_map_prepare", kernel_map_prepare);
  library.impl("kernel_map_solve", kernel_map_solve);
  library.impl("kernel_map_update", kernel_map_update);
  library.impl("project_simplex", project_simplex);
  library.impl("recenter_kernel", recenter_kernel);
  library.impl("wiener_deconv2d", wiener_deconv2d);
  library.impl("wiener_deconv2d_backward", wiener_deconv2d_backward);
  library.impl("richardson_lucy", richardson_lucy);
  library.impl("varying_blur2d", varying_blur2d);
  library.impl("varying_blur2d_adjoint", varying_blur2d_adjoint);
  library.impl("varying_blur2d_kernels", varying_blur2d_kernels);
  library.impl("varying_blur_gradients", varying_blur_gradients);
}

}  // namespace cuda
}  // namespace latentdem

#if !defined(LATENTDEM_CUDA_EMULATION)
TORCH_LIBRARY_IMPL(latentdem, CUDA, m) { latentdem::cuda::implement(m); }
#endif
