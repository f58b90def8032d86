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
//
// Compiled once per instruction set (see common/isa.h).
#include <algorithm>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "common/vector_buffer.h"
#include "volume_render/volume_march.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

constexpr int64_t kChunk = 128;  // samples of a ray per round
constexpr int64_t kBatch = 64;   // tiles that work together
constexpr int64_t kSlab = 4;     // planes of cells that one task adds gradients to

// Consecutive samples of one ray in one slab, as a linked list per slab.
struct Run {
  uint8_t slot, begin, end;
  int32_t next;
};
static_assert(kRays <= 256 && kChunk < 256);

template <class T>
struct RayState {
  Segment<T> segment;
  int64_t chunk;  // samples before the chunk at hand; the next one ends here
  PixelGradient<T> pixel;
  RayGradient<T> gradient;
};

template <class T>
struct TileState {
  RayState<T> rays[kRays];
  double camera[16];  // gradients in pose and intrinsics
  int32_t runs;
  bool active;
};

int64_t slab_count(const int64_t* size) { return (size[2] + 2) / kSlab + 1; }

template <class T>
int64_t chunk_count(const RenderParams<T>& p) {
  return (p.sampling.count + kChunk - 1) / kChunk;
}

// A batch of tiles, and what one tile sees of it.
template <class T>
struct Workspace {
  int64_t slabs, chunks;
  VectorBuffer<TileState<T>> states;
  VectorBuffer<T> transmittance;            // [tiles,kRays,chunks]: at the start of each chunk
  VectorBuffer<SampleGradient<T>> samples;  // [tiles,kRays,kChunk]
  VectorBuffer<Run> runs;                   // [tiles,kRays kChunk]
  VectorBuffer<int32_t> first, last;        // [tiles,slabs]: indices into runs, or -1

  Workspace(const RenderParams<T>& p, int64_t tiles, bool grid)
      : slabs(slab_count(p.volume.size)),
        chunks(chunk_count(p)),
        states(tiles),
        transmittance(tiles * kRays * chunks),
        samples(grid ? tiles * kRays * kChunk : 0),
        runs(grid ? tiles * kRays * kChunk : 0),
        first(grid ? tiles * slabs : 0),
        last(grid ? tiles * slabs : 0) {}
};

// Notes the transmittance at the start of every chunk, and where the ray ends early.
template <class T>
void scout(const RenderParams<T>& p, Segment<T>& s, T* transmittance) {
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
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
    prefetch(p.volume, s, k + kAhead);
    const Four<T> voxel = interpolate<T>(load(p.volume, cell), cell.fraction);
    reaching = composite<T>(voxel, T(0), dt, reaching).beyond;
    if (reaching < stop) s.count = k + 1;
  }
}

template <class T>
void start_tile(const RenderBackward<T>& b, int64_t tile, TileState<T>& state, T* transmittance) {
  const RenderParams<T>& p = b.params;
  const TileGrid tiles(p);
  const int64_t view = tiles.view(tile), pixels = p.height * p.width;
  for (double& entry : state.camera) entry = 0;
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    r = RayState<T>{};
    const Pixel at = tiles.pixel(tile, slot);
    if (!at.inside) continue;
    const int64_t pixel = at.row * p.width + at.column, flat = view * pixels + pixel;
    const Ray ray = make_ray(p.pose + 12 * view, p.intrinsics + 4 * view, at.row, at.column);
    if (!is_finite(ray)) {
      for (double& entry : state.camera) entry = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    Four<T>& grad = r.pixel.value;
    grad[0] = b.grad.depth[flat];
    for (int c = 0; c < 3; ++c) grad[c + 1] = b.grad.color[(3 * view + c) * pixels + pixel];
    r.pixel.opacity = b.grad.opacity[flat];
    const bool asked =
        grad[0] != 0 || grad[1] != 0 || grad[2] != 0 || grad[3] != 0 || r.pixel.opacity != 0;
    if (!asked) continue;
    r.segment = clip_ray<T>(p.volume.size, p.sampling, ray);
    T* starts = transmittance + slot * chunk_count(p);
    starts[0] = 1;
    if (r.segment.count > kChunk) scout(p, r.segment, starts);
    r.chunk = r.segment.count;
  }
}

// What the way forwards through a chunk keeps for the way back.
template <class T>
struct KeptSample {
  Sample<T> sample;
  Four<T> slope[3];  // of density and colour, per voxel
  int64_t k;
};

// Takes every ray of tile number i of the batch through its last chunk not yet seen.
template <class T, bool kGrid, bool kCameras>
void chunk_tile(const RenderBackward<T>& b, int64_t tile, bool fresh, const Workspace<T>& work,
                int64_t i) {
  const RenderParams<T>& p = b.params;
  const TileGrid tiles(p);
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
  TileState<T>& state = work.states.get()[i];
  T* transmittances = work.transmittance.get() + i * kRays * work.chunks;
  Run* runs = work.runs.get() + i * kRays * kChunk;
  int32_t *first = work.first.get() + i * work.slabs, *last = work.last.get() + i * work.slabs;
  if (fresh) start_tile(b, tile, state, transmittances);
  if constexpr (kGrid) std::fill(first, first + work.slabs, -1);
  state.runs = 0;
  state.active = false;
  KeptSample<T> samples[kChunk];
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    if (r.chunk == 0) continue;
    const Segment<T> s = r.segment;
    const int64_t end = r.chunk, index = (end - 1) / kChunk, start = index * kChunk;
    r.chunk = start;
    T transmittance = transmittances[slot * work.chunks + index];
    int64_t slab = -1, count = 0;
    for (int64_t k = start; k < end; ++k) {
      const Cell<T> cell = locate(s, k);
      if (p.occupied != nullptr)
        if (const int64_t empty = empty_run(p, s, cell, k); empty > 0) {
          k += empty - 1;
          slab = -1;
          continue;
        }
      prefetch(p.volume, s, k + kAhead);
      KeptSample<T>& kept = samples[count++];
      const Corners<T> corners = load(p.volume, cell);
      Four<T> voxel;
      if constexpr (kCameras)
        voxel = interpolate_slopes<T>(corners, cell.fraction, kept.slope);
      else
        voxel = interpolate<T>(corners, cell.fraction);
      kept.sample = composite<T>(voxel, s.distance(k, dt), dt, transmittance);
      kept.k = k;
      transmittance = kept.sample.beyond;
      if constexpr (kGrid) {
        if (const int64_t here = cell.corner[2] / kSlab; here != slab) {
          slab = here;
          const auto begin = static_cast<uint8_t>(k - start);
          runs[state.runs] = {static_cast<uint8_t>(slot), begin, begin, -1};
          (first[slab] < 0 ? first[slab] : runs[last[slab]].next) = state.runs;
          last[slab] = state.runs++;
        }
        ++runs[state.runs - 1].end;
      }
      if (transmittance < stop) break;
    }

    // Locals, because the stores below might alias the state.
    PixelGradient<T> pixel = r.pixel;
    RayGradient<T> gradient = r.gradient;
    SampleGradient<T>* out = work.samples.get() + (i * kRays + slot) * kChunk;
    while (count > 0) {
      const KeptSample<T>& kept = samples[--count];
      const SampleGradient<T> found = sample_gradient<T>(kept.sample, dt, pixel);
      if constexpr (kCameras)
        gradient.add(kept.slope, found.in_voxel(pixel.value), kept.sample.value[0]);
      if constexpr (kGrid) out[kept.k - start] = found;
    }
    r.pixel = pixel;
    r.gradient = gradient;
    if (start > 0)
      state.active = true;
    else if constexpr (kCameras) {
      const Pixel at = tiles.pixel(tile, slot);
      const double* pose = p.pose + 12 * tiles.view(tile);
      const double* intrinsics = p.intrinsics + 4 * tiles.view(tile);
      accumulate_camera_gradient<T>(p.volume.size, make_ray(pose, intrinsics, at.row, at.column),
                                    pose, intrinsics, gradient, state.camera, state.camera + 12);
    }
  }
}

// Adds the gradient of a sample whose corners are all voxels.
template <class T>
inline void add_inside(const RenderBackward<T>& b, const Cell<T>& cell, const Corners<T>& corners) {
  typedef T Two __attribute__((vector_size(2 * sizeof(T))));
  const auto add = [](T* to, Two v) {
    Two old;
    std::memcpy(&old, to, sizeof old);
    old += v;
    std::memcpy(to, &old, sizeof old);
  };
  const int64_t* size = b.params.volume.size;
  const int64_t channel = size[0] * size[1] * size[2];
  for (int i = 0; i < 4; ++i) {
    const int64_t z = cell.corner[2] - 1 + (i >> 1), y = cell.corner[1] - 1 + (i & 1);
    const int64_t at = (z * size[1] + y) * size[0] + cell.corner[0] - 1;
    const Eight<T>& v = corners.pair[i];
    if (b.density != nullptr) add(b.density + at, __builtin_shufflevector(v, v, 0, 4));
    if (b.color == nullptr) continue;
    add(b.color + at, __builtin_shufflevector(v, v, 1, 5));
    add(b.color + at + channel, __builtin_shufflevector(v, v, 2, 6));
    add(b.color + at + 2 * channel, __builtin_shufflevector(v, v, 3, 7));
  }
}

// The same where some corners may be padding.
template <class T>
[[gnu::noinline]] void add_at_border(const RenderBackward<T>& b, const Cell<T>& cell,
                                     const Corners<T>& corners) {
  const int64_t* size = b.params.volume.size;
  const int64_t channel = size[0] * size[1] * size[2];
  for_each_corner<T>(size, cell, corners, [&](int64_t at, const Four<T>& v) {
    if (b.density != nullptr) b.density[at] += v[0];
    if (b.color == nullptr) return;
    for (int c = 0; c < 3; ++c) b.color[at + c * channel] += v[c + 1];
  });
}

// Adds to the voxels what the samples of tile number i of the batch give to one slab.
template <class T>
void collect(const RenderBackward<T>& b, const Volume<T>& gradient, const Workspace<T>& work,
             int64_t i, int64_t slab) {
  const TileState<T>& state = work.states.get()[i];
  const Run* runs = work.runs.get() + i * kRays * kChunk;
  for (int32_t n = work.first.get()[i * work.slabs + slab]; n >= 0; n = runs[n].next) {
    const RayState<T>& r = state.rays[runs[n].slot];
    const SampleGradient<T>* samples = work.samples.get() + (i * kRays + runs[n].slot) * kChunk;
    for (int64_t j = runs[n].begin; j < runs[n].end; ++j) {
      prefetch(gradient, r.segment, r.chunk + j + kAhead);
      const Cell<T> cell = locate(r.segment, r.chunk + j);
      const Corners<T> corners = spread<T>(samples[j].in_voxel(r.pixel.value), cell.fraction);
      if (is_inside(gradient.size, cell)) [[likely]]
        add_inside(b, cell, corners);
      else
        add_at_border(b, cell, corners);
    }
  }
}

template <class T, bool kGrid, bool kCameras>
void backward(const RenderBackward<T>& b) {
  const RenderParams<T>& p = b.params;
  const TileGrid tiles(p);
  const int64_t total = p.views * tiles.per_view(), batch = std::min(kBatch, total);
  const Workspace<T> work(p, batch, kGrid);
  Volume<T> gradient = p.volume;
  gradient.density = b.density;
  gradient.color = b.color;
  gradient.channel_stride = 1;
  for (int i = 0; i < 3; ++i) {
    gradient.density_stride[i] = gradient.color_stride[i] = gradient.channel_stride;
    gradient.channel_stride *= gradient.size[i];
  }
  for (int64_t begin = 0; begin < total; begin += batch) {
    const int64_t count = std::min(batch, total - begin);
    for (bool fresh = true, more = true; more; fresh = false) {
      parallel_tasks(count, [&](int64_t i) {
        chunk_tile<T, kGrid, kCameras>(b, begin + i, fresh, work, i);
      });
      if constexpr (kGrid)
        for (int64_t parity = 0; parity < 2; ++parity)
          parallel_tasks((work.slabs + 1 - parity) / 2, [&](int64_t pair) {
            for (int64_t i = 0; i < count; ++i) collect(b, gradient, work, i, 2 * pair + parity);
          });
      more = false;
      for (int64_t i = 0; i < count; ++i) more = more || work.states.get()[i].active;
    }
    if constexpr (kCameras)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t view = tiles.view(begin + i);
        const double* camera = work.states.get()[i].camera;
        for (int j = 0; j < 12; ++j) b.pose[12 * view + j] += camera[j];
        for (int j = 0; j < 4; ++j) b.intrinsics[4 * view + j] += camera[12 + j];
      }
  }
}

}  // namespace

template <class T>
void render_backward_cpu(const RenderBackward<T>& b) {
  const bool grid = b.density != nullptr || b.color != nullptr;
  if (grid && b.pose != nullptr)
    backward<T, true, true>(b);
  else if (grid)
    backward<T, true, false>(b);
  else if (b.pose != nullptr)
    backward<T, false, true>(b);
}

template void render_backward_cpu<float>(const RenderBackward<float>&);
template void render_backward_cpu<double>(const RenderBackward<double>&);

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
