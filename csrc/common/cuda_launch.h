// Launches and indices of CUDA kernels, alike under nvcc and in tests/cuda_emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if !defined(LATENTDEM_CUDA_EMULATION)
#include <stdexcept>
#include <string>
#endif

namespace latentdem {

// Blocks of a grid-stride loop: enough for several waves on any device, so that larger problems
// only lengthen the loop, and an index never depends on the device.
inline constexpr int64_t kGridCap = 1 << 14;

// Blocks of `threads` for `count` items, at most kGridCap; at least one, for an empty problem
// should not have reached a launch.
inline unsigned grid_size(int64_t count, int64_t threads) {
  const int64_t blocks = (count + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kGridCap ? kGridCap : blocks);
}

#if defined(__CUDACC__) || defined(LATENTDEM_CUDA_EMULATION)
// for (int64_t i = thread_index(); i < count; i += thread_count()), in one-dimensional launches.
__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The launch's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ inline T* dynamic_shared() {
#if defined(LATENTDEM_CUDA_EMULATION)
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char latentdem_dynamic_shared[];
  return reinterpret_cast<T*>(latentdem_dynamic_shared);
#endif
}
#endif

// The most shared memory that a block may have, static and dynamic: 227 KiB for sm_90, 163 KiB for
// sm_80, 99 KiB for sm_86 and sm_89.
#if defined(LATENTDEM_CUDA_EMULATION)
inline size_t max_shared_bytes() { return 227 * 1024; }
#else
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

inline size_t max_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

// More dynamic shared memory than 48 KiB must be asked for.
template <class Kernel>
void allow_shared(Kernel* kernel, size_t bytes, const char* name) {
  if (bytes > 48 * 1024)
    check_cuda(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        name);
}
#endif

}  // namespace latentdem

// LDEM_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...). Put kernels with several
// template arguments in parentheses. Throws std::runtime_error naming the kernel.
#if defined(LATENTDEM_CUDA_EMULATION)
#define LDEM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::latentdem::emulation::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#else
#define LDEM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)               \
  do {                                                                            \
    const auto latentdem_kernel = kernel;                                         \
    ::latentdem::allow_shared(latentdem_kernel, shared_bytes, #kernel);           \
    latentdem_kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    ::latentdem::check_cuda(cudaGetLastError(), #kernel);                         \
  } while (false)
#endif
