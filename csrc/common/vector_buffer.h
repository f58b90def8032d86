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
  explicit VectorBuffer(int64_t count) { allocate(count); }
  VectorBuffer(const VectorBuffer&) = delete;
  VectorBuffer& operator=(const VectorBuffer&) = delete;
  ~VectorBuffer() { std::free(data_); }
  T* get() const { return data_; }

  // Makes room for so many; what was there may be lost. Returns whether it moved.
  bool reserve(int64_t count) {
    if (count <= count_) return false;
    std::free(data_);
    allocate(count);
    return true;
  }

 private:
  void allocate(int64_t count) {
    count_ = count;
    data_ = static_cast<T*>(
        std::aligned_alloc(64, (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64));
    if (data_ == nullptr) std::abort();
  }

  T* data_;
  int64_t count_;
};

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
