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
#include "volume_render/volume_window.h"

namespace latentdem {
namespace LATENTDEM_ISA {
namespace {

constexpr int64_t kChunk = 128;  // samples of a ray per round
constexpr int64_t kBlock = 8;    // tiles along each side of a block, which work together
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

// What a block of tiles works with.
template <class T>
struct Workspace {
  int64_t slabs, chunks, groups;
  VectorBuffer<TileState<T>> states;
  VectorBuffer<T> transmittance;            // [tiles,kRays,chunks]: at the start of each chunk
  VectorBuffer<SampleGradient<T>> samples;  // [tiles,kRays,kChunk]
  VectorBuffer<Run> runs;                   // [tiles,kRays kChunk]
  VectorBuffer<int32_t> first, last;        // [tiles,slabs]: indices into runs, or -1
  VectorBuffer<Rectangle> reach;            // [tiles,groups]: what its rays read
  Window<T> window;

  Workspace(const RenderParams<T>& p, int64_t tiles, bool grid)
      : slabs(slab_count(p.volume.size)),
        chunks(chunk_count(p)),
        groups(group_count(p.volume.size)),
        states(tiles),
        transmittance(tiles * kRays * chunks),
        samples(grid ? tiles * kRays * kChunk : 0),
        runs(grid ? tiles * kRays * kChunk : 0),
        first(grid ? tiles * slabs : 0),
        last(grid ? tiles * slabs : 0),
        reach(grid ? tiles * groups : 0),
        window(p.volume) {}
};

// Marks what a ray reads: between two samples, it stays in the box of their cells.
template <class T>
void add_reach(const Segment<T>& s, Rectangle* reach) {
  constexpr int64_t kStride = 8;  // samples
  Int4 here = locate(s, 0).corner;
  for (int64_t k = 0; k < s.count; k += kStride) {
    const Int4 there = locate(s, std::min(k + kStride, s.count - 1)).corner;
    const Int4 low = here < there ? here : there, high = here < there ? there : here;
    const Rectangle box{low[0], high[0] + 2, low[1], high[1] + 2};
    for (int64_t group = low[2] / kGroup; group <= (high[2] + 1) / kGroup; ++group)
      reach[group] = join(reach[group], box);
    here = there;
  }
}

// Sets up the rays of a tile.
template <class T>
void start_tile(const RenderBackward<T>& b, const Tile& tile, TileState<T>& state,
                Rectangle* reach) {
  const RenderParams<T>& p = b.params;
  const int64_t view = tile.view, pixels = p.height * p.width;
  for (double& entry : state.camera) entry = 0;
  for (int64_t slot = 0; slot < kRays; ++slot) {
    RayState<T>& r = state.rays[slot];
    r = RayState<T>{};
    const Pixel at = tile.pixel(p, slot);
    if (!at.inside) continue;
    const int64_t pixel = at.row * p.width + at.column, flat = view * pixels + pixel;
    const Ray ray = make_ray(p.pose + 12 * view, p.intrinsics + 4 * view, at.row, at.column);
    if (!is_finite(ray)) {
      for (double& entry : state.camera) entry = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    Four<T> grad{};
    grad[0] = b.grad.depth[flat];
    for (int c = 0; c < 3; ++c) grad[c + 1] = b.grad.color[(3 * view + c) * pixels + pixel];
    r.pixel = {grad, b.grad.opacity[flat], 0};
    const bool asked =
        grad[0] != 0 || grad[1] != 0 || grad[2] != 0 || grad[3] != 0 || r.pixel.opacity != 0;
    if (!asked) continue;
    r.segment = clip_ray<T>(p.volume.size, p.sampling, ray);
    r.chunk = r.segment.count;
    if (reach != nullptr && r.chunk > 0) add_reach(r.segment, reach);
  }
}

// Notes the transmittance at the start of every chunk, and where the ray ends early.
template <class T>
void scout(const RenderParams<T>& p, const PackedVolume<T>& packed, RayState<T>& r,
           T* transmittance) {
  transmittance[0] = 1;
  if (r.chunk <= kChunk) return;
  const Segment<T> s = r.segment;
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
    prefetch(packed, s, k + kAhead);
    const Four<T> voxel = interpolate<T>(load_corners(packed, cell), cell.fraction);
    reaching = composite<T>(voxel, T(0), dt, reaching).beyond;
    if (reaching < stop) {
      r.chunk = k + 1;
      return;
    }
  }
}

// What the way forwards through a chunk keeps for the way back.
template <class T>
struct KeptSample {
  Sample<T> sample;
  Four<T> slope[3];  // of density and colour, per voxel
  int64_t k;
};

// Takes every ray of tile number i of the block through its last chunk not yet seen.
template <class T, bool kGrid, bool kCameras>
void chunk_tile(const RenderBackward<T>& b, const Tile& tile, bool fresh, const Workspace<T>& work,
                int64_t i) {
  const RenderParams<T>& p = b.params;
  const PackedVolume<T> packed = work.window.packed();
  const T dt = static_cast<T>(p.sampling.step), stop = static_cast<T>(p.early_stop);
  TileState<T>& state = work.states.get()[i];
  T* transmittances = work.transmittance.get() + i * kRays * work.chunks;
  Run* runs = work.runs.get() + i * kRays * kChunk;
  int32_t *first = work.first.get() + i * work.slabs, *last = work.last.get() + i * work.slabs;
  if (fresh)
    for (int64_t slot = 0; slot < kRays; ++slot)
      scout(p, packed, state.rays[slot], transmittances + slot * work.chunks);
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
      prefetch(packed, s, k + kAhead);
      KeptSample<T>& kept = samples[count++];
      const Corners<T> corners = load_corners(packed, cell);
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
      const Pixel at = tile.pixel(p, slot);
      const double* pose = p.pose + 12 * tile.view;
      const double* intrinsics = p.intrinsics + 4 * tile.view;
      accumulate_camera_gradient<T>(p.volume.size, make_ray(pose, intrinsics, at.row, at.column),
                                    pose, intrinsics, gradient, state.camera, state.camera + 12);
    }
  }
}

// Adds the gradient of a sample whose corners are all voxels.
template <class T>
LATENTDEM_HD void add_inside(const RenderBackward<T>& b, const Cell<T>& cell, const Corners<T>& corners) {
  using Two = typename HostLanes<T>::Two;
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

// Asks for the voxels that sample k will add to.
template <class T>
LATENTDEM_HD void prefetch(const RenderBackward<T>& b, const Segment<T>& s, int64_t k) {
  const int64_t* size = b.params.volume.size;
  const Int4 corner = locate(s, std::min(k, s.count - 1)).corner;
  const int64_t row = size[0], plane = size[1] * row, channel = size[2] * plane;
  const int64_t at = (corner[2] - 1) * plane + (corner[1] - 1) * row + corner[0] - 1;
  for (const T* p : {b.density + at, b.color + at, b.color + at + channel,
                     b.color + at + 2 * channel}) {
    __builtin_prefetch(p);
    __builtin_prefetch(p + row);
    __builtin_prefetch(p + plane);
    __builtin_prefetch(p + plane + row);
  }
}

// Adds to the voxels what the samples of tile number i of the block give to one slab.
template <class T>
void collect(const RenderBackward<T>& b, const Workspace<T>& work, int64_t i, int64_t slab) {
  const TileState<T>& state = work.states.get()[i];
  const Run* runs = work.runs.get() + i * kRays * kChunk;
  for (int32_t n = work.first.get()[i * work.slabs + slab]; n >= 0; n = runs[n].next) {
    const RayState<T>& r = state.rays[runs[n].slot];
    const SampleGradient<T>* samples = work.samples.get() + (i * kRays + runs[n].slot) * kChunk;
    for (int64_t j = runs[n].begin; j < runs[n].end; ++j) {
      prefetch(b, r.segment, r.chunk + j + kAhead);
      const Cell<T> cell = locate(r.segment, r.chunk + j);
      const Corners<T> corners = spread<T>(samples[j].in_voxel(r.pixel.value), cell.fraction);
      if (is_inside(b.params.volume.size, cell)) [[likely]]
        add_inside(b, cell, corners);
      else
        add_at_border(b, cell, corners);
    }
  }
}

template <class T, bool kGrid, bool kCameras>
void backward(const RenderBackward<T>& b) {
  const RenderParams<T>& p = b.params;
  const int64_t rows = tile_count(p.height), columns = tile_count(p.width);
  const int64_t block_rows = (rows + kBlock - 1) / kBlock;
  const int64_t block_columns = (columns + kBlock - 1) / kBlock;
  Workspace<T> work(p, std::min(rows, kBlock) * std::min(columns, kBlock), kGrid);
  // A gradient in the grid takes as much memory as the grid packed; then, only what a block
  // of tiles needs is packed at a time.
  if constexpr (!kGrid) work.window.pack_everything();
  for (int64_t block = 0; block < p.views * block_rows * block_columns; ++block) {
    const int64_t view = block / (block_rows * block_columns);
    const int64_t row = block / block_columns % block_rows * kBlock;
    const int64_t column = block % block_columns * kBlock;
    const int64_t width = std::min(kBlock, columns - column);
    const int64_t count = std::min(kBlock, rows - row) * width;
    const auto tile = [&](int64_t i) { return Tile{view, row + i / width, column + i % width}; };
    parallel_tasks(count, [&](int64_t i) {
      Rectangle* reach = kGrid ? work.reach.get() + i * work.groups : nullptr;
      if constexpr (kGrid) std::fill(reach, reach + work.groups, kNowhere);
      start_tile(b, tile(i), work.states.get()[i], reach);
    });
    if constexpr (kGrid) {
      Rectangle* all = work.reach.get();
      for (int64_t i = work.groups; i < count * work.groups; ++i)
        all[i % work.groups] = join(all[i % work.groups], all[i]);
      work.window.pack([&](int64_t group) { return all[group]; });
    }
    for (bool fresh = true, more = true; more; fresh = false) {
      parallel_tasks(count, [&](int64_t i) {
        chunk_tile<T, kGrid, kCameras>(b, tile(i), fresh, work, i);
      });
      if constexpr (kGrid)
        for (int64_t parity = 0; parity < 2; ++parity)
          parallel_tasks((work.slabs + 1 - parity) / 2, [&](int64_t pair) {
            for (int64_t i = 0; i < count; ++i) collect(b, work, i, 2 * pair + parity);
          });
      more = false;
      for (int64_t i = 0; i < count; ++i) more = more || work.states.get()[i].active;
    }
    if constexpr (kCameras)
      for (int64_t i = 0; i < count; ++i) {
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
