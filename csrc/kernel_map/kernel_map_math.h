// Scalar arithmetic of the kernel estimate, shared by the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace latentdem {

enum class KernelPrior : int { kNone = 0, kL1 = 1, kL2 = 2 };

// The z-step of half-quadratic splitting: argmin_z lambda phi(z) + beta/2 (z - k)^2.
template <class T>
LATENTDEM_HD T prior_step(T k, KernelPrior prior, T regularization, T penalty) {
  T z = k;
  if (prior == KernelPrior::kL1) z = k - regularization / penalty;
  if (prior == KernelPrior::kL2) z = k * penalty / (2 * regularization + penalty);
  return z > 0 ? z : T(0);
}

// Autocorrelation at lag (dy, dx) of the summed filters of a domain applied to white noise of
// unit variance: a delta for the image itself, the two forward differences for gradients.
LATENTDEM_HD int noise_autocorrelation(int64_t dy, int64_t dx, bool gradient) {
  const int64_t distance = (dy < 0 ? -dy : dy) + (dx < 0 ? -dx : dx);
  if (!gradient) return distance == 0 ? 1 : 0;
  return distance == 0 ? 4 : (distance == 1 ? -1 : 0);
}

}  // namespace latentdem
