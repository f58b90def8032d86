// Chooses the build of the deconvolutions that this processor runs best.
#include "deconv/deconv_spectral.h"

#include "common/isa.h"

namespace latentdem {
LATENTDEM_DISPATCH_ISA(richardson_lucy_cpu, LucyParams)
LATENTDEM_DISPATCH_ISA(wiener_spectral_cpu, WienerSpectral)
}  // namespace latentdem
