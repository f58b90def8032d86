// One ray at a time, as a GPU's thread would render it, from volume_render_math.h alone.
// Compiled by tests/ops/test_volume_math.py for the host, and as the CUDA compiler would see it.
#include <vector>

#include "volume_render/volume_render_math.h"

using namespace latentdem;

template <class T>
struct Arguments {
  Volume<T> volume;
  Sampling sampling;
  int64_t views, height, width;
  const double *pose, *intrinsics;
};

template <class T, class Visit>
LATENTDEM_HD void for_each_ray(const Arguments<T>& a, const Visit& visit) {
  for (int64_t i = 0; i < a.views * a.height * a.width; ++i) {
    const int64_t view = i / (a.height * a.width), pixel = i % (a.height * a.width);
    visit(i, view, pixel,
          make_ray(a.pose + 12 * view, a.intrinsics + 4 * view, pixel / a.width, pixel % a.width));
  }
}

template <class T>
void forward(const Arguments<T>& a, T* color, T* opacity, T* depth) {
  const int64_t pixels = a.height * a.width;
  const T dt = static_cast<T>(a.sampling.step);
  for_each_ray(a, [&](int64_t i, int64_t view, int64_t pixel, const Ray& ray) {
    const Segment<T> s = clip_ray<T>(a.volume.size, a.sampling, ray);
    Four<T> total{};
    T transmittance = 1;
    for (int64_t k = 0; k < s.count; ++k) {
      const Cell<T> cell = locate(s, k);
      const Four<T> voxel = interpolate<T>(load_corners(a.volume, cell), cell.fraction);
      const Sample<T> sample = composite<T>(voxel, s.distance(k, dt), dt, transmittance);
      total += sample.weight() * sample.value;
      transmittance = sample.beyond;
    }
    for (int c = 0; c < 3; ++c) color[(3 * view + c) * pixels + pixel] = total[c + 1];
    opacity[i] = 1 - transmittance;
    depth[i] = total[0];
  });
}

template <class T>
void backward(const Arguments<T>& a, const T* color, const T* opacity, const T* depth,
              T* grad_density, T* grad_color, double* grad_pose, double* grad_intrinsics) {
  const int64_t pixels = a.height * a.width;
  const int64_t volume = a.volume.size[0] * a.volume.size[1] * a.volume.size[2];
  const T dt = static_cast<T>(a.sampling.step);
  for_each_ray(a, [&](int64_t i, int64_t view, int64_t pixel, const Ray& ray) {
    const Segment<T> s = clip_ray<T>(a.volume.size, a.sampling, ray);
    std::vector<T> reaching{1};
    for (int64_t k = 0; k < s.count; ++k) {
      const Cell<T> cell = locate(s, k);
      const Four<T> voxel = interpolate<T>(load_corners(a.volume, cell), cell.fraction);
      reaching.push_back(composite<T>(voxel, T(0), dt, reaching.back()).beyond);
    }
    Four<T> grad{};
    grad[0] = depth[i];
    for (int c = 0; c < 3; ++c) grad[c + 1] = color[(3 * view + c) * pixels + pixel];
    PixelGradient<T> state{grad, opacity[i], 0};
    RayGradient<T> sums{};
    for (int64_t k = s.count - 1; k >= 0; --k) {
      const Cell<T> cell = locate(s, k);
      Four<T> slope[3];
      const Four<T> voxel =
          interpolate_slopes<T>(load_corners(a.volume, cell), cell.fraction, slope);
      const Sample<T> sample = composite<T>(voxel, s.distance(k, dt), dt, reaching[k]);
      const Four<T> found = sample_gradient<T>(sample, dt, state).in_voxel(grad);
      sums.add(slope, found, sample.value[0]);
      for_each_corner<T>(a.volume.size, cell, spread<T>(found, cell.fraction),
                         [&](int64_t at, const Four<T>& g) {
                           grad_density[at] += g[0];
                           for (int c = 0; c < 3; ++c) grad_color[c * volume + at] += g[c + 1];
                         });
    }
    accumulate_camera_gradient<T>(a.volume.size, ray, a.pose + 12 * view, a.intrinsics + 4 * view,
                                  sums, grad_pose + 12 * view, grad_intrinsics + 4 * view);
  });
}

// sizes: D, H, W, N, h, w, S; strides: density x y z, color x y z channel.
template <class T>
Arguments<T> arguments(const int64_t* sizes, const int64_t* strides, double near, double far,
                       const T* density, const T* color, const double* pose,
                       const double* intrinsics) {
  Arguments<T> a{};
  a.volume.density = density;
  a.volume.color = color;
  for (int i = 0; i < 3; ++i) {
    a.volume.size[i] = sizes[2 - i];
    a.volume.density_stride[i] = strides[i];
    a.volume.color_stride[i] = strides[3 + i];
  }
  a.volume.channel_stride = strides[6];
  a.views = sizes[3];
  a.height = sizes[4];
  a.width = sizes[5];
  a.sampling = {near, (far - near) / static_cast<double>(sizes[6]), sizes[6]};
  a.pose = pose;
  a.intrinsics = intrinsics;
  return a;
}

#define INSTANTIATE(T)                                                                            \
  extern "C" void forward_##T(const int64_t* sizes, const int64_t* strides, double near,          \
                              double far, const T* density, const T* color, const double* pose,   \
                              const double* intrinsics, T* out_color, T* out_opacity,             \
                              T* out_depth) {                                                     \
    forward<T>(arguments(sizes, strides, near, far, density, color, pose, intrinsics), out_color, \
               out_opacity, out_depth);                                                           \
  }                                                                                               \
  extern "C" void backward_##T(                                                                   \
      const int64_t* sizes, const int64_t* strides, double near, double far, const T* density,    \
      const T* color, const double* pose, const double* intrinsics, const T* color_gradient,      \
      const T* opacity_gradient, const T* depth_gradient, T* grad_density, T* grad_color,         \
      double* grad_pose, double* grad_intrinsics) {                                               \
    backward<T>(arguments(sizes, strides, near, far, density, color, pose, intrinsics),           \
                color_gradient, opacity_gradient, depth_gradient, grad_density, grad_color,       \
                grad_pose, grad_intrinsics);                                                      \
  }
INSTANTIATE(float)
INSTANTIATE(double)
