// Plans of the transforms in fft.h: factors of the length and twiddle factors.
#pragma once

#include <cstdint>

#include "common/complex.h"

namespace latentdem {

// One pass of a Stockham transform: `radix` inputs `m` apart become `radix` neighbours, `s`
// transforms at a time; radix * m * s is the length.
struct FftStage {
  int64_t radix, m, s;
  int64_t twiddle;  // index of its m * (radix - 1) factors
};

template <class T>
struct FftPlan {
  int64_t n;
  int64_t stage_count;
  const FftStage* stages;
  const Complex<T>* twiddles;
  const Complex<T>* real;  // exp(-pi i k / n), k = 0..n: real transforms of length 2 n
};

// The plan of a length without prime factors above 7. Plans are made once and live for ever.
template <class T>
const FftPlan<T>& fft_plan(int64_t n);

}  // namespace latentdem
