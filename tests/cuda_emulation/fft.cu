// The transforms of common/cuda_fft.h by themselves: one block, one plane.
#include "common/cuda_fft.h"

#include <cstring>
#include <stdexcept>

#include "runtime/emulation.h"

namespace latentdem {
namespace {

constexpr unsigned kThreads = 64;

// in [transforms, length] -> spectrum in natural order, and filtered: each spectrum times its
// own real part, transformed back and scaled.
template <class T>
__global__ void transform(BlockFft fft, int transforms, int limit, const Complex<T>* in,
                          Complex<T>* spectrum, Complex<T>* filtered) {
  const int n = fft.length, pitch = n | 1, thread = static_cast<int>(threadIdx.x);
  auto* const data = dynamic_shared<Complex<T>>();
  Complex<T>* const roots = data + transforms * pitch;
  for (int i = thread; i < n; i += kThreads) roots[i] = root_of_unity<T>(i, n);
  const FftView<T> rows{data, Divisor(transforms), pitch, 1, roots, 1};
  const auto load = [&] {
    __syncthreads();
    for (int i = thread; i < transforms * n; i += kThreads)
      if (i % n < limit) data[i / n * pitch + i % n] = in[i];
    __syncthreads();
  };
  load();
  fft_forward(rows, fft, fft.passes, limit);
  for (int i = thread; i < transforms * n; i += kThreads)
    spectrum[i] = data[i / n * pitch + fft_position(fft, i % n)];
  load();
  fft_filter(rows, fft, limit, limit, [](int, int, Complex<T> z) { return z.re * z; });
  for (int i = thread; i < transforms * n; i += kThreads)
    if (i % n < limit) filtered[i] = (T(1) / static_cast<T>(n)) * data[i / n * pitch + i % n];
}

// Columns in [length, columns] -> half spectra [length / 2 + 1, columns], and back, scaled.
template <class T>
__global__ void transform_real(BlockFft fft, int columns, const T* in, Complex<T>* spectrum,
                               T* back) {
  const int h = fft.length, thread = static_cast<int>(threadIdx.x);
  auto* const data = dynamic_shared<Complex<T>>();
  Complex<T>* const roots = data + (h + 1) * columns;
  auto* const position = reinterpret_cast<uint16_t*>(roots + 2 * h);
  for (int i = thread; i < 2 * h; i += kThreads) roots[i] = root_of_unity<T>(i, 2 * h);
  for (int i = thread; i < h; i += kThreads)
    position[i] = static_cast<uint16_t>(fft_position(fft, i));
  for (int i = thread; i < h * columns; i += kThreads) {
    const int y = i / columns, x = i % columns;
    data[i] = {in[2 * y * columns + x], in[(2 * y + 1) * columns + x]};
  }
  __syncthreads();
  const FftView<T> view{data, Divisor(columns), 1, columns, roots, 2};
  fft_forward(view, fft, fft.passes, h);
  fft_split_real<false>(view, roots, position, h);
  __syncthreads();
  for (int i = thread; i < (h + 1) * columns; i += kThreads) {
    const int k = i / columns;
    spectrum[i] = data[(k == h ? h : position[k]) * columns + i % columns];
  }
  __syncthreads();
  fft_split_real<true>(view, roots, position, h);
  __syncthreads();
  fft_inverse(view, fft, fft.passes, h);
  const T scale = T(1) / static_cast<T>(2 * h);
  for (int i = thread; i < h * columns; i += kThreads) {
    const int y = i / columns, x = i % columns;
    back[2 * y * columns + x] = scale * data[i].re;
    back[(2 * y + 1) * columns + x] = scale * data[i].im;
  }
}

char message[1024];

template <class Launch>
const char* guarded(uint64_t seed, const Launch& launch) {
  message[0] = '\0';
  emulation::set_seed(seed);
  try {
    launch();
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
  }
  emulation::take_back();
  return message;
}

template <class T>
const char* run(int length, int transforms, int limit, uint64_t seed, const void* in, void* out,
                void* filtered) {
  const size_t bytes = size_t{2} * sizeof(T) * length * transforms;
  for (const void* p : {in, static_cast<const void*>(out), static_cast<const void*>(filtered)})
    emulation::lend(p, bytes, "plane");
  return guarded(seed, [&] {
    LDEM_LAUNCH(transform<T>, 1, kThreads, 2 * sizeof(T) * ((length | 1) * transforms + length),
                nullptr, make_block_fft(length), transforms, limit,
                static_cast<const Complex<T>*>(in), static_cast<Complex<T>*>(out),
                static_cast<Complex<T>*>(filtered));
  });
}

template <class T>
const char* run_real(int length, int columns, uint64_t seed, const void* in, void* out,
                     void* back) {
  const int h = length / 2;
  emulation::lend(in, sizeof(T) * length * columns, "in");
  emulation::lend(back, sizeof(T) * length * columns, "back");
  emulation::lend(out, 2 * sizeof(T) * (h + 1) * columns, "spectrum");
  return guarded(seed, [&] {
    LDEM_LAUNCH(transform_real<T>, 1, kThreads,
                2 * sizeof(T) * ((h + 1) * columns + 2 * h) + sizeof(uint16_t) * h, nullptr,
                make_block_fft(h), columns, static_cast<const T*>(in),
                static_cast<Complex<T>*>(out), static_cast<T*>(back));
  });
}

}  // namespace
}  // namespace latentdem

#pragma GCC visibility push(default)
extern "C" {

int fft_next_size(int n) { return static_cast<int>(latentdem::next_block_fft_size(n)); }
int fft_passes(int n) { return latentdem::make_block_fft(n).passes; }

// The message that the launch ended with, or an empty one.
const char* fft_run(bool wide, int length, int transforms, int limit, uint64_t seed, const void* in,
                    void* out, void* filtered) {
  return wide ? latentdem::run<double>(length, transforms, limit, seed, in, out, filtered)
              : latentdem::run<float>(length, transforms, limit, seed, in, out, filtered);
}
const char* fft_run_real(bool wide, int length, int columns, uint64_t seed, const void* in,
                         void* out, void* back) {
  return wide ? latentdem::run_real<double>(length, columns, seed, in, out, back)
              : latentdem::run_real<float>(length, columns, seed, in, out, back);
}

}  // extern "C"
#pragma GCC visibility pop
