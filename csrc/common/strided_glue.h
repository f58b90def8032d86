// Tensors as kernels see them, in any layout.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "common/strided.h"

namespace latentdem {

// Images are read as they lie.
template <class T>
Strided<const T> view(const at::Tensor& t) {
  std::array<int64_t, 4> stride;
  for (int64_t i = 0; i < 4; ++i) stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
  // One column is as good as contiguous.
  return {t.const_data_ptr<T>(), stride[0], stride[1], stride[2], t.size(3) == 1 ? 1 : stride[3]};
}

template <class T>
Strided<T> mutable_view(const at::Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// The memory format of results: that of the image.
inline at::MemoryFormat format_of(const at::Tensor& image) {
  const bool last = !image.is_contiguous() && image.is_contiguous(at::MemoryFormat::ChannelsLast);
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace latentdem
