// Device, stream and memory for the torch glue of CUDA kernels. The emulator's build replaces it
// (tests/cuda_emulation/emulated_glue.h), so that one glue file serves both.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "common/checks.h"
#include "common/cuda_stream.h"

#if defined(LATENTDEM_CUDA_EMULATION)
#include "emulated_glue.h"
#else
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace latentdem {
namespace cuda {

inline c10::Device checked_device(const at::Tensor& t) {
  TORCH_CHECK(c10::cuda::device_count() > 0,
              "latentdem: a CUDA kernel was asked for, but no CUDA device is there");
  TORCH_CHECK_VALUE(t.is_cuda(), "latentdem: tensors must be on a CUDA device, found ", t.device());
  return t.device();
}

// Makes the tensor's device the current one while an operator runs. Create one first of all.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& t) : guard_(checked_device(t)) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
};

// Results and workspaces, from torch's allocator. The name appears in the emulator's messages.
inline at::Tensor device_empty(at::IntArrayRef sizes, const at::TensorOptions& options,
                               const char* /*name*/) {
  return at::empty(sizes, options);
}

// What kernels get: the contiguous tensor's memory.
template <class T>
const T* device_data(const at::Tensor& t, const char* /*name*/) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_device_data(const at::Tensor& t, const char* /*name*/) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace cuda
}  // namespace latentdem
#endif
