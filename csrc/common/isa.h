// Run-time choice between builds of one file for several instruction sets.
//
// CMake compiles the files listed under LATENTDEM_ISA_SOURCES once for each set, with
// LATENTDEM_ISA naming the namespace of its kernels and LATENTDEM_ISA_<SET> telling which
// sets there are; the wheel itself needs no more than the platform's baseline.
#pragma once

#include <cstdlib>
#include <string_view>

namespace latentdem {

enum class Isa { kDefault, kAvx2, kAvx512 };

// LATENTDEM_CPU_CAPABILITY=default, avx2 or avx512 bounds the choice, for comparison.
inline Isa best_isa() {
#if defined(LATENTDEM_HAS_AVX2)
  static const Isa isa = [] {
    const char* wish = std::getenv("LATENTDEM_CPU_CAPABILITY");
    const std::string_view bound = wish == nullptr ? "avx512" : wish;
    __builtin_cpu_init();
    if (bound == "default") return Isa::kDefault;
    if (bound != "avx2" && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
      return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
    return Isa::kDefault;
  }();
  return isa;
#else
  return Isa::kDefault;
#endif
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "default";
}

}  // namespace latentdem

// Defines `template <class T> void name(const Params<T>&)` that forwards to the best build.
#if defined(LATENTDEM_HAS_AVX2)
#define LATENTDEM_DISPATCH_ISA(name, Params)       \
  namespace isa_avx512 {                           \
  template <class T>                               \
  void name(const Params<T>&);                     \
  }                                                \
  namespace isa_avx2 {                             \
  template <class T>                               \
  void name(const Params<T>&);                     \
  }                                                \
  namespace isa_default {                          \
  template <class T>                               \
  void name(const Params<T>&);                     \
  }                                                \
  template <class T>                               \
  void name(const Params<T>& p) {                  \
    switch (best_isa()) {                          \
      case Isa::kAvx512:                           \
        return isa_avx512::name(p);                \
      case Isa::kAvx2:                             \
        return isa_avx2::name(p);                  \
      default:                                     \
        return isa_default::name(p);               \
    }                                              \
  }                                                \
  template void name<float>(const Params<float>&); \
  template void name<double>(const Params<double>&);
#else
#define LATENTDEM_DISPATCH_ISA(name, Params)       \
  namespace isa_default {                          \
  template <class T>                               \
  void name(const Params<T>&);                     \
  }                                                \
  template <class T>                               \
  void name(const Params<T>& p) {                  \
    isa_default::name(p);                          \
  }                                                \
  template void name<float>(const Params<float>&); \
  template void name<double>(const Params<double>&);
#endif
