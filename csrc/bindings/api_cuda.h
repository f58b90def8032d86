// The CUDA implementations: the same signatures as in api.h.
#pragma once

#include "bindings/api.h"

namespace torch {
class Library;
}

namespace latentdem {
namespace cuda {

decltype(latentdem::blur_conv2d) blur_conv2d;

decltype(latentdem::kernel_map_statistics) kernel_map_statistics;
decltype(latentdem::kernel_map_prepare) kernel_map_prepare;
decltype(latentdem::kernel_map_solve) kernel_map_solve;
decltype(latentdem::kernel_map_update) kernel_map_update;
decltype(latentdem::project_simplex) project_simplex;
decltype(latentdem::recenter_kernel) recenter_kernel;

// Registers all of the above in `library`.
void implement(torch::Library& library);

}  // namespace cuda
}  // namespace latentdem
