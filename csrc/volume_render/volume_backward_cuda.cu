// The CUDA renderer's backward pass.
//
// With worth_k = <grad, (t_k, colour_k)> + grad_opacity the loss is sum_k weight_k worth_k, and a
// sample's gradient needs the part of that sum which lies behind it. A first launch marches every
// ray for its total; the second marches again and subtracts what it has passed. Both sums carry
// their rounding errors along, so that the difference is as good as a sum from behind.
//
// Neighbouring rays meet in the same cells. Lanes of a warp that share a cell add up what they
// give to its eight corners, 32 numbers, before each lane hands one of them to the grid.
#include "common/cuda_launch.h"
#include "volume_render/volume_march_cuda.h"

namespace latentdem {
namespace {

constexpr int kThreads = 256;
constexpr int kCamera = 16;  // gradients in a pose and its intrinsics
// Lanes that must share a cell for a sum over the warp to take less time than their atomics: the
// sum is about 160 instructions, atomics are 32 per lane, of which those to one address wait for
// each other.
constexpr int kShared = 4;

// Blocks per multiprocessor that the registers must suffice for; with one more, some spill.
template <class T>
constexpr int kTotalBlocks = sizeof(T) == sizeof(float) ? 6 : 3;
template <class T>
constexpr int kBackwardBlocks = sizeof(T) == sizeof(float) ? 4 : 2;

enum class Scatter { kNone, kFloating, kFixed };

// A sum that keeps what its additions round off.
template <class T>
struct CarefulSum {
  T high = 0, low = 0;

  __device__ void add(T x) {
    const T sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part);
    high = sum;
  }
  __device__ T minus(const CarefulSum& other) const {
    return (high - other.high) + (low - other.low);
  }
};

template <class T>
__device__ inline PixelGradient<T> pixel_gradient(const RenderBackwardCuda<T>& b,
                                                  const TilePixel& at) {
  const RenderParams<T>& p = b.params;
  PixelGradient<T> pixel{};
  pixel.value[0] = b.grad.depth[at.index(p, 0, 1)];
  for (int c = 0; c < 3; ++c) pixel.value[c + 1] = b.grad.color[at.index(p, c, 3)];
  pixel.opacity = b.grad.opacity[at.index(p, 0, 1)];
  return pixel;
}

// The order of numbers that are not negative is that of their bits; NaN is the largest.
__device__ inline FixedPoint bits_of(double x) {
  FixedPoint bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
__device__ inline double number_of(FixedPoint bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Units per one, for `count` summands of at most number_of(bound) each: they stay below 2^60.
// Zero if all summands are zero, or the bound is not finite.
__device__ inline double fixed_scale(FixedPoint bound, double count) {
  const double largest = fmax(number_of(bound), 1e-270) * count;
  return number_of(bound) > 0 && largest < INFINITY ? ldexp(1.0, 59 - ilogb(largest)) : 0;
}
// Of the second limb, in units per unit of the first.
__device__ inline double remainder_scale(double count) { return ldexp(1.0, 59 - ilogb(count)); }

template <class T>
__device__ inline double summand_count(const RenderParams<T>& p) {
  return static_cast<double>(p.views) * static_cast<double>(p.height) *
         static_cast<double>(p.width) * static_cast<double>(p.sampling.count);
}

template <class T>
__global__ void __launch_bounds__(kRenderThreads, kTotalBlocks<T>)
    total_rays(RenderBackwardCuda<T> b) {
  const RenderParams<T>& p = b.params;
  const RenderTiles tiles(p);
  const int64_t rays = p.views * p.height * p.width;
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const TilePixel at(p, tiles, tile);
    March<T> march;
    PixelGradient<T> pixel{};
    if (at.inside) {
      pixel = pixel_gradient(b, at);
      bool asked = pixel.opacity != 0;
      for (int c = 0; c < 4; ++c) asked = asked || pixel.value[c] != 0;
      const Ray ray =
          make_ray(p.pose + 12 * at.view, p.intrinsics + 4 * at.view, at.row, at.column);
      if (asked && is_finite(ray)) {
        march.segment = clip_ray<T>(p.volume.size, p.sampling, ray);
        march.end = static_cast<int32_t>(march.segment.count);
      }
    }
    CarefulSum<T> total;
    T transmittance = 1, largest = 0, heaviest = 0;
    CarefulSum<T> around;
    while (__any_sync(kFullWarp, march.seek(p))) {
      if (march.k >= march.end) continue;
      const Corners<T> corners =
          load_packed_corners(p.volume.size, b.voxels, padded_offset(p.volume.size, march.cell));
      const Four<T> voxel = interpolate<T>(corners, march.cell.fraction);
      const Sample<T> sample =
          composite<T>(voxel, march.segment.distance(march.k, dt), dt, transmittance);
      const T worth = pixel.worth(sample), part = sample.weight() * worth;
      total.add(part);
      // Written so that a NaN stays.
      largest = fabs(sample.beyond * worth) <= largest ? largest : fabs(sample.beyond * worth);
      heaviest = fabs(sample.weight()) <= heaviest ? heaviest : fabs(sample.weight());
      around.add(fabs(part));
      transmittance = sample.beyond;
      ++march.k;
      if (transmittance < stop) march.end = march.k;
    }
    if (at.inside) {
      const int64_t ray = at.index(p, 0, 1);
      b.total[ray] = total.high;
      b.total[rays + ray] = total.low;
      b.end[ray] = march.end;
    }
    if (b.bounds == nullptr) continue;
    double brightest = 0;
    for (int c = 1; c < 4; ++c)
      brightest = fabs(pixel.value[c]) <= brightest ? brightest : fabs(pixel.value[c]);
    // Twice, for what rounding may add, here and in the second march.
    const FixedPoint bounds[2] = {
        bits_of(2 * fabs(static_cast<double>(dt)) *
                (static_cast<double>(largest) + static_cast<double>(around.high))),
        bits_of(2 * static_cast<double>(heaviest) * brightest)};
    for (int i = 0; i < 2; ++i) {
      const FixedPoint bound = warp_max(bounds[i]);
      if (threadIdx.x % 32 == 0) atomicMax(b.bounds + i, bound);
    }
  }
}

// Adds density's gradient, colour's, or both. Where the device can add four floats by one
// instruction, it does, wanted or not.
__device__ inline void add_floats(float* to, const Four<float>& value, bool density, bool color) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  (void)density, (void)color;
  atomicAdd(reinterpret_cast<float4*>(to), make_float4(value[0], value[1], value[2], value[3]));
#else
  if (density) atomicAdd(to, value[0]);
  if (!color) return;
  for (int c = 1; c < 4; ++c) atomicAdd(to + c, value[c]);
#endif
}

// Hands gradients to the grid; `density` and `color` are units per one, if fixed.
template <class T, Scatter kMode>
struct GridSums {
  const RenderBackwardCuda<T>& b;
  double density = 0, color = 0, remainder = 0;

  __device__ explicit GridSums(const RenderBackwardCuda<T>& backward) : b(backward) {
    if constexpr (kMode == Scatter::kFixed) {
      const double count = summand_count(b.params);
      density = fixed_scale(b.bounds[0], count);
      color = fixed_scale(b.bounds[1], count);
      if constexpr (kFixedLimbs<T> == 2) remainder = remainder_scale(count);
    }
  }

  // Channel c of voxel `at` of the padded grid.
  __device__ void add(int64_t at, int c, T value) const {
    if (!(c == 0 ? b.density : b.color)) return;
    if constexpr (kMode == Scatter::kFixed) {
      const double units = static_cast<double>(value) * (c == 0 ? density : color);
      const auto whole = static_cast<int64_t>(llrint(units));
      atomicAdd(b.fixed + 4 * at + c, static_cast<FixedPoint>(whole));
      if constexpr (kFixedLimbs<T> == 2) {
        const double rest = units - static_cast<double>(whole);
        FixedPoint* second = b.fixed + 4 * padded_count(b.params.volume.size);
        atomicAdd(second + 4 * at + c, static_cast<FixedPoint>(llrint(rest * remainder)));
      }
    } else {
      atomicAdd(b.sums + 4 * at + c, value);
    }
  }

  __device__ void add(int64_t at, const Four<T>& value) const {
    if constexpr (kMode == Scatter::kFloating && sizeof(T) == sizeof(float))
      add_floats(b.sums + 4 * at, value, b.density, b.color);
    else
      for (int c = 0; c < 4; ++c) add(at, c, value[c]);
  }
};

// Offset of corner x + 2 y + 4 z from the lowest one, in the padded grid.
__device__ inline int64_t corner_offset(const int64_t* size, int corner) {
  return (corner & 1) + (size[0] + 2) * ((corner >> 1 & 1) + (size[1] + 2) * (corner >> 2));
}

// Adds every lane's gradient in its sample to the corners of the cell at voxel `at`; -1: none.
template <class T, Scatter kMode>
__device__ inline void scatter(const GridSums<T, kMode>& sums, int64_t at, const Four<T>& fraction,
                               const Four<T>& gradient) {
  const int64_t* size = sums.b.params.volume.size;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned group = __match_any_sync(kFullWarp, static_cast<unsigned long long>(at));
  const bool shared = at >= 0 && __popc(group) >= kShared;
  for (unsigned left = __ballot_sync(kFullWarp, shared); left != 0;) {
    const int first = __ffs(static_cast<int>(left)) - 1;
    const unsigned members = __shfl_sync(kFullWarp, group, first);
    const int64_t cell = __shfl_sync(kFullWarp, at, first);
    const T share = members >> lane & 1u ? T(1) : T(0);
    Four<T> part = gradient;
    for (int c = 0; c < 4; ++c) part[c] = share != 0 ? part[c] : T(0);
    const Corners<T> corners = spread<T>(part, fraction);
    T values[32];
    for (int i = 0; i < 4; ++i) {
      const Four<T> left_ = low_half<T>(corners.pair[i]), right = high_half<T>(corners.pair[i]);
      for (int c = 0; c < 4; ++c) {
        values[8 * i + c] = left_[c];
        values[8 * i + 4 + c] = right[c];
      }
    }
    sums.add(cell + corner_offset(size, lane / 4), lane % 4, warp_sum_each(values));
    left &= ~members;
  }
  if (at < 0 || shared) return;
  const Corners<T> corners = spread<T>(gradient, fraction);
  for (int i = 0; i < 4; ++i) {
    sums.add(at + corner_offset(size, 2 * i), low_half<T>(corners.pair[i]));
    sums.add(at + corner_offset(size, 2 * i + 1), high_half<T>(corners.pair[i]));
  }
}

template <class T, Scatter kMode, bool kCameras>
__global__ void __launch_bounds__(kRenderThreads, kBackwardBlocks<T>)
    render_backward(RenderBackwardCuda<T> b) {
  __shared__ double warps[kRenderThreads / 32][kCamera];
  const RenderParams<T>& p = b.params;
  const RenderTiles tiles(p);
  const int64_t rays = p.views * p.height * p.width;
  const T dt = static_cast<T>(p.sampling.step);
  const GridSums<T, kMode> sums(b);
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const TilePixel at(p, tiles, tile);
    const double* pose = p.pose + 12 * at.view;
    const double* intrinsics = p.intrinsics + 4 * at.view;
    March<T> march;
    PixelGradient<T> pixel{};
    CarefulSum<T> total, passed;
    if (at.inside) {
      pixel = pixel_gradient(b, at);
      const int64_t ray = at.index(p, 0, 1);
      total = {b.total[ray], b.total[rays + ray]};
      march.end = b.end[ray];
      if (march.end > 0)
        march.segment =
            clip_ray<T>(p.volume.size, p.sampling, make_ray(pose, intrinsics, at.row, at.column));
    }
    T transmittance = 1, origin[3] = {}, direction[3] = {};
    while (__any_sync(kFullWarp, march.seek(p))) {
      int64_t voxel_at = -1;
      Four<T> gradient{};
      if (march.k < march.end) {
        voxel_at = padded_offset(p.volume.size, march.cell);
        const Corners<T> corners = load_packed_corners(p.volume.size, b.voxels, voxel_at);
        Four<T> voxel, slope[3];
        if constexpr (kCameras)
          voxel = interpolate_slopes<T>(corners, march.cell.fraction, slope);
        else
          voxel = interpolate<T>(corners, march.cell.fraction);
        const T t = march.segment.distance(march.k, dt);
        const Sample<T> sample = composite<T>(voxel, t, dt, transmittance);
        const T worth = pixel.worth(sample);
        passed.add(sample.weight() * worth);
        const SampleGradient<T> found{dt * (sample.beyond * worth - total.minus(passed)),
                                      sample.weight()};
        gradient = found.in_voxel(pixel.value);
        if constexpr (kCameras)
          for (int i = 0; i < 3; ++i) {
            const T pull = sum<T>(slope[i] * gradient);
            origin[i] += pull;
            direction[i] += t * pull;
          }
        transmittance = sample.beyond;
        ++march.k;
      }
      if constexpr (kMode != Scatter::kNone)
        scatter<T, kMode>(sums, voxel_at, march.cell.fraction, gradient);
    }
    if constexpr (kCameras) {
      double camera[kCamera] = {};
      if (at.inside) {
        const Ray ray = make_ray(pose, intrinsics, at.row, at.column);
        double grad_origin[3], grad_direction[3];
        for (int i = 0; i < 3; ++i) {
          grad_origin[i] = voxel_scale(p.volume.size[i]) * static_cast<double>(origin[i]);
          grad_direction[i] = voxel_scale(p.volume.size[i]) * static_cast<double>(direction[i]);
        }
        if (!is_finite(ray))
          for (double& entry : camera) entry = static_cast<double>(NAN);
        else if (march.end > 0)
          accumulate_camera_gradient(ray, pose, intrinsics, grad_origin, grad_direction, camera,
                                     camera + 12);
      }
      const double sum = warp_sum_each(camera);
      if (threadIdx.x % 32 < kCamera) warps[threadIdx.x / 32][threadIdx.x % 32] = sum;
      __syncthreads();
      if (threadIdx.x < kCamera) {
        double block = 0;
        for (int i = 0; i < kRenderThreads / 32; ++i) block += warps[i][threadIdx.x];
        b.partial[kCamera * tile + threadIdx.x] = block;
      }
      __syncthreads();
    }
  }
}

// partial [N,tiles,16] -> pose [N,12], intrinsics [N,4]; one block per view.
__global__ void __launch_bounds__(kThreads)
    sum_cameras(int64_t views, int64_t tiles, const double* partial, double* pose,
                double* intrinsics) {
  constexpr int kRows = kThreads / kCamera;
  __shared__ double rows[kRows][kCamera];
  const int entry = static_cast<int>(threadIdx.x % kCamera);
  const int row = static_cast<int>(threadIdx.x / kCamera);
  for (int64_t view = blockIdx.x; view < views; view += gridDim.x) {
    double total = 0;
    for (int64_t tile = row; tile < tiles; tile += kRows)
      total += partial[kCamera * (view * tiles + tile) + entry];
    rows[row][entry] = total;
    __syncthreads();
    if (row == 0) {
      for (int i = 1; i < kRows; ++i) total += rows[i][entry];
      (entry < 12 ? pose[12 * view + entry] : intrinsics[4 * view + entry - 12]) = total;
    }
    __syncthreads();
  }
}

template <class T>
__device__ inline T unpack_fixed(const RenderBackwardCuda<T>& b, int64_t at, double scale,
                                 double remainder) {
  auto units = static_cast<double>(static_cast<int64_t>(b.fixed[at]));
  if constexpr (kFixedLimbs<T> == 2) {
    const FixedPoint rest = b.fixed[4 * padded_count(b.params.volume.size) + at];
    units += static_cast<double>(static_cast<int64_t>(rest)) / remainder;
  }
  return scale > 0 ? static_cast<T>(units / scale) : T(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    unpack_gradient(RenderBackwardCuda<T> b, T* density, T* color) {
  const int64_t* size = b.params.volume.size;
  const int64_t channel = size[0] * size[1] * size[2];
  const double count = summand_count(b.params), remainder = remainder_scale(count);
  double scale[2] = {}, spoilt[2] = {};
  if (b.fixed != nullptr)
    for (int i = 0; i < 2; ++i) {
      scale[i] = fixed_scale(b.bounds[i], count);
      spoilt[i] = number_of(b.bounds[i]) * count < INFINITY ? 0 : static_cast<double>(NAN);
    }
  for (int64_t i = thread_index(); i < channel; i += thread_count()) {
    const int64_t x = i % size[0] + 1, y = i / size[0] % size[1] + 1;
    const int64_t z = i / (size[0] * size[1]) + 1;
    const int64_t at = (z * (size[1] + 2) + y) * (size[0] + 2) + x;
    Four<T> value{};
    if (b.fixed == nullptr)
      value = load_four(b.sums + 4 * at);
    else
      for (int c = 0; c < 4; ++c)
        value[c] =
            unpack_fixed(b, 4 * at + c, scale[c > 0], remainder) + static_cast<T>(spoilt[c > 0]);
    if (density != nullptr) density[i] = value[0];
    if (color == nullptr) continue;
    for (int c = 0; c < 3; ++c) color[c * channel + i] = value[c + 1];
  }
}

template <class T, Scatter kMode>
void launch_backward(const RenderBackwardCuda<T>& b, unsigned blocks, cudaStream_t stream) {
  if (b.cameras)
    LDEM_LAUNCH((render_backward<T, kMode, true>), blocks, kRenderThreads, 0, stream, b);
  else
    LDEM_LAUNCH((render_backward<T, kMode, false>), blocks, kRenderThreads, 0, stream, b);
}

}  // namespace

template <class T>
void render_backward_cuda(const RenderBackwardCuda<T>& b, double* pose, double* intrinsics,
                          cudaStream_t stream) {
  const RenderTiles tiles(b.params);
  const unsigned blocks = grid_size(tiles.count(), 1);
  LDEM_LAUNCH(total_rays<T>, blocks, kRenderThreads, 0, stream, b);
  if (b.fixed != nullptr)
    launch_backward<T, Scatter::kFixed>(b, blocks, stream);
  else if (b.sums != nullptr)
    launch_backward<T, Scatter::kFloating>(b, blocks, stream);
  else
    LDEM_LAUNCH((render_backward<T, Scatter::kNone, true>), blocks, kRenderThreads, 0, stream, b);
  if (b.cameras)
    LDEM_LAUNCH(sum_cameras, grid_size(tiles.views, 1), kThreads, 0, stream, tiles.views,
                tiles.per_view(), b.partial, pose, intrinsics);
}

template <class T>
void unpack_gradient_cuda(const RenderBackwardCuda<T>& b, T* density, T* color,
                          cudaStream_t stream) {
  const int64_t* size = b.params.volume.size;
  LDEM_LAUNCH(unpack_gradient<T>, grid_size(size[0] * size[1] * size[2], kThreads), kThreads, 0,
              stream, b, density, color);
}

#define LATENTDEM_INSTANTIATE(T)                                                        \
  template void render_backward_cuda<T>(const RenderBackwardCuda<T>&, double*, double*, \
                                        cudaStream_t);                                  \
  template void unpack_gradient_cuda<T>(const RenderBackwardCuda<T>&, T*, T*, cudaStream_t);
LATENTDEM_INSTANTIATE(float)
LATENTDEM_INSTANTIATE(double)
#undef LATENTDEM_INSTANTIATE

}  // namespace latentdem
