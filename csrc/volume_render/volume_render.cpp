// Chooses the build of the renderer that this processor runs best.
#include "volume_render/volume_render.h"

#include "common/isa.h"

namespace latentdem {
LATENTDEM_DISPATCH_ISA(render_forward_cpu, RenderForward)
LATENTDEM_DISPATCH_ISA(render_backward_cpu, RenderBackward)
}  // namespace latentdem
