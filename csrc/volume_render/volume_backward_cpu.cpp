// The backward pass of the CPU renderer.
//
// With V_k = <grad, (t_k, colour_k)> + grad_opacity the loss is sum_k weight_k V_k, and a sample's
// gradient needs the part of that sum which lies behind it. Rays therefore go in chunks from back
// to front: a chunk is marched forwards once more, its samples kept, and walked backwards. Rays of
// more than one chunk are first marched for the transmittance at the start of each.
//
// Gradients in the grid are added in two steps, so that the order of every sum is fixed: tiles
// work through a chunk and keep each sample's gradient; then slabs of the grid collect theirs,
// even slabs before odd ones because neighbours share a plane.
#include <algorithm>
#include <limits>
#include <vector>

#include "common/exp.h"
#include "common/parallel.h"
#include "volume_render/volume_march.h"

namespace latentdem {
namespace {

constexpr int64_t kChunk = 128;  // samples of a ray per round
constexpr int64_t kBatch = 64;   // tiles that work together
constexpr int64_t kSlab = 4;     // planes of cells that one task adds gradients to
constexpr int64_t kCamera = 16;  // entries of a pose and its intrinsics

// Consecutive samples of one ray in one slab, as a linked list per slab.
struct Run {
  int32_t slot, begin, end, next;
};

template <class T>
struct RayState {
  Segment<T> segment;
  int64_t chunk;  // samples before the chunk at hand; the next one ends here
  T behind;       // sum of weight_j V_j over the samples after the chunk
  T grad_opacity;
  Four<T> grad;                           // in depth, red, green, blue
  Four<T> slope_sum[3], slope_moment[3];  // sums of slope * gradient, and of t times that
};

template <class T>
struct TileState {
  RayState<T> rays[kRays];
  double camera[kCamera];
  std::vector<T> transmittance;  // [kRays,chunks]: at the start of each chunk
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
int64_t chunk_count(const RenderParams<T>& p) {
  return (p.samples + kChunk - 1) / kChunk;
}

// Notes the transmittance at the start of every chunk, and where the ray ends early.
template <class T>
LATENTDEM_INLINE void scout(const RenderParams<T>& p, Segment<T>& s, T* transmittance) {
  const int64_t row_stride = 4 * p.volume.row(), plane_stride = 4 * p.volume.plane();
  const T dt = static_cast<T>(p.step()), stop = static_cast<T>(p.early_stop);
  T reaching = 1;
  for (int64_t k = 0, next = 0; k < s.count; ++k) {
    for (; next <= k; next += kChunk) transmittance[next / kChunk] = reaching;
    const Cell<T> cell = locate(s, k);
    if (p.occupied != nullptr)
      if (const int64_t empty = empty_run(p, s, cell, k); empty > 0) {
        k += empty - 1;
        for (; next <= k; next += kChunk) transmittance[next / kChunk] = reaching;
        continue;
      }
    prefetch(p.volume, p.voxels, s, k + kAhead);
    const Four<T> value = interpolate(p.voxels + 4 * voxel_index(p.volume, cell), row_stride,
                                      plane_stride, cell.fraction);
    reaching *= inline_exp(-value[0] * dt);
    if (reaching < stop) s.count = k + 1;
  }
}

template <class T>
LATENTDEM_INLINE void start_tile(const RenderParams<T>& p, const RenderGradients<T>& g,
                                 int64_t tile, TileState<T>& state) {
  const TileGrid tiles(p);
  const int64_t view = tiles.view(tile), pixels = p.height * p.width;
  std::fill(state.camera, state.camera + kCamera, 0.0);
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
    r.grad[0] = g.grad.depth[flat];
    for (int c = 0; c < 3; ++c) r.grad[c + 1] = g.grad.color[(3 * view + c) * pixels + pixel];
    r.grad_opacity = g.grad.opacity[flat];
    const bool asked =
        r.grad[0] != 0 || r.grad[1] != 0 || r.grad[2] != 0 || r.grad[3] != 0 || r.grad_opacity != 0;
    if (!asked) continue;
    r.segment = clip_ray(p, ray);
    T* transmittance = state.transmittance.data() + slot * chunk_count(p);
    transmittance[0] = 1;
    if (r.segment.count > kChunk) scout(p, r.segment, transmittance);
    r.chunk = r.segment.count;
  }
}

// What the way forwards through a chunk keeps for the way back.
template <class T>
struct Sample {
  Four<T> value;     // t, red, green, blue
  Four<T> slope[3];  // of density and colour, per voxel
  T before, beyond;  // transmittance
  int64_t k;
};

// Takes every ray of a tile through its last chunk not yet seen. gradients [kRays,kChunk,4], if
// kGrid.
template <class T, bool kGrid, bool kCameras>
LATENTDEM_INLINE void chunk_tile_inline(const RenderParams<T>& p, const RenderGradients<T>& g,
                                        int64_t tile, bool fresh, TileState<T>& state,
                                        T* gradients) {
  const TileGrid tiles(p);
  const int64_t row_stride = 4 * p.volume.row(), plane_stride = 4 * p.volume.plane();
  const T dt = static_cast<T>(p.step()), stop = static_cast<T>(p.early_stop);
  if (fresh) start_tile(p, g, tile, state);
  if constexpr (kGrid) {
    state.runs.clear();
    std::fill(state.first.begin(), state.first.end(), -1);
  }
  state.active = false;
  Sample<T> samples[kChunk];
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    if (r.chunk == 0) continue;
    const Segment<T> s = r.segment;
    const int64_t end = r.chunk, index = (end - 1) / kChunk, start = index * kChunk;
    r.chunk = start;
    T transmittance = state.transmittance[slot * chunk_count(p) + index];
    int64_t slab = -1, count = 0;
    for (int64_t k = start; k < end; ++k) {
      const Cell<T> cell = locate(s, k);
      if (p.occupied != nullptr)
        if (const int64_t empty = empty_run(p, s, cell, k); empty > 0) {
          k += empty - 1;
          slab = -1;
          continue;
        }
      prefetch(p.volume, p.voxels, s, k + kAhead);
      const T* corner = p.voxels + 4 * voxel_index(p.volume, cell);
      Sample<T>& sample = samples[count++];
      if constexpr (kCameras)
        sample.value =
            interpolate_slopes(corner, row_stride, plane_stride, cell.fraction, sample.slope);
      else
        sample.value = interpolate(corner, row_stride, plane_stride, cell.fraction);
      sample.before = transmittance;
      transmittance *= inline_exp(-sample.value[0] * dt);
      sample.beyond = transmittance;
      sample.value[0] = s.near + static_cast<T>(k) * dt;
      sample.k = k;
      if constexpr (kGrid) {
        if (const int64_t here = cell.corner[2] / kSlab; here != slab) {
          slab = here;
          const auto run = static_cast<int32_t>(state.runs.size());
          const auto begin = static_cast<int32_t>(k - start);
          state.runs.push_back({static_cast<int32_t>(slot), begin, begin, -1});
          if (state.first[slab] < 0)
            state.first[slab] = run;
          else
            state.runs[state.last[slab]].next = run;
          state.last[slab] = run;
        }
        ++state.runs.back().end;
      }
      if (transmittance < stop) break;
    }

    // Locals, because the stores below might alias the state.
    const Four<T> grad = r.grad;
    const T grad_opacity = r.grad_opacity;
    T behind = r.behind;
    Four<T> slope_sum[3], slope_moment[3];
    std::copy(r.slope_sum, r.slope_sum + 3, slope_sum);
    std::copy(r.slope_moment, r.slope_moment + 3, slope_moment);
    T* kept = gradients + 4 * kChunk * slot;
    while (count > 0) {
      const Sample<T>& sample = samples[--count];
      const T weight = sample.before - sample.beyond;
      const T worth = sum<T>(grad * sample.value) + grad_opacity;
      Four<T> gradient = weight * grad;
      gradient[0] = density_gradient(dt, sample.beyond, worth, behind);
      behind += weight * worth;
      if constexpr (kCameras)
        for (int i = 0; i < 3; ++i) {
          const Four<T> pull = sample.slope[i] * gradient;
          slope_sum[i] += pull;
          slope_moment[i] += sample.value[0] * pull;
        }
      if constexpr (kGrid) store(kept + 4 * (sample.k - start), gradient);
    }
    r.behind = behind;
    std::copy(slope_sum, slope_sum + 3, r.slope_sum);
    std::copy(slope_moment, slope_moment + 3, r.slope_moment);
    if (start > 0)
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
void chunk_tile(const RenderParams<T>& p, const RenderGradients<T>& g, int64_t tile, bool fresh,
                TileState<T>& state, T* gradients) {
  chunk_tile_inline<T, kGrid, kCameras>(p, g, tile, fresh, state, gradients);
}
template <class T, bool kGrid, bool kCameras>
LATENTDEM_AVX2 void chunk_tile_avx2(const RenderParams<T>& p, const RenderGradients<T>& g,
                                    int64_t tile, bool fresh, TileState<T>& state, T* gradients) {
  chunk_tile_inline<T, kGrid, kCameras>(p, g, tile, fresh, state, gradients);
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
  for (auto& state : states) state.transmittance.resize(kRays * chunk_count(p));
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
        T* kept = gradients.data() + (kGrid ? i * tile_size : 0);
        avx2 ? chunk_tile_avx2<T, kGrid, kCameras>(p, g, begin + i, fresh, states[i], kept)
             : chunk_tile<T, kGrid, kCameras>(p, g, begin + i, fresh, states[i], kept);
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
