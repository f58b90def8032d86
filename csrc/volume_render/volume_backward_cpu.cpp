// The backward pass of the CPU renderer.
//
// With V_k = <grad, (t_k, colour_k)> + grad_opacity the loss is
// sum_k weight_k V_k, which the forward outputs tell; what lies behind sample k is that total
// less what has been passed, so that one march from front to back yields all gradients.
//
// Gradients in the grid are added in two steps, so that the order of every sum is fixed: tiles
// march a chunk and keep each sample's gradient; then slabs of the grid collect theirs, even
// slabs before odd ones because neighbours share a plane.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/exp.h"
#include "common/parallel.h"
#include "volume_render/volume_march.h"

namespace latentdem {
namespace {

constexpr int64_t kChunk = 64;   // samples that a ray advances per round
constexpr int64_t kBatch = 128;  // tiles that march together
constexpr int64_t kSlab = 4;     // planes of cells that one task adds gradients to
constexpr int64_t kCamera = 16;  // entries of a pose and its intrinsics

// Consecutive samples of one ray in one slab, as a linked list per slab.
struct Run {
  int32_t slot, begin, end, next;
};

template <class T>
struct RayState {
  Segment<T> segment;
  int64_t chunk, done;  // samples marched before this chunk, and in all
  T transmittance, behind;
  T grad_opacity;
  Four<T> grad;                           // in depth, red, green, blue
  Four<T> slope_sum[3], slope_moment[3];  // sums of slope * gradient, and of t times that
};

template <class T>
struct TileState {
  RayState<T> rays[kRays];
  double camera[kCamera];
  std::vector<Run> runs;
  std::vector<int32_t> first, last;  // per slab: indices into runs, or -1
  bool active;
};

static_assert(alignof(TileState<double>) == sizeof(Four<double>));

int64_t slab_count(const VolumeShape& s) { return (s.depth + 2) / kSlab + 1; }

template <class T>
void add_camera_gradient(const RenderParams<T>& p, const Pixel& at, int64_t view,
                         const RayState<T>& r, double* camera) {
  const double* pose = p.pose + 12 * view;
  const double* intrinsics = p.intrinsics + 4 * view;
  const Ray ray = make_ray(pose, intrinsics, at.row, at.column);
  const int64_t size[3] = {p.volume.width, p.volume.height, p.volume.depth};
  double origin[3], direction[3];
  for (int i = 0; i < 3; ++i) {
    origin[i] = voxel_scale(size[i]) * static_cast<double>(sum<T>(r.slope_sum[i]));
    direction[i] = voxel_scale(size[i]) * static_cast<double>(sum<T>(r.slope_moment[i]));
  }
  accumulate_camera_gradient(ray, pose, intrinsics, origin, direction, camera, camera + 12);
}

template <class T>
void start_tile(const RenderParams<T>& p, const RenderGradients<T>& g, int64_t tile,
                TileState<T>& state) {
  const TileGrid tiles(p);
  const int64_t view = tiles.view(tile), pixels = p.height * p.width;
  std::fill(state.camera, state.camera + kCamera, 0.0);
  state.active = false;
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    r = RayState<T>{};
    const Pixel at = tiles.pixel(tile, slot);
    if (!at.inside) continue;
    const int64_t pixel = at.row * p.width + at.column, flat = view * pixels + pixel;
    const Ray ray = make_ray(p.pose + 12 * view, p.intrinsics + 4 * view, at.row, at.column);
    if (!is_finite(ray)) {
      std::fill(state.camera, state.camera + kCamera, std::numeric_limits<double>::quiet_NaN());
      continue;
    }
    Four<T> rendered;
    r.grad[0] = g.grad.depth[flat];
    rendered[0] = g.rendered.depth[flat];
    for (int c = 0; c < 3; ++c) {
      r.grad[c + 1] = g.grad.color[(3 * view + c) * pixels + pixel];
      rendered[c + 1] = g.rendered.color[(3 * view + c) * pixels + pixel];
    }
    r.grad_opacity = g.grad.opacity[flat];
    const bool asked =
        r.grad[0] != 0 || r.grad[1] != 0 || r.grad[2] != 0 || r.grad[3] != 0 || r.grad_opacity != 0;
    if (!asked) continue;
    r.segment = clip_ray(p, ray);
    r.transmittance = 1;
    r.behind = sum<T>(r.grad * rendered) + r.grad_opacity * g.rendered.opacity[flat];
    state.active |= r.segment.count > 0;
  }
}

// Advances every ray of a tile by a chunk. gradients [kRays,kChunk,4], if kGrid.
template <class T, bool kGrid, bool kCameras>
LATENTDEM_INLINE void march_tile_inline(const RenderParams<T>& p, int64_t tile, TileState<T>& state,
                                        T* gradients) {
  const TileGrid tiles(p);
  const int64_t row_stride = 4 * p.volume.row(), plane_stride = 4 * p.volume.plane();
  const T dt = static_cast<T>(p.step()), stop = static_cast<T>(p.early_stop);
  if constexpr (kGrid) {
    state.runs.clear();
    std::fill(state.first.begin(), state.first.end(), -1);
  }
  state.active = false;
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    const Segment<T> s = r.segment;
    if (r.done >= s.count) {
      r.chunk = r.done;
      continue;
    }
    const int64_t start = r.chunk = r.done;
    const int64_t end = kGrid ? std::min(s.count, start + kChunk) : s.count;
    T* kept = gradients + 4 * kChunk * slot;
    // Locals, because the stores below might alias the state.
    const Four<T> grad = r.grad;
    const T grad_opacity = r.grad_opacity;
    T transmittance = r.transmittance, behind = r.behind;
    Four<T> slope_sum[3], slope_moment[3];
    std::copy(r.slope_sum, r.slope_sum + 3, slope_sum);
    std::copy(r.slope_moment, r.slope_moment + 3, slope_moment);
    int64_t slab = -1, k = start;
    for (; k < end; ++k) {
      const Cell<T> cell = locate(s, k);
      if (p.occupied != nullptr) {
        const int64_t empty = empty_run(p, s, cell, k);
        if (empty > 0) {
          k += empty - 1;
          slab = -1;
          continue;
        }
      }
      prefetch(p.volume, p.voxels, s, k + kAhead);
      const T* corner = p.voxels + 4 * voxel_index(p.volume, cell);
      Four<T> slope[3], value;
      if constexpr (kCameras)
        value = interpolate_slopes(corner, row_stride, plane_stride, cell.fraction, slope);
      else
        value = interpolate(corner, row_stride, plane_stride, cell.fraction);
      const T beyond = transmittance * inline_exp(-value[0] * dt);
      const T weight = transmittance - beyond, t = s.near + static_cast<T>(k) * dt;
      value[0] = t;
      const T worth = sum<T>(grad * value) + grad_opacity;
      behind -= weight * worth;
      Four<T> gradient = weight * grad;
      gradient[0] = density_gradient(dt, beyond, worth, behind);
      if constexpr (kCameras)
        for (int i = 0; i < 3; ++i) {
          const Four<T> pull = slope[i] * gradient;
          slope_sum[i] += pull;
          slope_moment[i] += t * pull;
        }
      if constexpr (kGrid) {
        store(kept + 4 * (k - start), gradient);
        if (const int64_t here = cell.corner[2] / kSlab; here != slab) {
          slab = here;
          const auto index = static_cast<int32_t>(state.runs.size());
          const auto begin = static_cast<int32_t>(k - start);
          state.runs.push_back({static_cast<int32_t>(slot), begin, begin, -1});
          if (state.first[slab] < 0)
            state.first[slab] = index;
          else
            state.runs[state.last[slab]].next = index;
          state.last[slab] = index;
        }
        ++state.runs.back().end;
      }
      transmittance = beyond;
      if (transmittance < stop) {
        k = s.count;
        break;
      }
    }
    r.done = k;
    r.transmittance = transmittance;
    r.behind = behind;
    std::copy(slope_sum, slope_sum + 3, r.slope_sum);
    std::copy(slope_moment, slope_moment + 3, r.slope_moment);
    if (r.done < s.count)
      state.active = true;
    else if constexpr (kCameras)
      add_camera_gradient(p, tiles.pixel(tile, slot), tiles.view(tile), r, state.camera);
  }
}

// Adds to the voxels what the samples of one tile give to one slab.
template <class T>
LATENTDEM_INLINE void collect_inline(const VolumeShape& s, const TileState<T>& state, int64_t slab,
                                     const T* gradients, T* voxels) {
  const int64_t row_stride = 4 * s.row(), plane_stride = 4 * s.plane();
  for (int32_t i = state.first[slab]; i >= 0; i = state.runs[i].next) {
    const Run& run = state.runs[i];
    const RayState<T>& r = state.rays[run.slot];
    for (int64_t j = run.begin; j < run.end; ++j) {
      prefetch(s, voxels, r.segment, r.chunk + j + kAhead);
      const Cell<T> cell = locate(r.segment, r.chunk + j);
      scatter(voxels + 4 * voxel_index(s, cell), row_stride, plane_stride, cell.fraction,
              load<Four<T>>(gradients + 4 * (kChunk * run.slot + j)));
    }
  }
}

template <class T, bool kGrid, bool kCameras>
void march_tile(const RenderParams<T>& p, int64_t tile, TileState<T>& state, T* gradients) {
  march_tile_inline<T, kGrid, kCameras>(p, tile, state, gradients);
}
template <class T, bool kGrid, bool kCameras>
LATENTDEM_AVX2 void march_tile_avx2(const RenderParams<T>& p, int64_t tile, TileState<T>& state,
                                    T* gradients) {
  march_tile_inline<T, kGrid, kCameras>(p, tile, state, gradients);
}
template <class T>
void collect(const VolumeShape& s, const TileState<T>& state, int64_t slab, const T* gradients,
             T* voxels) {
  collect_inline<T>(s, state, slab, gradients, voxels);
}
template <class T>
LATENTDEM_AVX2 void collect_avx2(const VolumeShape& s, const TileState<T>& state, int64_t slab,
                                 const T* gradients, T* voxels) {
  collect_inline<T>(s, state, slab, gradients, voxels);
}

template <class T, bool kGrid, bool kCameras>
void backward(const RenderParams<T>& p, const RenderGradients<T>& g) {
  const bool avx2 = has_avx2();
  const TileGrid tiles(p);
  const int64_t total = p.views * tiles.per_view(), batch = std::min(kBatch, total);
  const int64_t slabs = slab_count(p.volume), tile_size = 4 * kRays * kChunk;
  std::vector<TileState<T>> states(batch);
  std::vector<T> gradients(kGrid ? batch * tile_size : 0);
  if constexpr (kGrid)
    for (auto& state : states) {
      state.runs.reserve(kRays * kChunk);
      state.first.resize(slabs);
      state.last.resize(slabs);
    }
  for (int64_t begin = 0; begin < total; begin += batch) {
    const int64_t count = std::min(batch, total - begin);
    const auto active = [](const auto& state) { return state.active; };
    for (bool fresh = true, more = true; more; fresh = false) {
      parallel_tasks(count, [&](int64_t i) {
        if (fresh) start_tile(p, g, begin + i, states[i]);
        T* kept = gradients.data() + (kGrid ? i * tile_size : 0);
        avx2 ? march_tile_avx2<T, kGrid, kCameras>(p, begin + i, states[i], kept)
             : march_tile<T, kGrid, kCameras>(p, begin + i, states[i], kept);
      });
      if constexpr (kGrid)
        for (int64_t parity = 0; parity < 2; ++parity)
          parallel_tasks((slabs + 1 - parity) / 2, [&](int64_t pair) {
            const int64_t slab = 2 * pair + parity;
            for (int64_t i = 0; i < count; ++i) {
              const T* kept = gradients.data() + i * tile_size;
              avx2 ? collect_avx2<T>(p.volume, states[i], slab, kept, g.voxels)
                   : collect<T>(p.volume, states[i], slab, kept, g.voxels);
            }
          });
      more = std::any_of(states.begin(), states.begin() + count, active);
    }
    if constexpr (kCameras)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t view = tiles.view(begin + i);
        for (int j = 0; j < 12; ++j) g.pose[12 * view + j] += states[i].camera[j];
        for (int j = 0; j < 4; ++j) g.intrinsics[4 * view + j] += states[i].camera[12 + j];
      }
  }
}

}  // namespace

template <class T>
void render_backward_cpu(const RenderParams<T>& p, const RenderGradients<T>& g) {
  if (g.voxels != nullptr && g.pose != nullptr)
    backward<T, true, true>(p, g);
  else if (g.voxels != nullptr)
    backward<T, true, false>(p, g);
  else if (g.pose != nullptr)
    backward<T, false, true>(p, g);
}

template void render_backward_cpu<float>(const RenderParams<float>&, const RenderGradients<float>&);
template void render_backward_cpu<double>(const RenderParams<double>&,
                                          const RenderGradients<double>&);

}  // namespace latentdem
