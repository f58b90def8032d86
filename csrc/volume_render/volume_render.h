// Kernels of the volume renderer: plain parameter structs, contiguous memory, no tensors.
//
// N views, h w view size, D H W grid. "Voxels" are the padded grid [D+2,H+2,W+2,4] with
// (density, red, green, blue) in each, followed by slack so that a sample on the far border,
// and no further, may read (and add nothing) past the end.
#pragma once

#include <cstdint>

#include "volume_render/volume_render_math.h"

namespace latentdem {

struct VolumeShape {
  int64_t depth, height, width;

  int64_t row() const { return width + 2; }               // padded voxels per row
  int64_t plane() const { return row() * (height + 2); }  // and per plane
  int64_t voxels() const { return plane() * (depth + 3) + row() + 2; }

  // Occupancy: one byte for every kBlock^3 cells, in padded coordinates.
  static constexpr int kBlockBits = 3;
  static constexpr int64_t kBlock = int64_t{1} << kBlockBits;
  int64_t blocks_x() const { return (width + 2) / kBlock + 1; }
  int64_t blocks_y() const { return (height + 2) / kBlock + 1; }
  int64_t blocks_z() const { return (depth + 2) / kBlock + 1; }
  int64_t blocks() const { return blocks_x() * blocks_y() * blocks_z(); }
};

// density [D,H,W], color [3,D,H,W] -> voxels, padding and slack included.
template <class T>
void pack_volume_cpu(const VolumeShape& s, const T* density, const T* color, T* voxels);

// Voxels -> density and color; either may be null.
template <class T>
void unpack_volume_cpu(const VolumeShape& s, const T* voxels, T* density, T* color);

// occupied[block] = 1 where any corner of any cell of the block has a density other than zero.
// Returns the number of occupied blocks.
template <class T>
int64_t find_occupied_cpu(const VolumeShape& s, const T* density, uint8_t* occupied);

template <class T>
struct RenderParams {
  VolumeShape volume;
  const T* voxels;
  const uint8_t* occupied;  // null: march through empty blocks, too
  int64_t views, height, width, samples;
  double near, far;
  double early_stop;         // a ray ends where its transmittance is below
  const double* pose;        // [N,3,4]
  const double* intrinsics;  // [N,4]

  double step() const { return (far - near) / static_cast<double>(samples); }
};

template <class T>
struct RenderOutputs {
  T* color;    // [N,3,h,w]
  T* opacity;  // [N,1,h,w]
  T* depth;    // [N,1,h,w]
};

template <class T>
void render_forward_cpu(const RenderParams<T>& p, const RenderOutputs<T>& out);

template <class T>
struct RenderGradients {
  RenderOutputs<const T> grad;  // of the loss in the outputs
  T* voxels;                    // zeroed by the caller, added to; or null
  double* pose;                 // [N,3,4], zeroed, with intrinsics [N,4]; or both null
  double* intrinsics;
};

// Marches every ray once more (twice if it has over 128 samples in the grid), and keeps none of
// its samples beyond a chunk: of p.samples, memory depends on one number per 128 only.
// With gradients in density p.occupied must be null: at density zero they do not vanish.
template <class T>
void render_backward_cpu(const RenderParams<T>& p, const RenderGradients<T>& g);

}  // namespace latentdem
