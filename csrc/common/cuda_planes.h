// Launches over planes x elements: block row y takes planes y, y + gridDim.y, ..., so that what
// depends on the plane is computed once a thread and no element's index is divided.
#pragma once

#include "common/cuda_launch.h"

namespace latentdem {

inline dim3 plane_grid(int64_t planes, int64_t elements, int64_t threads) {
  constexpr int64_t kMostRows = 65535;
  const int64_t rows = planes < 1 ? 1 : planes < kMostRows ? planes : kMostRows;
  return dim3(grid_size(elements, threads), static_cast<unsigned>(rows));
}

#if defined(__CUDACC__) || defined(LATENTDEM_CUDA_EMULATION)
// for (int64_t plane = first_plane(); plane < planes; plane += plane_step())
//   for (int64_t i = thread_index(); i < elements; i += thread_count())
__device__ inline int64_t first_plane() { return blockIdx.y; }
__device__ inline int64_t plane_step() { return gridDim.y; }
#endif

}  // namespace latentdem
