// A [B,C,H,W] array in any layout.
#pragma once

#include <cstdint>

namespace latentdem {

// Strides in elements, zero along a dimension that is shared.
template <class T>
struct Strided {
  T* data;
  int64_t batch, channel, row, column;

  T* plane(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

}  // namespace latentdem
