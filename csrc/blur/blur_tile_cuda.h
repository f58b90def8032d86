// Tiles of direct convolutions on CUDA, for the kernels of every family that convolves: loads into
// shared memory, the sums, and what pixels near the border collect besides.
#pragma once

#include "blur/blur_cuda.h"
#include "common/cuda_launch.h"
#include "common/cuda_reduce.h"

namespace latentdem {

inline constexpr int kTileThreads = 256;
// Per multiprocessor, for which registers must suffice: shared memory holds few more.
inline constexpr int kTileBlocks = 3;
// Of a tile per thread: rows 4 t to 4 t + 3, so that loads are shared.
inline constexpr int kRows = 4;
inline constexpr int kPad = kRows - 1;
static_assert(kTile * kTile == kTileThreads * kRows, "threads cover the tile");

// Taps in shared memory as columns with kPad zeros before and after, flipped or not.
template <class T>
__device__ void load_taps(const BlurShape& s, const T* kernel, bool flip, T* taps) {
  const int kh = static_cast<int>(s.kernel_height), kw = static_cast<int>(s.kernel_width);
  const int pitch = kh + 2 * kPad;
  for (int at = threadIdx.x; at < kw * pitch; at += kTileThreads) {
    const int j = at / pitch, i = at % pitch - kPad;
    const bool inside = i >= 0 && i < kh;
    taps[at] = !inside ? T(0) : flip ? kernel[(kh - 1 - i) * kw + kw - 1 - j] : kernel[i * kw + j];
  }
}

// A tile with a halo: rows top .. top + kTile + kh - 2 of the extended image, times weights [H,W]
// if they are not null. True if the thread met a weight that is not zero.
template <class T>
__device__ bool load_extended(const BlurShape& s, const T* plane, const T* weights, int64_t top,
                              int64_t left, T* tile) {
  const int rows = static_cast<int>(kTile + s.kernel_height - 1);
  const int columns = static_cast<int>(kTile + s.kernel_width - 1);
  const int64_t above = s.keeps_size() ? extension_before(s.kernel_height) : 0;
  const int64_t before = s.keeps_size() ? extension_before(s.kernel_width) : 0;
  bool found = weights == nullptr;
  for (int at = threadIdx.x; at < rows * columns; at += kTileThreads) {
    const int64_t e = top + at / columns, f = left + at % columns;
    T value = 0;
    if (e < s.extended_height() && f < s.extended_width()) {
      const int64_t y = source_index(e - above, s.height, s.boundary);
      const int64_t x = source_index(f - before, s.width, s.boundary);
      if (y >= 0 && x >= 0) {
        const T weight = weights == nullptr ? T(1) : weights[y * s.width + x];
        if (weight != 0) value = weight * plane[y * s.width + x];
        found = found || weight != 0;
      }
    }
    tile[at] = value;
  }
  return found;
}

// The same of the residual, which is zero outside.
template <class T>
__device__ void load_residual(const BlurShape& s, const T* plane, int64_t top, int64_t left,
                              T* tile) {
  const int rows = static_cast<int>(kTile + s.kernel_height - 1);
  const int columns = static_cast<int>(kTile + s.kernel_width - 1);
  for (int at = threadIdx.x; at < rows * columns; at += kTileThreads) {
    const int64_t y = top + at / columns, x = left + at % columns;
    const bool inside = y >= 0 && y < s.output_height() && x >= 0 && x < s.output_width();
    tile[at] = inside ? plane[y * s.output_width() + x] : T(0);
  }
}

// sums[q] += sum_tu taps[t,u] tile[row + q + t, column + u]
template <class T>
__device__ void convolve_tile(const BlurShape& s, const T* tile, const T* taps, int row, int column,
                              T (&sums)[kRows]) {
  const int kh = static_cast<int>(s.kernel_height), kw = static_cast<int>(s.kernel_width);
  const int pitch = static_cast<int>(kTile) + kw - 1, tap_pitch = kh + 2 * kPad;
  for (int u = 0; u < kw; ++u) {
    const T* in = tile + row * pitch + column + u;
    const T* tap = taps + u * tap_pitch + kPad;
    T window[kRows] = {};  // taps r, r - 1, r - 2, r - 3
    for (int r = 0; r < kh + kPad; ++r) {
      for (int q = kRows - 1; q > 0; --q) window[q] = window[q - 1];
      window[0] = tap[r];
      const T value = in[r * pitch];
      for (int q = 0; q < kRows; ++q) sums[q] += window[q] * value;
    }
  }
}

struct TilePlace {
  int64_t plane, top, left;
};
__device__ inline TilePlace tile_place(int64_t tile, int64_t height, int64_t width) {
  const int64_t across = (width + kTile - 1) / kTile, down = (height + kTile - 1) / kTile;
  return {tile / (across * down), tile / across % down * kTile, tile % across * kTile};
}

// Writes a thread's rows of the output, or with an observation those of the residual, if wanted,
// and returns their loss, mask * (k * x - y)^2.
template <class T>
__device__ double store_rows(const BlurShape& s, const TilePlace& at, int row, int column,
                             const T (&sums)[kRows], bool has_observation,
                             const Observed<T>& observed, T* output) {
  const int64_t ho = s.output_height(), wo = s.output_width(), x = at.left + column;
  const int64_t mask_plane = at.plane / s.channels * observed.mask_stride_b +
                             at.plane % s.channels * observed.mask_stride_c;
  double loss = 0;
  for (int q = 0; q < kRows; ++q) {
    const int64_t y = at.top + row + q;
    if (y >= ho || x >= wo) continue;
    const int64_t pixel = (at.plane * ho + y) * wo + x;
    T value = sums[q];
    if (has_observation) {
      const T difference = value - observed.observation[pixel];
      value = observed.mask == nullptr ? difference
                                       : observed.mask[(mask_plane * ho + y) * wo + x] * difference;
      loss += static_cast<double>(value) * difference;
    }
    if (output != nullptr) output[pixel] = value;
  }
  return loss;
}

// taps[i,j] = sum over the tile of the extended image times the residual, whose rows lie `pitch`
// apart: a warp per tap, its lanes along the rows.
template <class T>
__device__ void correlate_tile(const BlurShape& s, const T* image, const T* residual, int pitch,
                               T* taps) {
  const int kh = static_cast<int>(s.kernel_height), kw = static_cast<int>(s.kernel_width);
  const int lane = threadIdx.x % 32, image_pitch = static_cast<int>(kTile) + kw - 1;
  const T* r = residual + lane;
  for (int tap = threadIdx.x / 32; tap < kh * kw; tap += kTileThreads / 32) {
    const T* x = image + (kh - 1 - tap / kw) * image_pitch + (kw - 1 - tap % kw) + lane;
    T total = 0;
#pragma unroll 8
    for (int y = 0; y < kTile; ++y) total += x[y * image_pitch] * r[y * pitch];
    total = warp_sum(total);
    if (lane == 0) taps[tap] = total;
  }
}

inline size_t taps_size(const BlurShape& s) {
  return static_cast<size_t>(s.kernel_width * (s.kernel_height + 2 * kPad));
}
inline size_t halo_size(const BlurShape& s) {
  return static_cast<size_t>((kTile + s.kernel_height - 1) * (kTile + s.kernel_width - 1));
}

// Pixels near the border collect from further places of the residual.
template <class T>
__device__ T other_preimages(const BlurShape& s, const T* residual, const T* kernel,
                             const Preimages& rows, const Preimages& columns) {
  const int64_t ho = s.output_height(), wo = s.output_width();
  const int64_t kh = s.kernel_height, kw = s.kernel_width;
  T total = 0;
  for (int64_t a = 0; a < rows.size(); ++a)
    for (int64_t b = a == 0 ? 1 : 0; b < columns.size(); ++b)
#pragma unroll 1
      for (int64_t i = 0; i < kh; ++i) {
        const int64_t y = rows[a] - (kh - 1) + i;
        if (y < 0 || y >= ho) continue;
        for (int64_t j = 0; j < kw; ++j) {
          const int64_t x = columns[b] - (kw - 1) + j;
          if (x >= 0 && x < wo) total += kernel[i * kw + j] * residual[y * wo + x];
        }
      }
  return total;
}

}  // namespace latentdem
