// Launches over planes x elements: block row y takes planes y, y + gridDim.y, ..., so that no
// thread divides an index. Same results on any grid.
#pragma once

#include "common/cuda_launch.h"

namespace latentdem {

inline dim3 plane_grid(int64_t planes, int64_t elements, int64_t threads) {
  constexpr int64_t kMostRows = 65535;
  const unsigned across = grid_size(elements, threads);
  return dim3(across, static_cast<unsigned>(planes < 1           ? 1
                                            : planes < kMostRows ? planes
                                                                 : kMostRows));
}

// body(plane, element)
template <class Body>
__device__ inline void for_each_in_planes(int64_t planes, int64_t elements, const Body& body) {
  for (int64_t plane = blockIdx.y; plane < planes; plane += gridDim.y)
    for (int64_t i = thread_index(); i < elements; i += thread_count()) body(plane, i);
}

}  // namespace latentdem
