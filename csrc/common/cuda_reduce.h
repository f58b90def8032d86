// Sums over a warp and over a block, in an order that depends on the block's size only.
#pragma once

#include "common/cuda_launch.h"

namespace latentdem {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the same bits: each step adds the same two numbers on both sides.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

template <class T>
__device__ inline T warp_max(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Sums N values over a warp, N a power of two up to 32: lane l gets the sum of values[l % N] over
// all lanes. Every step halves what a lane holds, so that the whole takes 31 shuffles for N = 32
// where sum by sum it would be 160. Spoils values.
template <int N, int kHalf = N / 2, class T>
__device__ inline T warp_sum_each(T (&values)[N]) {
  if constexpr (kHalf > 0) {
    const bool upper = (threadIdx.x & kHalf) != 0;
    for (int i = 0; i < kHalf; ++i) {
      const T keep = upper ? values[i + kHalf] : values[i];
      const T give = upper ? values[i] : values[i + kHalf];
      values[i] = keep + __shfl_xor_sync(kFullWarp, give, kHalf);
    }
    return warp_sum_each<N, kHalf / 2>(values);
  } else {
    T total = values[0];
    for (int offset = N; offset < 32; offset *= 2)
      total += __shfl_xor_sync(kFullWarp, total, offset);
    return total;
  }
}

// The sum over a one-dimensional block of whole warps, valid in every thread. All threads call
// it. `scratch` is shared memory for 32 values, free again when the call returns.
template <class T>
__device__ inline T block_sum(T value, T* scratch) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const T total = warp_sum(lane < blockDim.x / 32 ? scratch[lane] : T(0));
  __syncthreads();
  return total;
}

// The largest value, likewise; values must not be NaN.
template <class T>
__device__ inline T block_max(T value, T* scratch) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_max(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const T largest = warp_max(scratch[lane < blockDim.x / 32 ? lane : 0]);
  __syncthreads();
  return largest;
}

}  // namespace latentdem
