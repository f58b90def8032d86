// Barriers, warp operations, atomics and arithmetic intrinsics on top of the runtime.
#pragma once

// Default arguments are evaluated at the call, so that messages name the kernel's own lines.
#define LATENTDEM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  synchronize(Barrier::kPlain, 0, {file, line});
}
inline int __syncthreads_count(int predicate, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  return synchronize(Barrier::kCount, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  return synchronize(Barrier::kAnd, predicate, {file, line});
}
inline int __syncthreads_or(int predicate, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  return synchronize(Barrier::kOr, predicate, {file, line});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __trap() { latentdem::emulation::trap("__trap"); }

inline void __syncwarp(unsigned mask = 0xffffffffu, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  warp_collective(WarpOperation::kSync, mask, 0, 0, {file, line});
}
inline unsigned __activemask() { return latentdem::emulation::active_lanes(); }
inline unsigned __ballot_sync(unsigned mask, int predicate, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  return static_cast<unsigned>(
      warp_collective(WarpOperation::kBallot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, LATENTDEM_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LATENTDEM_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline unsigned __match_any_sync(unsigned mask, uint64_t value, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  return static_cast<unsigned>(
      warp_collective(WarpOperation::kMatch, mask, value, 0, {file, line}));
}

namespace latentdem {
namespace emulation {

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "CUDA shuffles numbers");
  uint64_t payload = 0;
  __builtin_memcpy(&payload, &value, sizeof(T));
  payload = warp_collective(WarpOperation::kShuffle, mask, payload, source, site);
  __builtin_memcpy(&value, &payload, sizeof(T));
  return value;
}

}  // namespace emulation
}  // namespace latentdem

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  const int first = lane() & ~(width - 1);
  return shuffle(mask, value, first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  const int from = lane() - static_cast<int>(delta), first = lane() & ~(width - 1);
  return shuffle(mask, value, from < first ? lane() : from, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  const int from = lane() + static_cast<int>(delta), last = lane() | (width - 1);
  return shuffle(mask, value, from > last ? lane() : from, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, LATENTDEM_SITE) {
  using namespace latentdem::emulation;
  const int from = lane() ^ bits, last = lane() | (width - 1);
  return shuffle(mask, value, from > last ? lane() : from, {file, line});
}
#undef LATENTDEM_SITE

// Atomics. Compiled in the runtime, for a file that is instrumented would report them as plain.
#define LATENTDEM_ATOMIC(T)          \
  T atomicAdd(T* address, T value);  \
  T atomicMax(T* address, T value);  \
  T atomicMin(T* address, T value);  \
  T atomicExch(T* address, T value); \
  T atomicCAS(T* address, T expected, T value);
LATENTDEM_ATOMIC(int)
LATENTDEM_ATOMIC(unsigned)
LATENTDEM_ATOMIC(unsigned long long)
#undef LATENTDEM_ATOMIC
float atomicAdd(float* address, float value);
double atomicAdd(double* address, double value);
float atomicExch(float* address, float value);
unsigned atomicOr(unsigned* address, unsigned value);
unsigned atomicAnd(unsigned* address, unsigned value);

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  const double turn = 3.14159265358979323846 * x;
  *sine = static_cast<float>(::sin(turn));
  *cosine = static_cast<float>(::cos(turn));
}
inline void sincospi(double x, double* sine, double* cosine) {
  const double rest = x - 2 * ::floor(x / 2);
  *sine = ::sin(3.14159265358979323846 * rest);
  *cosine = ::cos(3.14159265358979323846 * rest);
}
inline double cospi(double x) {
  double sine, cosine;
  sincospi(x, &sine, &cosine);
  return cosine;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __float_as_int(float x) {
  int bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
