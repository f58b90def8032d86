// Geometry and compositing of the volume renderer, shared by the CPU and the CUDA kernels.
//
// Cameras and rays are in double: there is one set per pixel, and samples are many. A ray is
// x(t) = origin + t direction with a unit direction; sample k lies at
// t_k = near + (k + 1/2) step. The grid is padded by one voxel of zeros on every side, so that
// the fading border of grid_sample(padding_mode="zeros") needs no special case.
#pragma once

#include <cmath>
#include <cstdint>

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
  ray.length = std::sqrt(squared);
  for (double& d : ray.direction) d /= ray.length;
  return ray;
}

// A camera with a NaN, an infinity or no direction makes pixels that are NaN.
LATENTDEM_HD bool is_finite(const Ray& ray) {
  double total = 0;
  for (int i = 0; i < 3; ++i) total += std::abs(ray.origin[i]) + std::abs(ray.direction[i]);
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

// Padded voxel coordinate of world coordinate x along an axis of n voxels: scale * x + offset.
// As in grid_sample(align_corners=True), an axis of one voxel is constant everywhere.
LATENTDEM_HD double voxel_scale(int64_t n) { return 0.5 * static_cast<double>(n - 1); }
LATENTDEM_HD double voxel_offset(int64_t n) { return voxel_scale(n) + 1; }

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
    first = std::fmax(first, std::fmin(a, b));
    last = std::fmin(last, std::fmax(a, b));
  }
  if (first > last) return {0, 0};
  return {static_cast<int64_t>(std::ceil(first)), static_cast<int64_t>(std::floor(last)) + 1};
}

// d loss / d density of a sample, where loss = sum_k weight_k value_k, `transmittance` is what
// reaches beyond the sample and `behind` = sum_{j > k} weight_j value_j.
template <class T>
LATENTDEM_HD T density_gradient(T step, T transmittance, T value, T behind) {
  return step * (transmittance * value - behind);
}

}  // namespace latentdem
