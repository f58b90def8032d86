// Kernels of the deconvolutions: plain parameter structs, contiguous memory, no tensors.
//
// B batch, C channels, H W image (a periodic canvas for the Wiener filter); M = W / 2 + 1
// columns of its half spectrum; H' W' blurred image. Shapes and grids are those of blur.h.
#pragma once

#include <cstdint>

#include "blur/blur.h"
#include "deconv/deconv_math.h"

namespace latentdem {

// The filter: K and s^2 / r^2. Strides of the ratio are in elements and zero where one value
// serves a whole dimension.
template <class T>
struct WienerParams {
  const Complex<T>* kernel;  // [Bk,Ck,H,M]
  const T* ratio;
  int64_t ratio_stride_b, ratio_stride_c, ratio_stride_bin;
};

// image [B,C,H,M] = X + conj(K)(Y - K X) / (|K|^2 + ratio), in place of X. The observation's
// stride is in images: zero if one observation serves the batch.
template <class T>
void wiener_solve_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                      const Complex<T>* observation, int64_t observation_stride_b,
                      Complex<T>* image);

// spectrum [B,C,H,M] *= filter.
template <class T>
void wiener_filter_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& p,
                       WienerFilter filter, Complex<T>* spectrum);

// Spatial passes under a mask [B|1,1,H,W], whose stride is in images.
template <class T>
struct MaskParams {
  const T* mask;
  int64_t stride_b;
};
// prediction [B,C,H,W] -> mask * (observation - prediction), in place.
template <class T>
void masked_misfit_cpu(const BlurShape& s, const MaskParams<T>& m, const T* observation,
                       int64_t observation_stride_b, T* prediction);
// change -> misfit + (1 - mask) * change, in place: what is not observed is imputed.
template <class T>
void impute_cpu(const BlurShape& s, const MaskParams<T>& m, const T* misfit, T* change);
// Transpose of impute: total += grad, then grad *= 1 - mask.
template <class T>
void impute_transposed_cpu(const BlurShape& s, const MaskParams<T>& m, T* total, T* grad);
// field *= mask
template <class T>
void apply_mask_cpu(const BlurShape& s, const MaskParams<T>& m, T* field);

// echo [B,C,H,M] += Re(conj(a) b)
template <class T>
void accumulate_echo_cpu(const BlurShape& s, const SpectralGrid& g, const Complex<T>* a,
                         const Complex<T>* b, T* echo);

// From the spectra of the last misfit and of the incoming gradient (their product is the
// gradient in the gain), the echo's gradient (or null), X and the gradient in the prediction
// K X: the gradient in K, summed over every dimension along which the kernel is broadcast,
// and the gradient in the ratio of every bin [B,C,H,M], ready to be summed. Either may be null.
template <class T>
struct WienerGradientParams {
  const Complex<T>* misfit;
  const Complex<T>* grad;
  const T* echo;
  const Complex<T>* image;
  const Complex<T>* grad_prediction;
  Complex<T>* grad_kernel;
  T* grad_ratio;
};
template <class T>
void wiener_gradients_cpu(const BlurShape& s, const SpectralGrid& g, const WienerParams<T>& w,
                          const WienerGradientParams<T>& p);

// Richardson-Lucy.

// weight -> 1 / weight in place, or zero where it is at most `least`: there the observation says
// nothing about a pixel.
template <class T>
void invert_weight_cpu(int64_t count, T least, T* weight);

// output [B,C,H,W] = image * max(correction, 0) * inverse / (1 - total_variation * curvature);
// pixels of zero inverse weight keep the image's value in place of the first product. The output
// may be the image's own memory if total_variation is zero.
template <class T>
struct LucyUpdateParams {
  const T* image;
  const T* correction;
  const T* inverse;
  T total_variation;
  T floor;
  T* output;
};
template <class T>
void lucy_update_cpu(const BlurShape& s, const LucyUpdateParams<T>& p);

}  // namespace latentdem
