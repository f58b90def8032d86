// Chooses the build of the spectral parts that this processor runs best.
#include "kernel_map/kernel_map_spectral.h"

#include "common/isa.h"

namespace latentdem {
LATENTDEM_DISPATCH_ISA(transform_planes_cpu, TransformParams)
LATENTDEM_DISPATCH_ISA(correlations_cpu, CorrelationParams)
LATENTDEM_DISPATCH_ISA(support_loop_cpu, SupportLoopParams)
}  // namespace latentdem
