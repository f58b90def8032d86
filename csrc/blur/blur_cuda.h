// Launchers of the blur's CUDA kernels: device memory, contiguous, no tensors. Letters as in
// blur.h.
#pragma once

#include "blur/downsample.h"
#include "common/cuda_stream.h"

namespace latentdem {

// image [B,C,H,W], kernel -> output [B,C,h,w]: every factor-th row and column of the blur.
template <class T>
void convolve_strided_cuda(const DownsampleShape& s, const T* image, const T* kernel, T* output,
                           cudaStream_t stream);

}  // namespace latentdem
