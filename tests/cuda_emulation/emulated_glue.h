// csrc/common/cuda_glue.h for the emulator: CPU tensors play the device's memory.
#pragma once

#include <ATen/ops/from_blob.h>

#include <cstddef>

#include "runtime/emulation.h"

namespace latentdem {
namespace cuda {

class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.is_cpu(), "the emulator takes CPU tensors, found ", t.device());
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() { emulation::take_back(); }
  cudaStream_t stream() const { return nullptr; }
};

// Known to the runtime: bounds, and that nothing has written it.
inline at::Tensor device_empty(at::IntArrayRef sizes, const at::TensorOptions& options,
                               const char* name) {
  int64_t bytes = static_cast<int64_t>(options.dtype().itemsize());
  for (const int64_t size : sizes) bytes *= size;
  return at::from_blob(emulation::allocate(static_cast<size_t>(bytes), name), sizes,
                       emulation::release, options);
}

template <class T>
const T* device_data(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.is_contiguous() && t.element_size() == sizeof(T), name,
              " is not what a kernel takes");
  emulation::lend(t.const_data_ptr(), t.nbytes(), name);
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_device_data(const at::Tensor& t, const char* name) {
  (void)device_data<T>(t, name);
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace cuda
}  // namespace latentdem
