// Scratch memory of the kernels that are compiled once per instruction set (isa.h).
#pragma once

#include <cstdint>
#include <cstdlib>

namespace latentdem {
namespace LATENTDEM_ISA {

// Heap memory aligned to whole vectors; not initialised.
template <class T>
class VectorBuffer {
 public:
  explicit VectorBuffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64))) {
    if (data_ == nullptr) std::abort();
  }
  VectorBuffer(const VectorBuffer&) = delete;
  VectorBuffer& operator=(const VectorBuffer&) = delete;
  ~VectorBuffer() { std::free(data_); }
  T* get() const { return data_; }

 private:
  T* data_;
};

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
