// Torch glue of the volume renderer on CUDA; compiled for the emulator as well.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include "bindings/api_cuda.h"
#include "common/cuda_glue.h"
#include "common/dispatch.h"
#include "volume_render/volume_render_cuda.h"
#include "volume_render/volume_render_glue.h"

namespace latentdem {
namespace cuda {
namespace {

// The scene on the device, with its grid packed, and empty blocks found where they may be skipped.
template <class T>
struct PackedScene {
  Scene<T> scene;
  at::Tensor voxels, occupied;

  PackedScene(const Scene<T>& scene_, bool skips, cudaStream_t stream) : scene(scene_) {
    scene.density = scene.density.contiguous();
    scene.color = scene.color.contiguous();
    auto volume = scene.volume();
    volume.density = device_data<T>(scene.density, "density");
    volume.color = device_data<T>(scene.color, "color");
    voxels = device_empty({padded_count(volume.size) * 4}, scene.options(), "voxels");
    pack_grid_cuda<T>(volume, mutable_device_data<T>(voxels, "voxels"), stream);
    if (!skips) return;
    const auto bytes = scene.options().dtype(at::kByte);
    occupied = device_empty({BlockGrid(volume.size).count()}, bytes, "occupied");
    find_occupied_cuda<T>(volume, mutable_device_data<uint8_t>(occupied, "occupied"), stream);
  }

  RenderParams<T> params() const {
    auto p = scene.params();
    p.occupied = occupied.defined() ? device_data<uint8_t>(occupied, "occupied") : nullptr;
    p.pose = device_data<double>(scene.pose, "pose");
    p.intrinsics = device_data<double>(scene.intrinsics, "intrinsics");
    return p;
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> volume_render(
    const at::Tensor& density, const at::Tensor& color, const at::Tensor& camera_to_world,
    const at::Tensor& intrinsics, at::IntArrayRef image_size, double near, double far,
    int64_t samples_per_ray, std::optional<double> early_stop_eps) {
  const DeviceScope scope(density);
  const auto settings = check_forward(density, color, camera_to_world, intrinsics, image_size, near,
                                      far, samples_per_ray, early_stop_eps);
  const int64_t n = camera_to_world.size(0), h = image_size[0], w = image_size[1];
  const auto type = compute_type(density, color);
  const auto options = density.options().dtype(type);
  auto rendered = device_empty({n, 3, h, w}, options, "rendered");
  auto opacity = device_empty({n, 1, h, w}, options, "opacity");
  auto depth = device_empty({n, 1, h, w}, options, "depth");
  if (n > 0)
    dispatch_real(type, [&](auto zero) {
      using T = decltype(zero);
      const PackedScene<T> packed({density, color, camera_to_world, intrinsics, settings}, true,
                                  scope.stream());
      render_forward_cuda<T>(
          packed.params(), device_data<T>(packed.voxels, "voxels"),
          {mutable_device_data<T>(rendered, "rendered"), mutable_device_data<T>(opacity, "opacity"),
           mutable_device_data<T>(depth, "depth")},
          scope.stream());
      return 0;
    });
  return {rendered, opacity, depth};
}

RenderGradients volume_render_backward(const at::Tensor& grad_color, const at::Tensor& grad_opacity,
                                       const at::Tensor& grad_depth, const at::Tensor& density,
                                       const at::Tensor& color, const at::Tensor& camera_to_world,
                                       const at::Tensor& intrinsics, double near, double far,
                                       int64_t samples_per_ray,
                                       std::optional<double> early_stop_eps, bool need_density,
                                       bool need_color, bool need_cameras) {
  const DeviceScope scope(density);
  const auto settings =
      check_backward(grad_color, grad_opacity, grad_depth, density, color, camera_to_world,
                     intrinsics, near, far, samples_per_ray, early_stop_eps);
  auto result = initial_gradients(density, color, camera_to_world, intrinsics, need_density,
                                  need_color, need_cameras);
  if (camera_to_world.size(0) == 0 || !(need_density || need_color || need_cameras)) return result;

  return dispatch_real(compute_type(density, color), [&](auto zero) {
    using T = decltype(zero);
    // Where density is zero its gradient is not, so only without it may empty space be skipped.
    const PackedScene<T> packed({density, color, camera_to_world, intrinsics, settings},
                                !need_density, scope.stream());
    const Scene<T>& scene = packed.scene;
    const auto image = [&](const at::Tensor& t) { return t.to(scene.options()).contiguous(); };
    const at::Tensor images[] = {image(grad_color), image(grad_opacity), image(grad_depth)};
    const auto integers = scene.options().dtype(at::kLong);

    RenderBackwardCuda<T> b{};
    b.params = packed.params();
    b.voxels = device_data<T>(packed.voxels, "voxels");
    b.grad = {device_data<T>(images[0], "grad_color"), device_data<T>(images[1], "grad_opacity"),
              device_data<T>(images[2], "grad_depth")};
    b.density = need_density;
    b.color = need_color;
    b.cameras = need_cameras;

    const int64_t rays = b.params.views * b.params.height * b.params.width;
    const auto total = device_empty({2 * rays}, scene.options(), "total");
    const auto end = device_empty({rays}, scene.options().dtype(at::kInt), "end");
    b.total = mutable_device_data<T>(total, "total");
    b.end = mutable_device_data<int32_t>(end, "end");

    const int64_t numbers = 4 * padded_count(b.params.volume.size);
    const bool fixed = at::globalContext().deterministicAlgorithms();
    at::Tensor sums, bounds;
    if ((need_density || need_color) && fixed) {
      sums = at::zeros({kFixedLimbs<T> * numbers}, integers);
      bounds = at::zeros({2}, integers);
      b.fixed = mutable_device_data<FixedPoint>(sums, "sums");
      b.bounds = mutable_device_data<FixedPoint>(bounds, "bounds");
    } else if (need_density || need_color) {
      sums = at::zeros({numbers}, scene.options());
      b.sums = mutable_device_data<T>(sums, "sums");
    }

    at::Tensor partial, pose, focal;
    if (need_cameras) {
      const auto options = scene.pose.options();
      partial = device_empty({16 * RenderTiles(b.params).count()}, options, "partial");
      pose = device_empty(scene.pose.sizes(), options, "grad_pose");
      focal = device_empty(scene.intrinsics.sizes(), options, "grad_intrinsics");
      b.partial = mutable_device_data<double>(partial, "partial");
    }
    const auto pointer = [&](const at::Tensor& t, const char* name) {
      return t.defined() ? mutable_device_data<double>(t, name) : nullptr;
    };
    render_backward_cuda<T>(b, pointer(pose, "grad_pose"), pointer(focal, "grad_intrinsics"),
                            scope.stream());

    auto& [grad_volume, grad_field, grad_pose, grad_intrinsics] = result;
    if (need_density) grad_volume = device_empty(density.sizes(), scene.options(), "grad_density");
    if (need_color) grad_field = device_empty(color.sizes(), scene.options(), "grad_color");
    if (need_density || need_color)
      unpack_gradient_cuda<T>(
          b, need_density ? mutable_device_data<T>(grad_volume, "grad_density") : nullptr,
          need_color ? mutable_device_data<T>(grad_field, "grad_color") : nullptr, scope.stream());
    grad_volume = grad_volume.to(density.scalar_type());
    grad_field = grad_field.to(color.scalar_type());
    if (need_cameras) {
      grad_pose = pose_gradient(pose, camera_to_world);
      grad_intrinsics = focal.to(intrinsics.scalar_type());
    }
    return result;
  });
}

}  // namespace cuda
}  // namespace latentdem
