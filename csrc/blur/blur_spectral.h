// The spectral path of the blur operators: one pass over the planes, each of which is
// transformed, combined with its kernel and transformed back while it is in the cache.
#pragma once

#include "blur/blur.h"

namespace latentdem {

// What is asked for, with the spectra X, K and R of the extended image, the kernel and the
// residual. A blur and its transposes need two transforms; loss and gradients need four, or three
// where the residual is periodic and unmasked: then it is K X - Y, never leaves the spectrum, and
// the loss is Parseval's.
enum class SpectralTask : int {
  kBlur,           // K X -> output [B,C,H',W']
  kAdjoint,        // conj(K) R, folded -> output [B,C,H,W]
  kKernelAdjoint,  // conj(X) R -> grad_kernel
  kLoss,           // loss of K X
  kGradients,      // all of loss, output [B,C,H,W] and grad_kernel
};

// Planes lie in the top left corner of the grid n x m, tap (i, j) at row (i - origin_y) mod n,
// column (j - origin_x) mod m.
template <class T>
struct SpectralBlur {
  SpectralTask task;
  BlurShape s;
  SpectralGrid g;
  bool wraps;               // the grid is the circle itself, so that nothing is extended
  Strided<const T> image;   // [B,C,H,W]
  const T* kernel;          // contiguous
  Strided<const T> second;  // [B,C,H',W'], residual or observation
  Strided<const T> mask;    // [B,C,H',W'], or no data
  Strided<T> output;
  T* grad_kernel;  // contiguous, summed over the dimensions that share a kernel
  T* loss;         // [B]
};

template <class T>
void spectral_blur_cpu(const SpectralBlur<T>& p);

}  // namespace latentdem
