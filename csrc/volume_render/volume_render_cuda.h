// Launchers of the renderer's CUDA kernels: device memory, contiguous, no tensors. Letters as in
// volume_render.h; of RenderParams::volume marches read the size only.
//
// The grid is packed: density, red, green and blue of a voxel side by side, with one layer of
// zeros around it, so that a lookup is eight aligned loads and the fading border no branch.
#pragma once

#include "common/cuda_stream.h"
#include "volume_render/volume_render.h"

namespace latentdem {

LATENTDEM_HD int64_t padded_count(const int64_t* size) {
  return (size[0] + 2) * (size[1] + 2) * (size[2] + 2);
}

// Pixels that one block of threads renders.
struct RenderTiles {
  static constexpr int64_t kWidth = 16, kHeight = 8;
  int64_t columns, rows, views;

  template <class T>
  LATENTDEM_HD explicit RenderTiles(const RenderParams<T>& p)
      : columns((p.width + kWidth - 1) / kWidth),
        rows((p.height + kHeight - 1) / kHeight),
        views(p.views) {}
  LATENTDEM_HD int64_t per_view() const { return columns * rows; }
  LATENTDEM_HD int64_t count() const { return per_view() * views; }
};

// -> voxels [D+2,H+2,W+2,4]
template <class T>
void pack_grid_cuda(const Volume<T>& v, T* voxels, cudaStream_t stream);

// occupied[block] = whether any corner of any cell of the block has a density other than zero.
template <class T>
void find_occupied_cuda(const Volume<T>& v, uint8_t* occupied, cudaStream_t stream);

template <class T>
void render_forward_cuda(const RenderParams<T>& p, const T* voxels, const RenderImages<T>& out,
                         cudaStream_t stream);

// Gradients in the grid are sums over all samples, by atomics, in one of two forms: floating-point
// `sums`, whose order of addition, and so rounding, is the hardware's; or integers, which have no
// rounding to be ordered. Integers count units of a power of two such that no sum can overflow,
// from `bounds` on every summand; in double they have a second limb for the remainder.
using FixedPoint = unsigned long long;
template <class T>
inline constexpr int kFixedLimbs = sizeof(T) == 8 ? 2 : 1;

template <class T>
struct RenderBackwardCuda {
  RenderParams<T> params;  // occupied must be null with a gradient in density
  const T* voxels;
  RenderImages<const T> grad;
  bool density, color, cameras;  // the gradients that are wanted
  T* total;            // [2,N,h,w]: sum of weight times worth over a ray, and what it rounded off
  int32_t* end;        // [N,h,w]: samples until the ray ends
  T* sums;             // [D+2,H+2,W+2,4], zeros; null: not wanted, or fixed
  FixedPoint* fixed;   // [limbs,D+2,H+2,W+2,4], zeros; null: not wanted, or floating
  FixedPoint* bounds;  // [2], zeros: bits of doubles, on summands in density and in colour
  double* partial;     // [tiles,16]: gradients in pose and intrinsics
};

// Three launches: every ray's total, bounds; gradients; the sum over tiles into pose [N,3,4] and
// intrinsics [N,4] (where `cameras`).
template <class T>
void render_backward_cuda(const RenderBackwardCuda<T>& b, double* pose, double* intrinsics,
                          cudaStream_t stream);

// From the sums to density [D,H,W] and color [3,D,H,W], where not null. A gradient whose bound is
// not finite is NaN throughout if fixed.
template <class T>
void unpack_gradient_cuda(const RenderBackwardCuda<T>& b, T* density, T* color,
                          cudaStream_t stream);

}  // namespace latentdem
