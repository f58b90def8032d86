// Launchers of the blur's CUDA kernels: device memory, contiguous, no tensors. Letters as in
// blur.h.
//
// Sums over many blocks take two launches: each block leaves a partial sum, a second kernel adds
// these in their order.
#pragma once

#include "blur/downsample.h"
#include "common/cuda_stream.h"

namespace latentdem {

// Tiles of the direct kernels.
inline constexpr int64_t kTile = 32;
LATENTDEM_HD int64_t tiles_per_plane(int64_t height, int64_t width) {
  return ((height + kTile - 1) / kTile) * ((width + kTile - 1) / kTile);
}

// Observation and mask, as in ResidualParams.
template <class T>
struct Observed {
  const T* observation;  // [B,C,H',W']
  const T* mask;         // may be null
  int64_t mask_stride_b, mask_stride_c;
};

// image, kernel -> output [B,C,H',W'], the blurred image; or with `observed`, the residual
// mask * (k * x - y), if output is not null, and sums of mask * (k * x - y)^2 per tile in
// losses [B*C, tiles_per_plane(H', W')].
template <class T>
struct DirectForward {
  BlurShape s;
  const T* image;
  const T* kernel;
  bool has_observation;
  Observed<T> observed;
  T* output;
  double* losses;
};
template <class T>
void direct_forward_cuda(const DirectForward<T>& p, cudaStream_t stream);

// residual [B,C,H',W'] -> grad_image [B,C,H,W] with the kernel, and with the image, sums per tile
// of the kernel's gradient: grad_taps [B*C, tiles_per_plane(H, W), kh*kw]. Either may be null.
template <class T>
struct DirectGradients {
  BlurShape s;
  const T* residual;
  const T* kernel;
  T* grad_image;
  const T* image;
  T* grad_taps;
};
template <class T>
void direct_gradients_cuda(const DirectGradients<T>& p, cudaStream_t stream);

// losses [B, count] -> loss[b] = 0.5 * their sum.
template <class T>
void sum_losses_cuda(int64_t batch, int64_t count, const double* losses, T* loss,
                     cudaStream_t stream);

// grad_taps [B*C,tiles,kh*kw] -> the kernel's gradient, in the kernel's shape.
template <class T>
void sum_taps_cuda(const BlurShape& s, int64_t tiles, const T* grad_taps, T* grad_kernel,
                   cudaStream_t stream);

// image [B,C,H,W], kernel -> output [B,C,h,w]: every factor-th row and column of the blur; and
// the adjoint, residual [B,C,h,w] -> grad_image [B,C,H,W].
template <class T>
void convolve_strided_cuda(const DownsampleShape& s, const T* image, const T* kernel, T* output,
                           cudaStream_t stream);
template <class T>
void convolve_strided_adjoint_cuda(const DownsampleShape& s, const T* residual, const T* kernel,
                                   T* grad_image, cudaStream_t stream);

// Between images and the FFT grid [B,C,n,m] --------------------------------------------------

// The extended image (or the image itself, with `extend` false) in the corner, zero elsewhere.
template <class T>
void image_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, bool extend, const T* image,
                        T* grid, cudaStream_t stream);

// residual [B,C,H',W'] in the corner of the grid, zero elsewhere.
template <class T>
void residual_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, const T* residual, T* grid,
                           cudaStream_t stream);

// The transpose of the extension: grid [B,C,n,m] -> image [B,C,H,W].
template <class T>
void grid_to_image_cuda(const BlurShape& s, const SpectralGrid& g, const T* grid, T* image,
                        cudaStream_t stream);

// kernels [P,kh,kw] -> grid [P,n,m], and the gather that transposes it.
template <class T>
void kernel_to_grid_cuda(const BlurShape& s, const SpectralGrid& g, const T* kernel, T* grid,
                         cudaStream_t stream);
template <class T>
void grid_to_kernel_cuda(const BlurShape& s, const SpectralGrid& g, const T* grid, T* kernel,
                         cudaStream_t stream);

// Elements of one plane's grid per partial loss below.
inline constexpr int64_t kLossChunk = 4096;
LATENTDEM_HD int64_t loss_chunks(const SpectralGrid& g) {
  return (g.n * g.m + kLossChunk - 1) / kLossChunk;
}

// prediction [B,C,n,m] -> the residual on the same grid, zero outside H' W', in place if asked
// for; losses [B*C, loss_chunks(g)] as in DirectForward.
template <class T>
struct GridResidual {
  BlurShape s;
  SpectralGrid g;
  Observed<T> observed;
  T* prediction;
  bool keep_residual;
  double* losses;
};
template <class T>
void grid_residual_cuda(const GridResidual<T>& p, cudaStream_t stream);

// Spectra [B,C,n,M] --------------------------------------------------------------------------

// image *= K.
template <class T>
void multiply_spectra_cuda(const BlurShape& s, const SpectralGrid& g, const Complex<T>* kernel,
                           Complex<T>* image, cudaStream_t stream);

// Blocks of bins, and groups of the planes that share a kernel, of the kernel below.
inline constexpr int64_t kBinBlock = 256;
LATENTDEM_HD int64_t bin_blocks(const SpectralGrid& g) {
  return (g.bins() + kBinBlock - 1) / kBinBlock;
}
// `planes` share each of `kernels`.
int64_t group_count(const SpectralGrid& g, int64_t kernels, int64_t planes);
int64_t plane_groups(const BlurShape& s, const SpectralGrid& g);

// One pass over the bins: R is `second`, or K X - second if that is the observation's spectrum,
// and then losses [B*C, bin_blocks(g)] get twice the loss by Parseval. conj(K) R replaces
// `second` if `kernel` is not null; conj(X) R, summed over each group of planes that share a
// kernel, goes to grad_kernel [groups, kernels, n, M] if that is not null.
template <class T>
struct SpectralGradients {
  BlurShape s;
  SpectralGrid g;
  int64_t groups;
  const Complex<T>* image;
  const Complex<T>* kernel;
  Complex<T>* second;
  bool second_is_observation;
  Complex<T>* grad_kernel;
  double* losses;
};
template <class T>
void spectral_gradients_cuda(const SpectralGradients<T>& p, cudaStream_t stream);

// partial [groups, count] -> their sum, in place of the first group.
template <class T>
void sum_groups_cuda(int64_t groups, int64_t count, Complex<T>* partial, cudaStream_t stream);

}  // namespace latentdem
