// The part of CUDA C++ that the kernels use, for g++. See ../README.md.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static __attribute__((aligned(512)))  // compile.py looks for it
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct CUstream_st;
typedef CUstream_st* cudaStream_t;

namespace latentdem {
namespace emulation {

// Where in the source a barrier or a warp operation stands.
struct Site {
  const char* file;
  int line;
};

__attribute__((const)) uint3 thread_position();
__attribute__((const)) uint3 block_position();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
void* dynamic_shared();

enum class Barrier { kPlain, kCount, kAnd, kOr };
int synchronize(Barrier kind, int predicate, Site site);

enum class WarpOperation { kSync, kShuffle, kBallot, kMatch };
// Waits for all lanes in `mask`. A shuffle returns the payload of lane `source`, a ballot the
// lanes with a payload that is not zero, a match the lanes with an equal payload.
uint64_t warp_collective(WarpOperation operation, unsigned mask, uint64_t payload, int source,
                         Site site);
int lane();
unsigned active_lanes();
[[noreturn]] void trap(const char* what);

// Marks an atomic access; the caller performs it.
void atomic_access(void* address, size_t bytes, const void* site);

using Body = void (*)(const void* arguments);
void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         Body body, const void* arguments, size_t bytes);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  };
  const Call call{kernel, {static_cast<std::decay_t<Parameters>>(arguments)...}};
  run(
      name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* pointer) {
        const Call& c = *static_cast<const Call*>(pointer);
        std::apply(c.kernel, c.parameters);
      },
      &call, sizeof(call));
}

}  // namespace emulation
}  // namespace latentdem

#define threadIdx (::latentdem::emulation::thread_position())
#define blockIdx (::latentdem::emulation::block_position())
#define blockDim (::latentdem::emulation::block_size())
#define gridDim (::latentdem::emulation::grid_size())
#define warpSize 32

#include "device_functions.h"
