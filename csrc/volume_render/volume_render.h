// Kernels of the volume renderer: plain parameter structs, no tensors. The grid is read where
// it is, in any strides; everything else is contiguous.
//
// N views, h w view size, D H W grid.
#pragma once

#include <cstdint>

#include "volume_render/volume_render_math.h"

namespace latentdem {

// occupied[block] = 1 where any corner of any cell of the block has a density other than zero.
// Returns the number of occupied blocks.
template <class T>
int64_t find_occupied_cpu(const Volume<T>& volume, uint8_t* occupied);

template <class T>
struct RenderParams {
  Volume<T> volume;
  const uint8_t* occupied;  // null: march through empty blocks, too
  int64_t views, height, width;
  Sampling sampling;
  double early_stop;         // a ray ends where its transmittance is below
  const double* pose;        // [N,3,4]
  const double* intrinsics;  // [N,4]
};

// Images of a render, or gradients in them.
template <class T>
struct RenderImages {
  T* color;    // [N,3,h,w]
  T* opacity;  // [N,1,h,w]
  T* depth;    // [N,1,h,w]
};

template <class T>
struct RenderForward {
  RenderParams<T> params;
  RenderImages<T> out;
};

// Gradients are zeroed by the caller, and added to; those that are not wanted are null, pose and
// intrinsics both or neither. With a gradient in density, params.occupied must be null: where
// density is zero, that gradient is not.
template <class T>
struct RenderBackward {
  RenderParams<T> params;
  RenderImages<const T> grad;  // of the loss in the outputs
  T* density;                  // [D,H,W]
  T* color;                    // [3,D,H,W]
  double* pose;                // [N,3,4]
  double* intrinsics;          // [N,4]
};

template <class T>
void render_forward_cpu(const RenderForward<T>& f);

// Marches every ray once more (twice if it has over 128 samples in the grid), and keeps none of
// its samples beyond a chunk: of the number of samples, memory depends on one number per 128 only.
template <class T>
void render_backward_cpu(const RenderBackward<T>& b);

}  // namespace latentdem
