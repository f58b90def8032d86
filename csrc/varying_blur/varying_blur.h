// Kernels of spatially varying blur: plain parameter structs, contiguous memory, no tensors.
//
// y = sum_p k_p * (w_p x). B batch, C channels, P patches, H W image, H' W' blurred image,
// kh kw kernel, n m the grid that all patches share, M = m / 2 + 1.
#pragma once

#include <algorithm>
#include <cstdint>

#include "blur/blur.h"
#include "varying_blur/varying_blur_math.h"

namespace latentdem {

struct VaryingShape {
  BlurShape blur;  // sizes and boundary; its kernel strides are not used
  int64_t patches;
  int64_t kernel_batch;   // 1 or B
  const PatchBox* boxes;  // [P]
  int64_t n, m;

  int64_t patch_planes() const { return blur.planes() * patches; }
  // Index of the kernel of patch plane (b, c, p).
  int64_t kernel_index(int64_t patch_plane) const {
    const int64_t b = patch_plane / patches / blur.channels;
    return (kernel_batch == 1 ? 0 : b) * patches + patch_plane % patches;
  }
  // Rows (columns) of the grid that the convolution of a box fills.
  int64_t filled_rows(int64_t patch) const {
    return std::min(boxes[patch].height + blur.kernel_height - 1, n);
  }
  int64_t filled_columns(int64_t patch) const {
    return std::min(boxes[patch].width + blur.kernel_width - 1, m);
  }
};

// Bounding boxes of the nonzero weights [P,H,W]; one pixel where all are zero.
template <class T>
void find_boxes_cpu(const BlurShape& s, int64_t patches, const T* weights, PatchBox* boxes);

// image [B,C,H,W] -> w_p x on the grids [B,C,P,n,m], zero outside the box; and its transpose.
template <class T>
void cut_source_cpu(const VaryingShape& s, const T* weights, const T* image, T* grids);
template <class T>
void add_source_cpu(const VaryingShape& s, const T* weights, const T* grids, T* image);

// blurred grids [B,C,P,n,m] -> their sum [B,C,H',W']; and its transpose.
template <class T>
void add_target_cpu(const VaryingShape& s, const T* grids, T* output);
template <class T>
void cut_target_cpu(const VaryingShape& s, const T* output, T* grids);

// spectra [B,C,P,n,M] *= K_p, or conj(K_p).
template <class T>
void patch_multiply_cpu(const VaryingShape& s, const Complex<T>* kernel, bool conjugate,
                        Complex<T>* spectra);

// grad_kernel [Bk,P,n,M] = sum over channels (and the batch if kernels are shared) of
// conj(X) R; then, if the kernel is given, residual = conj(K_p) R in place.
template <class T>
struct PatchGradientParams {
  const Complex<T>* image;
  const Complex<T>* kernel;
  Complex<T>* residual;
  Complex<T>* grad_kernel;
};
template <class T>
void patch_gradients_cpu(const VaryingShape& s, const PatchGradientParams<T>& p);

}  // namespace latentdem
