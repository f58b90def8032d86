// Launchers of the CUDA kernels of spatially varying blur, y = sum_p k_p * (w_p x): device memory,
// contiguous, no tensors. Letters as in varying_blur.h; n m is the grid of the whole image.
//
// The host never learns where weights are zero (it would have to wait for the device), so that
// patches have no boxes here: a tile skips the patches without weight in it.
#pragma once

#include "blur/blur_cuda.h"
#include "common/cuda_stream.h"

namespace latentdem {

struct PatchShape {
  BlurShape blur;  // sizes and boundary; its kernel strides are not used
  int64_t patches;
  int64_t kernel_batch;  // 1 or B

  LATENTDEM_HD int64_t kernels() const { return kernel_batch * patches; }
  // The first of the P kernels of a plane (b, c).
  LATENTDEM_HD int64_t first_kernel(int64_t plane) const {
    return kernel_batch == 1 ? 0 : plane / blur.channels * patches;
  }
  // Planes that share a kernel: a run of this many.
  LATENTDEM_HD int64_t shared_planes() const {
    return kernel_batch == 1 ? blur.planes() : blur.channels;
  }
};

// Direct path --------------------------------------------------------------------------------

// Output, or residual and losses, as in DirectForward.
template <class T>
struct VaryingForward {
  PatchShape s;
  const T* image;
  const T* kernels;  // [Bk,P,kh,kw]
  const T* weights;  // [P,H,W]
  bool has_observation;
  Observed<T> observed;
  T* output;
  double* losses;
};
template <class T>
void varying_forward_cuda(const VaryingForward<T>& p, cudaStream_t stream);

// residual [B,C,H',W'] -> grad_image [B,C,H,W]
template <class T>
struct VaryingAdjoint {
  PatchShape s;
  const T* residual;
  const T* kernels;
  const T* weights;
  T* grad_image;
};
template <class T>
void varying_adjoint_cuda(const VaryingAdjoint<T>& p, cudaStream_t stream);

// Sums per tile of the kernels' gradients: grad_taps [B,C,tiles_per_plane(H', W'),P,kh*kw].
template <class T>
struct VaryingTaps {
  PatchShape s;
  const T* image;
  const T* residual;
  const T* weights;
  T* grad_taps;
};
template <class T>
void varying_taps_cuda(const VaryingTaps<T>& p, cudaStream_t stream);

// matrices [count,rows,columns] -> [count,columns], the sums of their rows.
template <class T>
void sum_rows_cuda(int64_t count, int64_t rows, int64_t columns, const T* matrices, T* sums,
                   cudaStream_t stream);

// Spectral path ------------------------------------------------------------------------------

// image -> w_p x on grids [B,C,P,n,m], as in image_to_grid_cuda.
template <class T>
void cut_patches_cuda(const PatchShape& s, const SpectralGrid& g, bool extend, const T* image,
                      const T* weights, T* grids, cudaStream_t stream);

// spectra X [B,C,P,n,M], K [Bk,P,n,M] -> output [B,C,n,M] = scale sum_p K_p X_p.
template <class T>
void sum_patches_cuda(const PatchShape& s, const SpectralGrid& g, T scale, const Complex<T>* image,
                      const Complex<T>* kernels, Complex<T>* output, cudaStream_t stream);

// Residual R [B,C,n,M]: scale conj(X_p) R, summed over each group of planes that share a kernel,
// goes to grad_kernels [groups,Bk,P,n,M], if that is not null; scale conj(K_p) R to patches
// [B,C,P,n,M], if that is not null. The latter may be the memory of X.
template <class T>
struct PatchGradients {
  PatchShape s;
  SpectralGrid g;
  T scale;
  int64_t groups;
  const Complex<T>* residual;
  const Complex<T>* image;
  const Complex<T>* kernels;
  Complex<T>* grad_kernels;
  Complex<T>* patches;
};
template <class T>
void patch_gradients_cuda(const PatchGradients<T>& p, cudaStream_t stream);

// Transpose of cut_patches: grids [B,C,P,n,m] -> image [B,C,H,W].
template <class T>
void fold_patches_cuda(const PatchShape& s, const SpectralGrid& g, bool extend, const T* grids,
                       const T* weights, T* image, cudaStream_t stream);

}  // namespace latentdem
