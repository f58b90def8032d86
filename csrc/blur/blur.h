// Kernels of the blur operators: plain parameter structs, no tensors. Images come in any layout;
// kernels and what is only passed between these functions are contiguous.
//
// B batch, C channels, H W image, kh kw kernel; He We extended image (see blur_math.h);
// n m FFT grid; M = m / 2 + 1 columns of its half spectrum.
#pragma once

#include <cstdint>

#include "blur/blur_math.h"
#include "common/complex.h"
#include "common/strided.h"

namespace latentdem {

// Sizes that all kernels of the family share. The kernel strides are in elements and zero
// along a broadcast dimension.
struct BlurShape {
  int64_t batch, channels;
  int64_t height, width;  // image
  int64_t kernel_height, kernel_width;
  int64_t kernel_stride_b, kernel_stride_c;  // in kernels, not in elements
  Boundary boundary;

  LATENTDEM_HD bool keeps_size() const { return boundary != Boundary::kValid; }
  LATENTDEM_HD int64_t extended_height() const {
    return height + (keeps_size() ? kernel_height - 1 : 0);
  }
  LATENTDEM_HD int64_t extended_width() const {
    return width + (keeps_size() ? kernel_width - 1 : 0);
  }
  LATENTDEM_HD int64_t output_height() const { return extended_height() - kernel_height + 1; }
  LATENTDEM_HD int64_t output_width() const { return extended_width() - kernel_width + 1; }
  LATENTDEM_HD int64_t planes() const { return batch * channels; }
  LATENTDEM_HD int64_t kernel_index(int64_t plane) const {
    return plane / channels * kernel_stride_b + plane % channels * kernel_stride_c;
  }
  // The i-th of the planes that share a kernel.
  int64_t shared_plane(int64_t kernel, int64_t i) const {
    if (kernel_stride_b == 0) return kernel_stride_c == 0 ? i : i * channels + kernel;
    return kernel_stride_c == 0 ? kernel * channels + i : kernel;
  }
  // 1 or B, 1 or C: the kernel tensor's own leading sizes.
  LATENTDEM_HD int64_t kernel_batch() const { return kernel_stride_b == 0 ? 1 : batch; }
  LATENTDEM_HD int64_t kernel_channels() const { return kernel_stride_c == 0 ? 1 : channels; }
};

// image [B,C,H,W] -> extended [B,C,He,We], contiguous.
template <class T>
void extend_cpu(const BlurShape& s, const Strided<const T>& image, T* extended);

// The transpose of extend: extended [B,C,He,We], contiguous, -> image [B,C,H,W].
template <class T>
void fold_cpu(const BlurShape& s, const T* extended, const Strided<T>& image);

// Direct convolution: extended [B,C,He,We], kernel -> output [B,C,H',W'].
template <class T>
void convolve_cpu(const BlurShape& s, const Strided<const T>& extended, const T* kernel,
                  const Strided<T>& output);

// Its transpose in the image: residual [B,C,H',W'], kernel -> extended [B,C,He,We].
template <class T>
void convolve_adjoint_cpu(const BlurShape& s, const Strided<const T>& residual, const T* kernel,
                          const Strided<T>& extended);

// Its transpose in the kernel: extended, residual -> kernel gradient, summed over every
// dimension along which the kernel is broadcast.
template <class T>
void convolve_kernel_cpu(const BlurShape& s, const Strided<const T>& extended,
                         const Strided<const T>& residual, T* kernel);

// residual = mask * (prediction - observation), and
// loss[b] = 0.5 * sum mask * (prediction - observation)^2, accumulated in double. Residual and
// prediction may be the same memory; the mask may have no data.
template <class T>
struct ResidualParams {
  Strided<const T> prediction, observation, mask;  // [B,C,H',W']
  Strided<T> residual;
  T* loss;  // [B]
};
template <class T>
void residual_cpu(const BlurShape& s, const ResidualParams<T>& p);

// Where the FFT grid keeps tap (i, j): row (i - origin_y) mod n, column (j - origin_x) mod m.
struct SpectralGrid {
  int64_t n, m;
  int64_t origin_y, origin_x;
  LATENTDEM_HD int64_t columns() const { return m / 2 + 1; }
  LATENTDEM_HD int64_t bins() const { return n * columns(); }
};

// kernels [P,kh,kw] -> grid [P,n,m], zero elsewhere; and the gather that transposes it.
template <class T>
void embed_kernel_cpu(const BlurShape& s, const SpectralGrid& g, int64_t count, const T* kernel,
                      T* grid);
template <class T>
void gather_kernel_cpu(const BlurShape& s, const SpectralGrid& g, int64_t count, const T* grid,
                       T* kernel);

// spectrum [B,C,n,M] *= K, or conj(K).
template <class T>
void spectrum_multiply_cpu(const BlurShape& s, const SpectralGrid& g, const Complex<T>* kernel,
                           bool conjugate, Complex<T>* spectrum);

}  // namespace latentdem
