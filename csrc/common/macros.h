// Host/device decoration, so that *_math.h serves the C++ and the CUDA compiler alike.
#pragma once

#if defined(__CUDACC__)
#define LATENTDEM_HD __host__ __device__ inline
#else
// Always: a copy left to the linker might come from a build for a newer processor (isa.h).
#define LATENTDEM_HD inline __attribute__((always_inline))
#endif
