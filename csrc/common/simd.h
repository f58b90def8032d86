// Short vectors by the compiler's vector types, and the choice of instruction set at run time.
//
// Inner loops are always_inline templates, called from one entry point per instruction set:
//
//   template <class T> void step(...) { step_inline<T>(...); }
//   template <class T> LATENTDEM_AVX2 void step_avx2(...) { step_inline<T>(...); }
//   ... has_avx2() ? step_avx2<T>(...) : step<T>(...);
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

#define LATENTDEM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define LATENTDEM_AVX2 __attribute__((target("avx2,fma")))
#else
#define LATENTDEM_AVX2
#endif

namespace latentdem {

// Explicitly aligned: without, structs would be laid out for the baseline's narrower registers,
// and wider code would then load them as if they were not.
template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Four __attribute__((vector_size(16), aligned(16)));
  typedef float Eight __attribute__((vector_size(32), aligned(32)));
};
template <>
struct Simd<double> {
  typedef double Four __attribute__((vector_size(32), aligned(32)));
  typedef double Eight __attribute__((vector_size(64), aligned(64)));
};
template <class T>
using Four = typename Simd<T>::Four;
template <class T>
using Eight = typename Simd<T>::Eight;
typedef int32_t Int4 __attribute__((vector_size(16), aligned(16)));

// Unaligned loads and stores.
template <class V, class T>
LATENTDEM_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
LATENTDEM_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class T>
LATENTDEM_INLINE Four<T> low_half(const Eight<T>& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}
template <class T>
LATENTDEM_INLINE Four<T> high_half(const Eight<T>& v) {
  return __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

template <class T>
LATENTDEM_INLINE T sum(const Four<T>& v) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

inline bool has_avx2() { return best_isa() != Isa::kDefault; }

}  // namespace latentdem
