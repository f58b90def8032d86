// CUDA's atomics; one fibre runs at a time, so plain arithmetic is atomic.
#include <cuda_runtime.h>

namespace {

template <class T, class Function>
T update_at(const void* site, T* address, const Function& function) {
  latentdem::emulation::atomic_access(address, sizeof(T), site);
  const T old = *address;
  *address = function(old);
  return old;
}

}  // namespace

#define update(...) update_at(__builtin_return_address(0), __VA_ARGS__)
#define LATENTDEM_ATOMIC(T)                                             \
  T atomicAdd(T* a, T v) {                                              \
    return update(a, [=](T old) { return old + v; });                   \
  }                                                                     \
  T atomicMax(T* a, T v) {                                              \
    return update(a, [=](T old) { return old < v ? v : old; });         \
  }                                                                     \
  T atomicMin(T* a, T v) {                                              \
    return update(a, [=](T old) { return v < old ? v : old; });         \
  }                                                                     \
  T atomicExch(T* a, T v) {                                             \
    return update(a, [=](T) { return v; });                             \
  }                                                                     \
  T atomicCAS(T* a, T expected, T v) {                                  \
    return update(a, [=](T old) { return old == expected ? v : old; }); \
  }
LATENTDEM_ATOMIC(int)
LATENTDEM_ATOMIC(unsigned)
LATENTDEM_ATOMIC(unsigned long long)

float atomicAdd(float* a, float v) {
  return update(a, [=](float old) { return old + v; });
}
double atomicAdd(double* a, double v) {
  return update(a, [=](double old) { return old + v; });
}
float atomicExch(float* a, float v) {
  return update(a, [=](float) { return v; });
}
unsigned atomicOr(unsigned* a, unsigned v) {
  return update(a, [=](unsigned old) { return old | v; });
}
unsigned atomicAnd(unsigned* a, unsigned v) {
  return update(a, [=](unsigned old) { return old & v; });
}
