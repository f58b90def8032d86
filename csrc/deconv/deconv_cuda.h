// Launchers of the deconvolutions' CUDA kernels: device memory, contiguous, no tensors. Letters as
// in deconv.h; n m is the transforms' grid (H W for the Wiener step), M = m / 2 + 1.
//
// Inverse transforms come without their factor 1 / (n m): the next kernel multiplies by `scale`,
// which saves a pass over memory per transform.
#pragma once

#include "common/cuda_stream.h"
#include "deconv/deconv.h"

namespace latentdem {

// output [B,C,n,M] = factor K input, or factor conj(K) input; they may be the same memory.
template <class T>
struct TransferParams {
  BlurShape s;
  SpectralGrid g;
  const Complex<T>* kernel;  // [Bk,Ck,n,M]
  bool conjugate;
  T factor;
  const Complex<T>* input;
  Complex<T>* output;
};
template <class T>
void apply_transfer_cuda(const TransferParams<T>& p, cudaStream_t stream);

// The Wiener step ----------------------------------------------------------------------------

template <class T>
struct WienerGrid {
  BlurShape s;
  SpectralGrid g;
  WienerParams<T> filter;
  T scale;
};

// scale (X + conj(K)(Y - K X) / (|K|^2 + ratio)) in place of X; observation as in wiener_solve_cpu.
template <class T>
void wiener_solve_cuda(const WienerGrid<T>& p, const Complex<T>* observation,
                       int64_t observation_stride_b, Complex<T>* image, cudaStream_t stream);

// scale (X + conj(K) M / (|K|^2 + ratio)) in place of M, the spectrum of the misfit.
template <class T>
void wiener_correct_cuda(const WienerGrid<T>& p, const Complex<T>* image, Complex<T>* misfit,
                         cudaStream_t stream);

// spectrum *= filter, without scale. If `echo` is not null, it first gets Re(conj(misfit)
// spectrum), added to what it holds if `accumulate`.
template <class T>
struct WienerFilterPass {
  WienerFilter filter;
  Complex<T>* spectrum;
  const Complex<T>* misfit;
  T* echo;
  bool accumulate;
};
template <class T>
void wiener_filter_cuda(const WienerGrid<T>& p, const WienerFilterPass<T>& pass,
                        cudaStream_t stream);

// Spatial passes, in place; fields come unscaled.
// prediction -> mask * (observation - scale prediction)
template <class T>
void masked_misfit_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, const T* observation,
                        int64_t observation_stride_b, T* prediction, cudaStream_t stream);
// change -> misfit + (1 - mask) * scale change
template <class T>
void impute_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, const T* misfit, T* change,
                 cudaStream_t stream);
// Transpose of impute: total += scale grad, or total = scale grad if it is the first; then
// grad -> (1 - mask) scale grad, or if it is the last, total *= mask instead.
template <class T>
void impute_transposed_cuda(const WienerGrid<T>& p, const MaskParams<T>& m, bool first, bool last,
                            T* total, T* grad, cudaStream_t stream);

// All that is left to do at the bins, once the incoming gradient G and the recursion are known.
// The gradient in the observation, O, is given as a spectrum, or else (without a mask) it is
// K G / D; the misfit is given, or else it is Y - K X. Nothing but G and K is read where neither
// gradient of the filter is wanted.
template <class T>
struct WienerBackward {
  int64_t groups;  // of the planes that share a kernel, see plane_groups
  const Complex<T>* image;
  const Complex<T>* misfit;       // or null
  const Complex<T>* observation;  // or null
  int64_t observation_stride_b;
  const T* echo;                 // or null
  const Complex<T>* observed;    // O, or null
  Complex<T>* grad;              // G -> scale (G - conj(K) O)
  Complex<T>* grad_observation;  // gets scale O, or null
  Complex<T>* grad_kernel;       // [groups,kernels,n,M] gets sums, scaled, or null
  T* grad_ratio;                 // [B,C,n,M], or null
};
template <class T>
void wiener_backward_cuda(const WienerGrid<T>& p, const WienerBackward<T>& b, cudaStream_t stream);

// Richardson-Lucy ----------------------------------------------------------------------------

// Where images lie on the grid: in its corner extended beyond their border, or, if `wraps`, the
// grid is the circle itself.
template <class T>
struct LucyGrid {
  BlurShape s;
  SpectralGrid g;
  bool wraps;
  const T* observation;  // [B,C,H',W']
  const T* mask;         // [B|1,C|1,H',W'], may be null
  int64_t mask_stride_b, mask_stride_c;
  T floor;
};

// grid [B,C,n,m], the prediction unscaled -> mask * observation / max(prediction, floor) in place;
// or if `weights`, the mask alone, without reading the grid. Zero outside H' W'.
template <class T>
void lucy_ratio_cuda(const LucyGrid<T>& p, T scale, bool weights, T* grid, cudaStream_t stream);

// Adjoint of the weights, still on the grid and unscaled -> inverse [B,C,H,W]: 1 / weight, or
// zero where it is at most `least`.
template <class T>
void lucy_inverse_cuda(const LucyGrid<T>& p, T scale, T least, const T* grid, T* inverse,
                       cudaStream_t stream);

// One update as in LucyUpdateParams, with the correction still on the grid; the output also goes
// to all its places on the next grid, if that is not null.
template <class T>
struct LucyStep {
  const T* image;
  const T* correction;  // [B,C,n,m], unscaled
  const T* inverse;
  T scale;
  T total_variation;
  T* output;
  T* next;  // [B,C,n,m]
};
template <class T>
void lucy_step_cuda(const LucyGrid<T>& p, const LucyStep<T>& step, cudaStream_t stream);

}  // namespace latentdem
