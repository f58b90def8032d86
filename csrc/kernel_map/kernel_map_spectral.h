// The two spectral parts of the support-exact estimate: the correlations that it needs of the
// images, and the half-quadratic loop, whose transforms have twice the kernel's size.
#pragma once

#include "kernel_map/kernel_map.h"

namespace latentdem {

// Spectra of planes [P,H,W] on the grid n x m, in the layout of common/fft.h, for an observation
// that is used again and again. `spectra` is aligned to 64 bytes.
template <class T>
struct TransformParams {
  int64_t planes, height, width;
  int64_t n, m;  // n even
  const T* images;
  T* spectra;  // [P,spectrum_values]
};
template <class T>
void transform_planes_cpu(const TransformParams<T>& p);

template <class T>
LATENTDEM_HD int64_t spectrum_values(int64_t n, int64_t m) {
  constexpr int64_t lanes = 32 / sizeof(T);
  return (n / 2 + lanes) / lanes * lanes * m * 2;
}

// autocorrelation[i,j] = sum_f sum_p x[p] x[p + (i - kh + 1, j - kw + 1)], on the grid n x m, and
// crosscorrelation[i,j] = sum_f sum_p x[p] y[p + (i - kh / 2, j - kw / 2)].
template <class T>
struct CorrelationParams {
  int64_t batch, fields, height, width;
  int64_t n, m;  // n even
  int64_t kernel_height, kernel_width;
  const T* image;        // [B,F,H,W]
  const T* observation;  // [B,F,H,W], or null ...
  const T* spectra;      // ... and its spectra [B,F,spectrum_values]
  T* autocorrelation;    // [B,2kh-1,2kw-1]
  T* crosscorrelation;   // [B,kh,kw]
};
template <class T>
void correlations_cpu(const CorrelationParams<T>& p);

// `iterations` times: `steps` conjugate gradient steps on (A + alpha I) k = b + alpha z, then
// k <- max(k, 0) / sum and z <- prior(k). Without projection: one solve, z and k as they are.
template <class T>
struct SupportLoopParams {
  int64_t batch, kernel_height, kernel_width;
  int64_t n, m;              // at least 2 kh - 1, 2 kw - 1; n even
  const T* autocorrelation;  // [B,2kh-1,2kw-1], symmetric
  const T* rhs;              // b, [B,kh,kw]
  T* split;                  // z, [B,kh,kw]
  T* solution;               // k, [B,kh,kw]
  double alpha;
  int64_t iterations, steps;
  bool project;
  KernelPrior prior;
  double regularization, penalty;
};
template <class T>
void support_loop_cpu(const SupportLoopParams<T>& p);

}  // namespace latentdem
