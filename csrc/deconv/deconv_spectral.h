// Deconvolutions on the transforms of common/fft.h: a plane goes through all its iterations, or
// through all passes of the Wiener step, while it is in the cache. Its columns come back from one
// filter and leave for the next without being stored in between.
#pragma once

#include "blur/blur.h"

namespace latentdem {

// Richardson-Lucy. Four transforms an iteration: prediction and correction, there and back.
template <class T>
struct LucyParams {
  BlurShape s;
  SpectralGrid g;
  bool wraps;  // the grid is the circle itself, so that nothing is extended
  const T* kernel;
  Strided<const T> observation, mask;  // [B,C,H',W']; the mask may have no data
  Strided<const T> initial;            // [B,C,H,W]
  int64_t iterations;
  T total_variation, floor;
  T least;    // weight up to which a pixel counts as not observed and stays as it is
  T* output;  // [B,C,H,W], contiguous
};
template <class T>
void richardson_lucy_cpu(const LucyParams<T>& p);

// The Wiener step on a grid that is the canvas itself. Two transforms for K X_hat, one there, two
// for each further pass, one back; without a mask three in all, or two where the observation is
// shared. Strides of the ratio are in elements and zero where one value serves a whole dimension;
// per frequency it lies as torch.fft.rfft2 would have it.
template <class T>
struct WienerSpectral {
  BlurShape s;
  SpectralGrid g;
  const T* kernel;
  const T* ratio;
  int64_t ratio_stride_b, ratio_stride_c, ratio_stride_bin;
  Strided<const T> estimate, observation, mask;  // [B,C,H,W]; the mask may have no data
  int64_t passes;
  Strided<T> output;
};
template <class T>
void wiener_spectral_cpu(const WienerSpectral<T>& p);

}  // namespace latentdem
