// Torch glue of the volume renderer: checks, layout and dtype.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cmath>
#include <limits>

#include "bindings/api.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "volume_render/volume_render.h"

namespace latentdem {
namespace {

struct Settings {
  int64_t height, width;
  double near, far;
  int64_t samples;
  std::optional<double> early_stop;
};

void check_inputs(const at::Tensor& density, const at::Tensor& color,
                  const at::Tensor& camera_to_world, const at::Tensor& intrinsics) {
  TORCH_CHECK_VALUE(density.dim() == 4 && density.size(0) == 1,
                    "density must have shape [1,D,H,W], found ", density.sizes());
  TORCH_CHECK_VALUE(density.numel() > 0, "density must not be empty, found ", density.sizes());
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

void check_settings(const Settings& s) {
  TORCH_CHECK_VALUE(std::isfinite(s.near) && s.near >= 0,
                    "near must be finite and not negative, found ", s.near);
  TORCH_CHECK_VALUE(std::isfinite(s.far) && s.far > s.near, "far must be finite and beyond near (",
                    s.near, "), found ", s.far);
  TORCH_CHECK_VALUE(s.samples > 0, "samples_per_ray must be positive, found ", s.samples);
  TORCH_CHECK_VALUE(!s.early_stop || (*s.early_stop >= 0 && *s.early_stop < 1),
                    "early_stop_eps must be in [0, 1), found ", s.early_stop.value_or(0));
}

// The inputs as the kernels want them: the grid in its own strides, and of the compute dtype.
template <class T>
struct Scene {
  at::Tensor density, color;
  at::Tensor pose, intrinsics;  // [N,3,4] and [N,4], contiguous, double
  at::Tensor occupied;
  Settings settings;

  Scene(const at::Tensor& density_, const at::Tensor& color_, const at::Tensor& camera_to_world,
        const at::Tensor& intrinsics_, const Settings& settings_)
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

  void find_empty() {
    const int64_t blocks = BlockGrid(volume().size).count();
    occupied = at::empty({blocks}, options().dtype(at::kByte));
    const int64_t found = find_occupied_cpu<T>(volume(), occupied.mutable_data_ptr<uint8_t>());
    if (2 * found > blocks) occupied.reset();  // looking costs more than it saves
  }

  RenderParams<T> params() const {
    RenderParams<T> p{};
    p.volume = volume();
    p.occupied = occupied.defined() ? occupied.const_data_ptr<uint8_t>() : nullptr;
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

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> volume_render(
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, at::IntArrayRef image_size, double near, double far,
    int64_t samples_per_ray, std::optional<double> early_stop_eps) {
  check_inputs(density, color, camera_to_world, intrinsics);
  TORCH_CHECK_VALUE(image_size.size() == 2 && image_size[0] > 0 && image_size[1] > 0,
                    "image_size must be two positive sizes (h, w), found ", image_size);
  const int64_t n = camera_to_world.size(0), h = image_size[0], w = image_size[1];
  const Settings settings{h, w, near, far, samples_per_ray, early_stop_eps};
  check_settings(settings);
  const auto type = compute_type(density, color);
  const auto options = density.options().dtype(type);
  auto rendered = at::empty({n, 3, h, w}, options);
  auto opacity = at::empty({n, 1, h, w}, options), depth = at::empty({n, 1, h, w}, options);
  if (n > 0)
    dispatch_real(type, [&](auto zero) {
      using T = decltype(zero);
      Scene<T> scene(density, color, camera_to_world, intrinsics, settings);
      scene.find_empty();
      render_forward_cpu<T>({scene.params(),
                             {rendered.mutable_data_ptr<T>(), opacity.mutable_data_ptr<T>(),
                              depth.mutable_data_ptr<T>()}});
      return 0;
    });
  return {rendered, opacity, depth};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> volume_render_backward(
    const at::Tensor& grad_color, const at::Tensor& grad_opacity, const at::Tensor& grad_depth,
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, double near, double far, int64_t samples_per_ray,
    std::optional<double> early_stop_eps, bool need_density, bool need_color, bool need_cameras) {
  check_inputs(density, color, camera_to_world, intrinsics);
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
  const Settings settings{h, w, near, far, samples_per_ray, early_stop_eps};
  check_settings(settings);

  const auto gradient = [&](const at::Tensor& t, bool needed) {
    return needed && n == 0 ? at::zeros(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  auto result =
      std::make_tuple(gradient(density, need_density), gradient(color, need_color),
                      gradient(camera_to_world, need_cameras), gradient(intrinsics, need_cameras));
  if (n == 0 || !(need_density || need_color || need_cameras)) return result;

  return dispatch_real(compute_type(density, color), [&](auto zero) {
    using T = decltype(zero);
    Scene<T> scene(density, color, camera_to_world, intrinsics, settings);
    // Where density is zero its gradient is not, so only without it may empty space be skipped.
    if (!need_density) scene.find_empty();
    const auto image = [&](const at::Tensor& t) { return t.to(scene.options()).contiguous(); };
    const at::Tensor images[] = {image(grad_color), image(grad_opacity), image(grad_depth)};
    const auto pointer = [&](int i) { return images[i].template const_data_ptr<T>(); };
    const auto grid = [&](const at::Tensor& t) {
      auto zeros = at::empty(t.sizes(), scene.options());
      prefer_huge_pages(zeros.mutable_data_ptr(), zeros.nbytes());
      return zeros.zero_();
    };
    auto& [grad_volume, grad_field, grad_pose, grad_intrinsics] = result;
    RenderBackward<T> b{};
    b.params = scene.params();
    b.grad = {pointer(0), pointer(1), pointer(2)};
    if (need_density) {
      grad_volume = grid(density);
      b.density = grad_volume.template mutable_data_ptr<T>();
    }
    if (need_color) {
      grad_field = grid(color);
      b.color = grad_field.template mutable_data_ptr<T>();
    }
    at::Tensor pose, focal;
    if (need_cameras) {
      pose = at::zeros(scene.pose.sizes(), scene.pose.options());
      focal = at::zeros(scene.intrinsics.sizes(), scene.pose.options());
      b.pose = pose.template mutable_data_ptr<double>();
      b.intrinsics = focal.template mutable_data_ptr<double>();
    }
    render_backward_cpu<T>(b);

    grad_volume = grad_volume.to(density.scalar_type());
    grad_field = grad_field.to(color.scalar_type());
    if (need_cameras) {
      grad_pose = at::zeros(camera_to_world.sizes(), camera_to_world.options());
      grad_pose.narrow(1, 0, 3).copy_(pose);
      grad_intrinsics = focal.to(intrinsics.scalar_type());
    }
    return result;
  });
}

}  // namespace latentdem
