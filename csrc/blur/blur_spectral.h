// The spectral path of the blur operators: one pass over the planes, each of which is
// transformed, combined with its kernel and transformed back while it is in the cache.
#pragma once

#include "blur/blur.h"

namespace latentdem {

// X, K and R are the spectra of image, kernel and second on the grid n x m, where planes lie in
// the top left corner and tap (i, j) at row (i - origin_y) mod n, column (j - origin_x) mod m.
// With an observation as second, R = K X - Y; with a residual it is its own spectrum. Outputs
// that are not wanted are null; prediction excludes the others.
template <class T>
struct SpectralBlur {
  BlurShape s;
  SpectralGrid g;
  const T* image;  // [B,C,image_rows,image_columns]
  int64_t image_rows, image_columns;
  const T* kernel;
  const T* second;  // [B,C,second_rows,second_columns]
  int64_t second_rows, second_columns;
  bool second_is_observation;
  T* output;  // [B,C,output_rows,output_columns], corner of K X (predict) or of conj(K) R
  int64_t output_rows, output_columns;
  bool predict;
  T* grad_kernel;  // conj(X) R, summed over the dimensions that share a kernel
  T* loss;         // [B], half the squared norm of R (Parseval)
};

template <class T>
void spectral_blur_cpu(const SpectralBlur<T>& p);

}  // namespace latentdem
