// Geometry, lookups and compositing of the volume renderer, shared by the CPU and the CUDA kernels.
//
// Cameras and rays are in double: there is one set per pixel, and samples are many. A ray is
// x(t) = origin + t direction with a unit direction; sample k lies at t_k = near + (k + 1/2) step.
// Voxel coordinates are padded: the grid's first voxel is 1, and 0 and n + 1 are the zeros around
// it, towards which the border fades as in grid_sample(padding_mode="zeros").
//
// One ray, forwards:      make_ray, clip_ray, and for every sample locate, load_corners,
//                         interpolate, composite.
// The same, backwards:    sample_gradient, from the last sample to the first; spread to the
//                         corners; RayGradient::add for the camera, accumulate_camera_gradient.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/exp.h"
#include "common/lanes.h"
#include "common/macros.h"

namespace latentdem {

struct Ray {
  double origin[3];
  double direction[3];
  double pinhole[3];  // ((u - cx) / fx, (v - cy) / fy, 1), in camera axes
  double length;      // of the rotated pinhole vector, which direction divides out
};

// pose [3,4] row-major, camera to world; intrinsics fx, fy, cx, cy. OpenCV axes.
LATENTDEM_HD Ray make_ray(const double* pose, const double* intrinsics, int64_t row,
                          int64_t column) {
  Ray ray;
  ray.pinhole[0] = (static_cast<double>(column) + 0.5 - intrinsics[2]) / intrinsics[0];
  ray.pinhole[1] = (static_cast<double>(row) + 0.5 - intrinsics[3]) / intrinsics[1];
  ray.pinhole[2] = 1;
  double squared = 0;
  for (int i = 0; i < 3; ++i) {
    const double* m = pose + 4 * i;
    ray.direction[i] = m[0] * ray.pinhole[0] + m[1] * ray.pinhole[1] + m[2];
    ray.origin[i] = m[3];
    squared += ray.direction[i] * ray.direction[i];
  }
  ray.length = sqrt(squared);
  for (double& d : ray.direction) d /= ray.length;
  return ray;
}

// A camera with a NaN, an infinity or no direction makes pixels that are NaN.
LATENTDEM_HD bool is_finite(const Ray& ray) {
  double total = 0;
  for (int i = 0; i < 3; ++i) total += fabs(ray.origin[i]) + fabs(ray.direction[i]);
  return total < INFINITY;
}

// The chain from a ray back to its camera; adds to grad_pose [3,4] and grad_intrinsics [4].
LATENTDEM_HD void accumulate_camera_gradient(const Ray& ray, const double* pose,
                                             const double* intrinsics, const double* grad_origin,
                                             const double* grad_direction, double* grad_pose,
                                             double* grad_intrinsics) {
  double radial = 0;
  for (int i = 0; i < 3; ++i) radial += grad_direction[i] * ray.direction[i];
  double grad_pinhole[2] = {0, 0};
  for (int i = 0; i < 3; ++i) {
    const double grad = (grad_direction[i] - radial * ray.direction[i]) / ray.length;
    for (int j = 0; j < 3; ++j) grad_pose[4 * i + j] += grad * ray.pinhole[j];
    for (int j = 0; j < 2; ++j) grad_pinhole[j] += grad * pose[4 * i + j];
    grad_pose[4 * i + 3] += grad_origin[i];
  }
  for (int j = 0; j < 2; ++j) {
    grad_intrinsics[j] -= grad_pinhole[j] * ray.pinhole[j] / intrinsics[j];
    grad_intrinsics[2 + j] -= grad_pinhole[j] / intrinsics[j];
  }
}

// Padded voxel coordinate of world coordinate x along an axis of n voxels: voxel_scale x +
// voxel_center. As in grid_sample(align_corners=True), an axis of one voxel is constant everywhere.
LATENTDEM_HD double voxel_scale(int64_t n) { return 0.5 * static_cast<double>(n - 1); }
LATENTDEM_HD double voxel_center(int64_t n) { return voxel_scale(n) + 1; }

// Where samples lie on every ray: number k at near + (k + 1/2) step.
struct Sampling {
  double near, step;
  int64_t count;
};

struct SampleRange {
  int64_t first;
  int64_t last;  // exclusive
};

// The samples k of [0, count) with 0 <= start + k step <= size + 1 on all three axes. Density
// vanishes on that border, so rounding there changes nothing.
LATENTDEM_HD SampleRange clip_samples(const double* start, const double* step, const int64_t* size,
                                      int64_t count) {
  double first = 0, last = static_cast<double>(count - 1);
  for (int i = 0; i < 3; ++i) {
    const double high = static_cast<double>(size[i] + 1);
    if (step[i] == 0) {
      if (start[i] < 0 || start[i] > high) return {0, 0};
      continue;
    }
    const double a = -start[i] / step[i], b = (high - start[i]) / step[i];
    first = fmax(first, fmin(a, b));
    last = fmin(last, fmax(a, b));
  }
  if (first > last) return {0, 0};
  return {static_cast<int64_t>(ceil(first)), static_cast<int64_t>(floor(last)) + 1};
}

// The samples of one ray that lie in the grid: number k at padded voxel entry + k step.
template <class T>
struct Segment {
  Four<T> entry, step;
  int64_t count;
  T near;  // distance of sample 0

  LATENTDEM_HD T distance(int64_t k, T dt) const { return near + static_cast<T>(k) * dt; }
};

template <class T>
LATENTDEM_HD Segment<T> clip_ray(const int64_t* size, const Sampling& sampling, const Ray& ray) {
  const double t = sampling.near + 0.5 * sampling.step;
  double start[3], step[3];
  for (int i = 0; i < 3; ++i) {
    const double scale = voxel_scale(size[i]);
    start[i] = scale * (ray.origin[i] + t * ray.direction[i]) + voxel_center(size[i]);
    step[i] = scale * sampling.step * ray.direction[i];
  }
  const SampleRange range = clip_samples(start, step, size, sampling.count);
  const auto first = static_cast<double>(range.first);
  Segment<T> s{};
  for (int i = 0; i < 3; ++i) {
    s.entry[i] = static_cast<T>(start[i] + first * step[i]);
    s.step[i] = static_cast<T>(step[i]);
  }
  s.count = range.last - range.first;
  s.near = static_cast<T>(t + first * sampling.step);
  return s;
}

// The cell of eight voxels that holds a sample, by its lowest corner.
template <class T>
struct Cell {
  Four<T> fraction;
  Int4 corner;
};

template <class T>
LATENTDEM_HD Cell<T> locate(const Segment<T>& s, int64_t k) {
  const Four<T> position = s.entry + static_cast<T>(k) * s.step;
  const Int4 corner = truncate<T>(position);  // none is negative
  return {position - convert<T>(corner), corner};
}

// Occupancy: one byte for every kBlock^3 cells, in padded coordinates (of the first corner).
struct BlockGrid {
  static constexpr int kBits = 3;
  static constexpr int64_t kBlock = int64_t{1} << kBits;
  int64_t x, y, z;  // blocks

  LATENTDEM_HD explicit BlockGrid(const int64_t* size)
      : x((size[0] + 2) / kBlock + 1),
        y((size[1] + 2) / kBlock + 1),
        z((size[2] + 2) / kBlock + 1) {}
  LATENTDEM_HD int64_t count() const { return x * y * z; }
  LATENTDEM_HD int64_t index(const Int4& corner) const {
    return ((corner[2] >> kBits) * y + (corner[1] >> kBits)) * x + (corner[0] >> kBits);
  }
};

// How many samples, from the one in `cell` on, certainly lie in the same block; at least one.
template <class T>
LATENTDEM_HD int32_t samples_in_block(const Segment<T>& s, const Cell<T>& cell) {
  auto samples = static_cast<T>(1 << 30);
  for (int i = 0; i < 3; ++i) {
    if (s.step[i] == 0) continue;
    const int32_t block = cell.corner[i] >> BlockGrid::kBits;
    const int32_t wall = (block + (s.step[i] > 0 ? 1 : 0)) << BlockGrid::kBits;
    const T here = static_cast<T>(cell.corner[i]) + cell.fraction[i];
    const T until = (static_cast<T>(wall) - here) / s.step[i];
    samples = until < samples ? until : samples;
  }
  return samples > 1 ? static_cast<int32_t>(samples) : 1;
}

// The grid as the caller stores it: density [D,H,W] and color [3,D,H,W], in any strides.
template <class T>
struct Volume {
  int64_t size[3];  // W, H, D
  const T* density;
  const T* color;
  int64_t density_stride[3], color_stride[3];  // along x, y and z, in elements
  int64_t channel_stride;
};

// Whether padded voxel x, y, z is a voxel of the grid.
LATENTDEM_HD bool is_voxel(const int64_t* size, int64_t x, int64_t y, int64_t z) {
  return x >= 1 && x <= size[0] && y >= 1 && y <= size[1] && z >= 1 && z <= size[2];
}

// (density, red, green, blue) at padded voxel x, y, z: zero outside the grid.
template <class T>
LATENTDEM_HD Four<T> read_voxel(const Volume<T>& v, int64_t x, int64_t y, int64_t z) {
  Four<T> voxel{};
  if (!is_voxel(v.size, x, y, z)) return voxel;
  const auto offset = [&](const int64_t* stride) {
    return (x - 1) * stride[0] + (y - 1) * stride[1] + (z - 1) * stride[2];
  };
  voxel[0] = v.density[offset(v.density_stride)];
  const T* red = v.color + offset(v.color_stride);
  for (int c = 0; c < 3; ++c) voxel[c + 1] = red[c * v.channel_stride];
  return voxel;
}

// Values at the corners of a cell: pair[y + 2 z] holds the four at x = 0, then those at x = 1.
template <class T>
struct Corners {
  Eight<T> pair[4];
};

// From the caller's grid.
template <class T>
LATENTDEM_HD Corners<T> load_corners(const Volume<T>& v, const Cell<T>& cell) {
  Corners<T> corners;
  for (int i = 0; i < 4; ++i) {
    const int64_t x = cell.corner[0], y = cell.corner[1] + (i & 1), z = cell.corner[2] + (i >> 1);
    corners.pair[i] = join<T>(read_voxel(v, x, y, z), read_voxel(v, x + 1, y, z));
  }
  return corners;
}

// A copy of the grid, or of a part of it, that keeps the four numbers of a voxel together:
// padded voxel x, y, z at voxels + 4 (planes[z].start + y planes[z].row + x).
struct Plane {
  int64_t start, row;
};
template <class T>
struct PackedVolume {
  const T* voxels;
  const Plane* planes;

  LATENTDEM_HD const T* at(const Plane& p, const Int4& corner) const {
    return voxels + 4 * (p.start + corner[1] * p.row + corner[0]);
  }
};

// From a packed grid: four loads of eight numbers, since x and x + 1 are neighbours in memory.
template <class T>
LATENTDEM_HD Corners<T> load_corners(const PackedVolume<T>& v, const Cell<T>& cell) {
  const Plane near = v.planes[cell.corner[2]], far = v.planes[cell.corner[2] + 1];
  const T *a = v.at(near, cell.corner), *b = v.at(far, cell.corner);
  return {
      {load_eight(a), load_eight(a + 4 * near.row), load_eight(b), load_eight(b + 4 * far.row)}};
}

template <class T>
LATENTDEM_HD Four<T> interpolate(const Corners<T>& corners, const Four<T>& f) {
  const Eight<T>* p = corners.pair;
  const Eight<T> top = p[0] + f[1] * (p[1] - p[0]), bottom = p[2] + f[1] * (p[3] - p[2]);
  const Eight<T> edge = top + f[2] * (bottom - top);
  return low_half<T>(edge) + f[0] * (high_half<T>(edge) - low_half<T>(edge));
}

// The same, with the slopes per voxel along x, y and z.
template <class T>
LATENTDEM_HD Four<T> interpolate_slopes(const Corners<T>& corners, const Four<T>& f,
                                        Four<T>* slope) {
  const Eight<T>* p = corners.pair;
  const Eight<T> near = p[1] - p[0], far = p[3] - p[2];
  const Eight<T> top = p[0] + f[1] * near, bottom = p[2] + f[1] * far;
  const Eight<T> z = bottom - top, y = near + f[2] * (far - near), edge = top + f[2] * z;
  slope[0] = high_half<T>(edge) - low_half<T>(edge);
  slope[1] = low_half<T>(y) + f[0] * (high_half<T>(y) - low_half<T>(y));
  slope[2] = low_half<T>(z) + f[0] * (high_half<T>(z) - low_half<T>(z));
  return low_half<T>(edge) + f[0] * slope[0];
}

// The transpose of interpolate: what a gradient gives to each corner.
template <class T>
LATENTDEM_HD Corners<T> spread(const Four<T>& gradient, const Four<T>& f) {
  const Four<T> right = f[0] * gradient;
  const Eight<T> both = join<T>(gradient - right, right);
  const Eight<T> bottom = f[2] * both, top = both - bottom;
  const Eight<T> top_far = f[1] * top, bottom_far = f[1] * bottom;
  return {{top - top_far, top_far, bottom - bottom_far, bottom_far}};
}

// Whether all corners are voxels of the grid, and none is padding.
template <class T>
LATENTDEM_HD bool is_inside(const int64_t* size, const Cell<T>& cell) {
  const auto fits = [](int32_t corner, int64_t n) {
    return static_cast<uint64_t>(corner - int64_t{1}) < static_cast<uint64_t>(n - 1);
  };
  return fits(cell.corner[0], size[0]) && fits(cell.corner[1], size[1]) &&
         fits(cell.corner[2], size[2]);
}

// Calls add(offset, gradient) for every corner that is a voxel of the grid; offsets are those of
// a contiguous [D,H,W].
template <class T, class Add>
LATENTDEM_HD void for_each_corner(const int64_t* size, const Cell<T>& cell,
                                  const Corners<T>& gradient, const Add& add) {
  for (int i = 0; i < 8; ++i) {
    const int64_t x = cell.corner[0] - 1 + (i & 1), y = cell.corner[1] - 1 + (i >> 1 & 1);
    const int64_t z = cell.corner[2] - 1 + (i >> 2);
    if (x < 0 || x >= size[0] || y < 0 || y >= size[1] || z < 0 || z >= size[2]) continue;
    const Eight<T>& pair = gradient.pair[i >> 1];
    add((z * size[1] + y) * size[0] + x, i & 1 ? high_half<T>(pair) : low_half<T>(pair));
  }
}

// A sample between the transmittance before and beyond it; value holds t, red, green, blue.
// color and depth are sums of weight() * value, opacity is that of weight().
template <class T>
struct Sample {
  Four<T> value;
  T before, beyond;

  LATENTDEM_HD T weight() const { return before - beyond; }
};

// voxel holds density, red, green, blue.
template <class T>
LATENTDEM_HD Sample<T> composite(const Four<T>& voxel, T t, T dt, T before) {
  Four<T> value = voxel;
  value[0] = t;
  return {value, before, before * inline_exp(-voxel[0] * dt)};
}

// The loss' gradient in the outputs of a pixel, and the sum of weight_j worth_j over the samples
// j already walked back from the end, where worth_j = <value, value_j> + opacity.
template <class T>
struct PixelGradient {
  Four<T> value;  // in depth, red, green, blue
  T opacity;
  T behind;

  LATENTDEM_HD T worth(const Sample<T>& s) const { return sum<T>(value * s.value) + opacity; }
};

// The gradient in a sample's density; that in its colour is weight times the pixel's.
template <class T>
struct SampleGradient {
  T density, weight;

  LATENTDEM_HD Four<T> in_voxel(const Four<T>& pixel) const {
    Four<T> gradient = weight * pixel;
    gradient[0] = density;
    return gradient;
  }
};

// To be called from the last sample to the first.
template <class T>
LATENTDEM_HD SampleGradient<T> sample_gradient(const Sample<T>& s, T dt, PixelGradient<T>& pixel) {
  const T worth = pixel.worth(s);
  const SampleGradient<T> g{dt * (s.beyond * worth - pixel.behind), s.weight()};
  pixel.behind += g.weight * worth;
  return g;
}

// Sums over the samples of a ray of slope * gradient, and of t times that: the gradients in
// origin and direction, per voxel and channel.
template <class T>
struct RayGradient {
  Four<T> origin[3], direction[3];

  LATENTDEM_HD void add(const Four<T>* slope, const Four<T>& gradient, T t) {
    for (int i = 0; i < 3; ++i) {
      const Four<T> pull = slope[i] * gradient;
      origin[i] += pull;
      direction[i] += t * pull;
    }
  }
};

// From a ray's samples to its camera; adds to grad_pose [3,4] and grad_intrinsics [4].
template <class T>
LATENTDEM_HD void accumulate_camera_gradient(const int64_t* size, const Ray& ray,
                                             const double* pose, const double* intrinsics,
                                             const RayGradient<T>& g, double* grad_pose,
                                             double* grad_intrinsics) {
  double origin[3], direction[3];
  for (int i = 0; i < 3; ++i) {
    origin[i] = voxel_scale(size[i]) * static_cast<double>(sum<T>(g.origin[i]));
    direction[i] = voxel_scale(size[i]) * static_cast<double>(sum<T>(g.direction[i]));
  }
  accumulate_camera_gradient(ray, pose, intrinsics, origin, direction, grad_pose, grad_intrinsics);
}

}  // namespace latentdem
