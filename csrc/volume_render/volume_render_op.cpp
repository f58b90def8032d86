// Torch glue of the volume renderer on the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "bindings/api.h"
#include "common/dispatch.h"
#include "common/huge_pages.h"
#include "volume_render/volume_render.h"
#include "volume_render/volume_render_glue.h"

namespace latentdem {
namespace {

// One byte per block of the grid; undefined where looking costs more than it saves.
template <class T>
at::Tensor find_empty(const Scene<T>& scene) {
  const int64_t blocks = BlockGrid(scene.volume().size).count();
  at::Tensor occupied = at::empty({blocks}, scene.options().dtype(at::kByte));
  const int64_t found = find_occupied_cpu<T>(scene.volume(), occupied.mutable_data_ptr<uint8_t>());
  return 2 * found > blocks ? at::Tensor() : occupied;
}

const uint8_t* bytes(const at::Tensor& occupied) {
  return occupied.defined() ? occupied.const_data_ptr<uint8_t>() : nullptr;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> volume_render(
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, at::IntArrayRef image_size, double near, double far,
    int64_t samples_per_ray, std::optional<double> early_stop_eps) {
  const auto settings = check_forward(density, color, camera_to_world, intrinsics, image_size, near,
                                      far, samples_per_ray, early_stop_eps);
  const int64_t n = camera_to_world.size(0), h = image_size[0], w = image_size[1];
  const auto type = compute_type(density, color);
  const auto options = density.options().dtype(type);
  auto rendered = at::empty({n, 3, h, w}, options);
  auto opacity = at::empty({n, 1, h, w}, options), depth = at::empty({n, 1, h, w}, options);
  if (n > 0)
    dispatch_real(type, [&](auto zero) {
      using T = decltype(zero);
      const Scene<T> scene(density, color, camera_to_world, intrinsics, settings);
      const auto occupied = find_empty(scene);
      auto params = scene.params();
      params.occupied = bytes(occupied);
      render_forward_cpu<T>({params,
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
  const auto settings =
      check_backward(grad_color, grad_opacity, grad_depth, density, color, camera_to_world,
                     intrinsics, near, far, samples_per_ray, early_stop_eps);
  auto result = initial_gradients(density, color, camera_to_world, intrinsics, need_density,
                                  need_color, need_cameras);
  if (camera_to_world.size(0) == 0 || !(need_density || need_color || need_cameras)) return result;

  return dispatch_real(compute_type(density, color), [&](auto zero) {
    using T = decltype(zero);
    const Scene<T> scene(density, color, camera_to_world, intrinsics, settings);
    // Where density is zero its gradient is not, so only without it may empty space be skipped.
    const auto occupied = need_density ? at::Tensor() : find_empty(scene);
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
    b.params.occupied = bytes(occupied);
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
      grad_pose = pose_gradient(pose, camera_to_world);
      grad_intrinsics = focal.to(intrinsics.scalar_type());
    }
    return result;
  });
}

}  // namespace latentdem
