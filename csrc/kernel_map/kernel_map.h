// Kernels of the MAP estimate of blur kernels: plain parameters, contiguous memory
// except for images.
//
// B batch; F fields of one image (its channels, or their two derivatives); H W field size;
// kh kw kernel; n m FFT grid with M = m / 2 + 1 columns of its half spectrum.
#pragma once

#include <cstdint>

#include "common/complex.h"
#include "common/strided.h"
#include "kernel_map/kernel_map_math.h"

namespace latentdem {

// image [B,C,H,W] -> fields [B,2C,H,W] of circular forward differences (down, then right),
// or [B,C,H,W] copies; each multiplied by window [B|1,H,W] if that is not null.
struct FieldShape {
  int64_t batch, channels, height, width;
  bool gradient;
  int64_t window_stride_b;  // in planes; 0 if one window serves the batch
  int64_t fields() const { return channels * (gradient ? 2 : 1); }
};
template <class T>
void make_fields_cpu(const FieldShape& s, const Strided<const T>& image, const T* window,
                     T* fields);

// Spectra [B,F,bins] -> pooled power [B,bins] = sum_f |X|^2 and cross [B,bins] = sum conj(X) Y.
template <class T>
void pool_spectra_cpu(int64_t batch, int64_t fields, int64_t bins, const Complex<T>* image,
                      const Complex<T>* observation, Complex<T>* power, Complex<T>* cross);

// K = (cross + alpha Z) / (power + noise |G|^2 + alpha), in place of z; n m as above.
template <class T>
struct FullGridStep {
  int64_t batch, n, m;
  bool gradient;
  double alpha;
  const double* noise;  // [B]
  const Complex<T>* power;
  const Complex<T>* cross;
  Complex<T>* z;
};
template <class T>
void full_grid_step_cpu(const FullGridStep<T>& p);

// planes [P,n,m] -> out [P,rows,cols]: out[i,j] = plane[(i - oy) mod n, (j - ox) mod m];
// and the scatter that transposes it, zero elsewhere.
template <class T>
void gather_wrapped_cpu(int64_t planes, int64_t n, int64_t m, int64_t rows, int64_t cols,
                        int64_t oy, int64_t ox, const T* in, T* out);
template <class T>
void scatter_wrapped_cpu(int64_t planes, int64_t n, int64_t m, int64_t rows, int64_t cols,
                         int64_t oy, int64_t ox, const T* in, T* out);

// State of one conjugate-gradient solve per image; all [B,size].
template <class T>
struct ConjugateGradient {
  int64_t batch, size;
  T* solution;
  T* residual;
  T* direction;
  double* energy;  // [B] squared norm of the residual
};
// residual = rhs + alpha * target - (product + alpha * solution); direction = residual.
template <class T>
void cg_start_cpu(const ConjugateGradient<T>& cg, double alpha, const T* rhs, const T* target,
                  const T* product);
// One step, with product = A direction.
template <class T>
void cg_step_cpu(const ConjugateGradient<T>& cg, double alpha, const T* product);

// kernels [P,size]: max(k, 0) / sum; where nothing is left, the plane of fallback.
template <class T>
void clamp_normalize_cpu(int64_t planes, int64_t size, const T* fallback, T* kernel);

// kernels [P,size] -> prior_step, then clamp and normalise.
template <class T>
void apply_prior_cpu(int64_t planes, int64_t size, KernelPrior prior, double regularization,
                     double penalty, T* kernel);

// Euclidean projection of each plane [size] onto {k >= 0, sum k = 1}.
template <class T>
void project_simplex_cpu(int64_t planes, int64_t size, const T* in, T* out);

// Shift of each plane [kh,kw] that brings its centre of mass to (kh / 2, kw / 2), bilinear
// (or to the nearest pixel), zero outside, rescaled to the plane's sum.
template <class T>
void recenter_kernel_cpu(int64_t planes, int64_t kh, int64_t kw, bool subpixel, const T* in,
                         T* out);

}  // namespace latentdem
