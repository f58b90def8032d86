// The planes of a batch that share one kernel.
#pragma once

#include "blur/blur.h"

namespace latentdem {

struct SharedPlanes {
  int64_t batch_first, batch_count, channel_first, channel_count, channels;

  LATENTDEM_HD int64_t size() const { return batch_count * channel_count; }
  LATENTDEM_HD int64_t operator[](int64_t i) const {
    return (batch_first + i / channel_count) * channels + channel_first + i % channel_count;
  }
};

LATENTDEM_HD SharedPlanes shared_planes(const BlurShape& s, int64_t kernel) {
  const int64_t own_channels = s.kernel_channels();
  const bool own_batch = s.kernel_stride_b != 0, own_channel = s.kernel_stride_c != 0;
  return {own_batch ? kernel / own_channels : 0, own_batch ? 1 : s.batch,
          own_channel ? kernel % own_channels : 0, own_channel ? 1 : s.channels, s.channels};
}

}  // namespace latentdem
