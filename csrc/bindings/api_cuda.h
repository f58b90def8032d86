// The CUDA implementations: the same signatures as in api.h.
#pragma once

#include "bindings/api.h"

namespace torch {
class Library;
}

namespace latentdem {
namespace cuda {

decltype(latentdem::blur_conv2d) blur_conv2d;
decltype(latentdem::volume_render) volume_render;
decltype(latentdem::volume_render_backward) volume_render_backward;

// Registers all of the above in `library`.
void implement(torch::Library& library);

}  // namespace cuda
}  // namespace latentdem
