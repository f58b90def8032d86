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
  VectorBuffer<T> slab_voxels;  // of kSlab + 1 planes, for each thread
  int64_t slab_size;

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
        window(p.volume),
        slab_voxels(0),
        slab_size(0) {}

  // The last plane of a slab is the first of the next.
  Rectangle slab_reach(int64_t slab) const {
    const int64_t last = std::min((slab + 1) * kSlab / kGroup, groups - 1);
    return join(reach.get()[slab * kSlab / kGroup], reach.get()[last]);
  }
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

// Adds the gradient of a slab, packed, to the planes.
template <class T>
void unpack_slab(const RenderBackward<T>& b, const Rectangle& r, int64_t slab, const T* packed) {
  const int64_t* size = b.params.volume.size;
  const int64_t volume = size[0] * size[1] * size[2], row = r.x1 - r.x0;
  const int64_t x0 = std::max(r.x0, 1), x1 = std::min<int64_t>(r.x1, size[0] + 1);
  for (int64_t plane = 0; plane <= kSlab; ++plane) {
    const int64_t z = slab * kSlab + plane;
    if (z < 1 || z > size[2]) continue;
    for (int64_t y = std::max(r.y0, 1); y < std::min<int64_t>(r.y1, size[1] + 1); ++y) {
      const T* in = packed + 4 * ((plane * (r.y1 - r.y0) + y - r.y0) * row + x0 - r.x0);
      const int64_t to = ((z - 1) * size[1] + y - 1) * size[0] + x0 - 1;
      if (b.density != nullptr)
        for (int64_t x = 0; x < x1 - x0; ++x) b.density[to + x] += in[4 * x];
      if (b.color == nullptr) continue;
      T *red = b.color + to, *green = red + volume, *blue = green + volume;
      for (int64_t x = 0; x < x1 - x0; ++x) {
        red[x] += in[4 * x + 1];
        green[x] += in[4 * x + 2];
        blue[x] += in[4 * x + 3];
      }
    }
  }
}

// Adds to the grid what the samples of a block of tiles give to one slab: first side by side,
// as the grid is packed, where a sample has four places to add to instead of sixteen.
template <class T>
void collect(const RenderBackward<T>& b, const Workspace<T>& work, int64_t tiles, int64_t slab,
             T* voxels) {
  const auto first = [&](int64_t i) { return work.first.get()[i * work.slabs + slab]; };
  bool any = false;
  for (int64_t i = 0; i < tiles; ++i) any = any || first(i) >= 0;
  if (!any) return;
  const Rectangle r = work.slab_reach(slab);
  const int64_t row = 4 * (r.x1 - r.x0), plane = row * (r.y1 - r.y0);
  std::fill(voxels, voxels + (kSlab + 1) * plane, T(0));
  const auto corner_of = [&](const Int4& c) {
    return voxels + (c[2] - slab * kSlab) * plane + (c[1] - r.y0) * row + 4 * (c[0] - r.x0);
  };
  const auto add = [](T* to, const Eight<T>& v) { store_eight<T>(to, load_eight(to) + v); };
  for (int64_t i = 0; i < tiles; ++i) {
    const Run* runs = work.runs.get() + i * kRays * kChunk;
    for (int32_t n = first(i); n >= 0; n = runs[n].next) {
      const RayState<T>& ray = work.states.get()[i].rays[runs[n].slot];
      const SampleGradient<T>* samples = work.samples.get() + (i * kRays + runs[n].slot) * kChunk;
      for (int64_t j = runs[n].begin; j < runs[n].end; ++j) {
        const Cell<T> cell = locate(ray.segment, ray.chunk + j);
        const Corners<T> g = spread<T>(samples[j].in_voxel(ray.pixel.value), cell.fraction);
        T* corner = corner_of(cell.corner);
        add(corner, g.pair[0]);
        add(corner + row, g.pair[1]);
        add(corner + plane, g.pair[2]);
        add(corner + plane + row, g.pair[3]);
      }
    }
  }
  unpack_slab(b, r, slab, voxels);
}

template <class T, bool kGrid, bool kCameras>
void backward(const RenderBackward<T>& b) {
  const RenderParams<T>& p = b.params;
  const int64_t rows = tile_count(p.height), columns = tile_count(p.width);
  const int64_t block_rows = (rows + kBlock - 1) / kBlock;
  const int64_t block_columns = (columns + kBlock - 1) / kBlock;
  const int64_t threads = std::min(max_threads(), (slab_count(p.volume.size) + 1) / 2);
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
      for (int64_t slab = 0; slab < work.slabs; ++slab) {
        const Rectangle r = work.slab_reach(slab);
        if (r.x0 >= r.x1) continue;
        const int64_t voxels = (kSlab + 1) * (r.x1 - r.x0) * (r.y1 - r.y0);
        work.slab_size = std::max(work.slab_size, 4 * voxels);
      }
      work.slab_voxels.reserve(threads * work.slab_size);
    }
    for (bool fresh = true, more = true; more; fresh = false) {
      parallel_tasks(
          count, [&](int64_t i) { chunk_tile<T, kGrid, kCameras>(b, tile(i), fresh, work, i); });
      if constexpr (kGrid)
        for (int64_t parity = 0; parity < 2; ++parity)
          parallel_tasks(threads, [&](int64_t thread) {
            T* voxels = work.slab_voxels.get() + thread * work.slab_size;
            for (int64_t slab = 2 * thread + parity; slab < work.slabs; slab += 2 * threads)
              collect(b, work, count, slab, voxels);
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
