// Tensor-level steps that the renderer's CPU and CUDA glue share: checks, layout and dtype.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "volume_render/volume_render.h"

namespace latentdem {

struct RenderSettings {
  int64_t height, width;
  double near, far;
  int64_t samples;
  std::optional<double> early_stop;
};

inline void check_render_inputs(const at::Tensor& density, const at::Tensor& color,
                                const at::Tensor& camera_to_world, const at::Tensor& intrinsics) {
  TORCH_CHECK_VALUE(density.dim() == 4 && density.size(0) == 1,
                    "density must have shape [1,D,H,W], found ", density.sizes());
  TORCH_CHECK_VALUE(density.numel() > 0, "density must not be empty, found ", density.sizes());
  for (const int64_t size : density.sizes())
    TORCH_CHECK_VALUE(size <= std::numeric_limits<int32_t>::max() - 4,
                      "density must be shorter than 2^31 - 4 along every axis, found ",
                      density.sizes());
  TORCH_CHECK_VALUE(
      color.dim() == 4 && color.size(0) == 3 && color.sizes().slice(1) == density.sizes().slice(1),
      "color must have shape [3,D,H,W] with density's D, H and W ", density.sizes().slice(1),
      ", found ", color.sizes());
  TORCH_CHECK_VALUE(camera_to_world.dim() == 3 &&
                        (camera_to_world.size(1) == 3 || camera_to_world.size(1) == 4) &&
                        camera_to_world.size(2) == 4,
                    "camera_to_world must have shape [N,3|4,4], found ", camera_to_world.sizes());
  TORCH_CHECK_VALUE(intrinsics.dim() == 2 && intrinsics.size(1) == 4 &&
                        intrinsics.size(0) == camera_to_world.size(0),
                    "intrinsics must have shape [N,4] with camera_to_world's N (",
                    camera_to_world.size(0), "), found ", intrinsics.sizes());
  check_real(density, "density");
  check_real(color, "color");
  check_real(camera_to_world, "camera_to_world");
  check_real(intrinsics, "intrinsics");
  check_same_device(color, density, "color", "density");
  check_same_device(camera_to_world, density, "camera_to_world", "density");
  check_same_device(intrinsics, density, "intrinsics", "density");
}

inline void check_settings(const RenderSettings& s) {
  TORCH_CHECK_VALUE(std::isfinite(s.near) && s.near >= 0,
                    "near must be finite and not negative, found ", s.near);
  TORCH_CHECK_VALUE(std::isfinite(s.far) && s.far > s.near, "far must be finite and beyond near (",
                    s.near, "), found ", s.far);
  TORCH_CHECK_VALUE(s.samples > 0, "samples_per_ray must be positive, found ", s.samples);
  TORCH_CHECK_VALUE(s.samples <= std::numeric_limits<int32_t>::max(),
                    "samples_per_ray must be below 2^31, found ", s.samples);
  TORCH_CHECK_VALUE(!s.early_stop || (*s.early_stop >= 0 && *s.early_stop < 1),
                    "early_stop_eps must be in [0, 1), found ", s.early_stop.value_or(0));
}

inline RenderSettings check_forward(const at::Tensor& density, const at::Tensor& color,
                                    const at::Tensor& camera_to_world, const at::Tensor& intrinsics,
                                    at::IntArrayRef image_size, double near, double far,
                                    int64_t samples_per_ray, std::optional<double> early_stop_eps) {
  check_render_inputs(density, color, camera_to_world, intrinsics);
  TORCH_CHECK_VALUE(image_size.size() == 2 && image_size[0] > 0 && image_size[1] > 0,
                    "image_size must be two positive sizes (h, w), found ", image_size);
  const RenderSettings s{image_size[0], image_size[1], near, far, samples_per_ray, early_stop_eps};
  check_settings(s);
  return s;
}

inline RenderSettings check_backward(const at::Tensor& grad_color, const at::Tensor& grad_opacity,
                                     const at::Tensor& grad_depth, const at::Tensor& density,
                                     const at::Tensor& color, const at::Tensor& camera_to_world,
                                     const at::Tensor& intrinsics, double near, double far,
                                     int64_t samples_per_ray,
                                     std::optional<double> early_stop_eps) {
  check_render_inputs(density, color, camera_to_world, intrinsics);
  check_rank(grad_color, 4, "grad_color", "[N,3,h,w]");
  const int64_t n = camera_to_world.size(0), h = grad_color.size(2), w = grad_color.size(3);
  const auto check_image = [&](const at::Tensor& t, int64_t channels, const char* name) {
    const std::array<int64_t, 4> expected{n, channels, h, w};
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(expected), name, " must have shape ",
                      at::IntArrayRef(expected), ", found ", t.sizes());
    check_same_device(t, density, name, "density");
  };
  check_image(grad_color, 3, "grad_color");
  check_image(grad_opacity, 1, "grad_opacity");
  check_image(grad_depth, 1, "grad_depth");
  const RenderSettings s{h, w, near, far, samples_per_ray, early_stop_eps};
  check_settings(s);
  return s;
}

// Gradients in density, color, camera_to_world and intrinsics.
using RenderGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Those that are not needed have no elements; the others, too, unless there is nothing to add.
inline RenderGradients initial_gradients(const at::Tensor& density, const at::Tensor& color,
                                         const at::Tensor& camera_to_world,
                                         const at::Tensor& intrinsics, bool need_density,
                                         bool need_color, bool need_cameras) {
  const bool nothing = camera_to_world.size(0) == 0;
  const auto gradient = [&](const at::Tensor& t, bool needed) {
    return needed && nothing ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  return {gradient(density, need_density), gradient(color, need_color),
          gradient(camera_to_world, need_cameras), gradient(intrinsics, need_cameras)};
}

// From gradients in the upper rows [N,3,4] to those in camera_to_world.
inline at::Tensor pose_gradient(const at::Tensor& pose, const at::Tensor& camera_to_world) {
  auto gradient = at::zeros(camera_to_world.sizes(), camera_to_world.options());
  gradient.narrow(1, 0, 3).copy_(pose);
  return gradient;
}

// The inputs as the kernels want them: the grid in its own strides, and of the compute dtype.
template <class T>
struct Scene {
  at::Tensor density, color;
  at::Tensor pose, intrinsics;  // [N,3,4] and [N,4], contiguous, double
  RenderSettings settings;

  Scene(const at::Tensor& density_, const at::Tensor& color_, const at::Tensor& camera_to_world,
        const at::Tensor& intrinsics_, const RenderSettings& settings_)
      : density(density_.to(c10::CppTypeToScalarType<T>::value)),
        color(color_.to(c10::CppTypeToScalarType<T>::value)),
        pose(camera_to_world.narrow(1, 0, 3).to(at::kDouble).contiguous()),
        intrinsics(intrinsics_.to(at::kDouble).contiguous()),
        settings(settings_) {}

  at::TensorOptions options() const { return density.options(); }

  Volume<T> volume() const {
    Volume<T> v{};
    v.density = density.const_data_ptr<T>();
    v.color = color.const_data_ptr<T>();
    for (int i = 0; i < 3; ++i) {
      v.size[i] = density.size(3 - i);
      v.density_stride[i] = density.stride(3 - i);
      v.color_stride[i] = color.stride(3 - i);
    }
    v.channel_stride = color.stride(0);
    return v;
  }

  RenderParams<T> params() const {
    RenderParams<T> p{};
    p.volume = volume();
    p.views = pose.size(0);
    p.height = settings.height;
    p.width = settings.width;
    p.sampling = {settings.near,
                  (settings.far - settings.near) / static_cast<double>(settings.samples),
                  settings.samples};
    p.early_stop = settings.early_stop.value_or(std::numeric_limits<T>::epsilon());
    p.pose = pose.const_data_ptr<double>();
    p.intrinsics = intrinsics.const_data_ptr<double>();
    return p;
  }
};

}  // namespace latentdem
