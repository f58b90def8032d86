// Four or eight numbers side by side, for arithmetic that serves the C++ and the CUDA compiler
// alike: the host's vector types there, an array with the same operators here. Kernels that use
// them on the host belong to LATENTDEM_ISA_SOURCES (isa.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace latentdem {

#if defined(__CUDACC__) || defined(LATENTDEM_CUDA_EMULATION)

template <class T, int N>
struct alignas(16) Lanes {
  T value[N];

  LATENTDEM_HD T& operator[](int i) { return value[i]; }
  LATENTDEM_HD const T& operator[](int i) const { return value[i]; }

  LATENTDEM_HD friend Lanes operator+(Lanes a, const Lanes& b) {
    for (int i = 0; i < N; ++i) a[i] += b[i];
    return a;
  }
  LATENTDEM_HD friend Lanes operator-(Lanes a, const Lanes& b) {
    for (int i = 0; i < N; ++i) a[i] -= b[i];
    return a;
  }
  LATENTDEM_HD friend Lanes operator*(Lanes a, const Lanes& b) {
    for (int i = 0; i < N; ++i) a[i] *= b[i];
    return a;
  }
  LATENTDEM_HD friend Lanes operator*(T s, Lanes a) {
    for (int i = 0; i < N; ++i) a[i] *= s;
    return a;
  }
  LATENTDEM_HD Lanes& operator+=(const Lanes& b) { return *this = *this + b; }
};
template <class T>
using Four = Lanes<T, 4>;
template <class T>
using Eight = Lanes<T, 8>;
using Int4 = Lanes<int32_t, 4>;

template <class T>
LATENTDEM_HD Int4 truncate(const Four<T>& v) {
  return {{static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1]), static_cast<int32_t>(v[2]),
           static_cast<int32_t>(v[3])}};
}
template <class T>
LATENTDEM_HD Four<T> convert(const Int4& v) {
  return {{static_cast<T>(v[0]), static_cast<T>(v[1]), static_cast<T>(v[2]), static_cast<T>(v[3])}};
}
template <class T>
LATENTDEM_HD Four<T> low_half(const Eight<T>& v) {
  return {{v[0], v[1], v[2], v[3]}};
}
template <class T>
LATENTDEM_HD Four<T> high_half(const Eight<T>& v) {
  return {{v[4], v[5], v[6], v[7]}};
}
template <class T>
LATENTDEM_HD Eight<T> join(const Four<T>& low, const Four<T>& high) {
  return {{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}};
}
template <class T>
LATENTDEM_HD Eight<T> load_eight(const T* from) {
  return {{from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]}};
}

#else

template <class T>
struct HostLanes;
template <>
struct HostLanes<float> {
  typedef float Two __attribute__((vector_size(8)));
  typedef float Four __attribute__((vector_size(16)));
  typedef float Eight __attribute__((vector_size(32)));
};
template <>
struct HostLanes<double> {
  typedef double Two __attribute__((vector_size(16)));
  typedef double Four __attribute__((vector_size(32)));
  typedef double Eight __attribute__((vector_size(64)));
};
template <class T>
using Four = typename HostLanes<T>::Four;
template <class T>
using Eight = typename HostLanes<T>::Eight;
typedef int32_t Int4 __attribute__((vector_size(16)));

template <class T>
LATENTDEM_HD Int4 truncate(const Four<T>& v) {
  return __builtin_convertvector(v, Int4);
}
template <class T>
LATENTDEM_HD Four<T> convert(const Int4& v) {
  return __builtin_convertvector(v, Four<T>);
}
template <class T>
LATENTDEM_HD Four<T> low_half(const Eight<T>& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3);
}
template <class T>
LATENTDEM_HD Four<T> high_half(const Eight<T>& v) {
  return __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
template <class T>
LATENTDEM_HD Eight<T> join(const Four<T>& low, const Four<T>& high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
template <class T>
LATENTDEM_HD Eight<T> load_eight(const T* from) {  // unaligned
  Eight<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
LATENTDEM_HD void store_eight(T* to, const Eight<T>& v) {
  std::memcpy(to, &v, sizeof v);
}

#endif

template <class T>
LATENTDEM_HD T sum(const Four<T>& v) {
  return (v[0] + v[1]) + (v[2] + v[3]);
}

}  // namespace latentdem
