// exp for inner loops: inlined, a few ulp at most, and without a table or a call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace latentdem {

// Within 1.5 ulp of exp(x): 2^n times a polynomial on |r| <= ln(2) / 2 (Cephes' coefficients).
// Arguments whose result is not a normal number, and NaN, go to the library.
LATENTDEM_HD float inline_exp(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  if (!(x > -87.0F && x < 88.0F)) [[unlikely]]
    return std::exp(x);
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.44269504088896341F + kRound) - kRound;
  const float r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return (p * r * r + r + 1.0F) * scale;
#endif
}

LATENTDEM_HD double inline_exp(double x) { return exp(x); }

}  // namespace latentdem
