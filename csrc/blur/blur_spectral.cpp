// Chooses the build of the spectral path that this processor runs best.
#include "blur/blur_spectral.h"

#include "common/isa.h"

namespace latentdem {
LATENTDEM_DISPATCH_ISA(spectral_blur_cpu, SpectralBlur)
}  // namespace latentdem
