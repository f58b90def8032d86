// Host/device decoration, so that *_math.h serves the C++ and the CUDA compiler alike.
#pragma once

#if defined(__CUDACC__)
#define LATENTDEM_HD __host__ __device__ inline
#else
#define LATENTDEM_HD inline
#endif
