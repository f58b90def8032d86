// Transform lengths that every FFT library handles without a slow path: 2^a 3^b 5^c 7^d.
#pragma once

#include <cstdint>

namespace latentdem {

inline bool is_fft_size(int64_t n) {
  for (const int64_t prime : {2, 3, 5, 7})
    while (n % prime == 0 && n > 0) n /= prime;
  return n == 1;
}

// Even, so that half spectra need no special last column.
inline int64_t next_fft_size(int64_t n) {
  n += n % 2;
  while (!is_fft_size(n)) n += 2;
  return n;
}

}  // namespace latentdem
