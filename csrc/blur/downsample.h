// Direct convolution of which only every `factor`-th row and column is computed.
//
// B batch, C channels, He We extended image (see blur.h), h w = ceil(H' / factor),
// ceil(W' / factor).
#pragma once

#include <cstdint>

#include "blur/blur.h"

namespace latentdem {

struct DownsampleShape {
  BlurShape blur;
  int64_t factor;

  LATENTDEM_HD int64_t height() const { return (blur.output_height() + factor - 1) / factor; }
  LATENTDEM_HD int64_t width() const { return (blur.output_width() + factor - 1) / factor; }
};

// extended [B,C,He,We], kernel -> output [B,C,h,w]
template <class T>
void convolve_strided_cpu(const DownsampleShape& s, const T* extended, const T* kernel, T* output);

// Its transpose in the image: residual [B,C,h,w], kernel -> extended [B,C,He,We]
template <class T>
void convolve_strided_adjoint_cpu(const DownsampleShape& s, const T* residual, const T* kernel,
                                  T* extended);

}  // namespace latentdem
