// One defect of each kind that the emulator must catch, and beside each its correct twin.
// `Bad` plants the defect. Blocks have 64 threads, grids 4 blocks, n = 256 elements.
#include "common/cuda_launch.h"
#include "common/cuda_reduce.h"
#include "emulation.h"

#include <cstring>
#include <exception>

namespace {

constexpr int kThreads = 64;

template <bool Bad>
__global__ void read_past_the_end(const float* in, float* out, int64_t n) {
  const int64_t i = latentdem::thread_index();
  if (i < n) out[i] = in[Bad ? i + 1 : i];
}

template <bool Bad>
__global__ void write_past_the_end(const float* in, float* out, int64_t n) {
  const int64_t i = latentdem::thread_index();
  out[Bad && i == n - 1 ? n : i] = in[i];
}

template <bool Bad>
__global__ void write_past_shared(const float* in, float* out, int64_t) {
  __shared__ float first[kThreads];
  __shared__ float second[kThreads];
  const unsigned t = threadIdx.x;
  second[t] = 1;
  first[Bad ? t + 1 : t] = in[t];
  __syncthreads();
  if (blockIdx.x == 0) out[t] = first[t] * second[t];
}

template <bool Bad>
__global__ void write_past_dynamic_shared(const float* in, float* out, int64_t) {
  float* tile = latentdem::dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  tile[Bad ? t + 1 : t] = in[t];
  __syncthreads();
  if (blockIdx.x == 0) out[t] = tile[t];
}

template <bool Bad>
__global__ void wide_load_across_the_end(const float* in, float* out, int64_t n) {
  const int64_t i = latentdem::thread_index();
  if (i >= n / 4) return;
  const float2 v = *reinterpret_cast<const float2*>(in + (Bad ? 4 * i + 3 : 4 * i + 2));
  out[i] = v.x + v.y;
}

template <bool Bad>
__global__ void barrier_in_a_branch(const float* in, float* out, int64_t n) {
  __shared__ float tile[kThreads];
  const int64_t i = latentdem::thread_index();
  tile[threadIdx.x] = in[i];
  if (Bad) {
    if (threadIdx.x < 40) __syncthreads();
  } else {
    __syncthreads();
  }
  if (i < n) out[i] = tile[threadIdx.x];
}

template <bool Bad>
__global__ void barrier_after_return(const float* in, float* out, int64_t n) {
  __shared__ float tile[kThreads];
  const int64_t i = latentdem::thread_index();
  if (Bad && i >= n - 5) return;
  tile[threadIdx.x] = in[i];
  __syncthreads();
  out[i] = tile[threadIdx.x];
}

template <bool Bad>
__global__ void two_barriers(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  if (Bad && threadIdx.x % 2 == 0)
    __syncthreads();
  else if (Bad)
    __syncthreads();
  out[i] = in[i];
}

template <bool Bad>
__global__ void missing_barrier(const float* in, float* out, int64_t) {
  __shared__ float tile[kThreads];
  const unsigned t = threadIdx.x;
  const int64_t i = latentdem::thread_index();
  tile[t] = in[i];
  __syncthreads();
  const float neighbour = tile[(t + 1) % kThreads];
  if (!Bad) __syncthreads();
  tile[t] = neighbour;
  out[i] = neighbour;
}

template <bool Bad>
__global__ void missing_warp_barrier(const float* in, float* out, int64_t) {
  __shared__ float tile[kThreads];
  const unsigned t = threadIdx.x;
  const int64_t i = latentdem::thread_index();
  tile[t] = in[i];
  if (Bad)
    (void)__shfl_xor_sync(latentdem::kFullWarp, t, 1);  // orders no memory
  else
    __syncwarp();
  out[i] = tile[t ^ 1];
}

template <bool Bad>
__global__ void same_place_from_two_threads(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  out[Bad && threadIdx.x == 7 ? i - 1 : i] = in[i];
}

template <bool Bad>
__global__ void blocks_share_a_sum(const float* in, float* out, int64_t) {
  __shared__ float scratch[32];
  const float total = latentdem::block_sum(in[latentdem::thread_index()], scratch);
  if (threadIdx.x == 0) out[Bad ? 0 : blockIdx.x] = total;
}

template <bool Bad>
__global__ void block_reads_another(const float* in, float* out, int64_t n) {
  const int64_t i = latentdem::thread_index();
  out[i] = in[i];
  if (Bad && blockIdx.x == 1) out[i] = out[(i + kThreads) % n];
}

template <bool Bad>
__global__ void plain_beside_atomic(const float* in, float* out, int64_t) {
  const unsigned t = threadIdx.x;
  if (latentdem::thread_index() == 0) out[0] = 0;
  if (blockIdx.x != 0) return;
  __syncthreads();
  atomicAdd(out, in[t]);
  if (!Bad) __syncthreads();
  if (t == 0) out[1] = out[0];
}

template <bool Bad>
__global__ void shared_nobody_wrote(const float* in, float* out, int64_t) {
  __shared__ float tile[kThreads + 2];
  const unsigned t = threadIdx.x;
  const int64_t i = latentdem::thread_index();
  tile[t] = in[i];
  if (!Bad && t < 2) tile[kThreads + t] = 0;
  __syncthreads();
  out[i] = tile[t] + tile[t + 2];
}

// `out` comes from the host without values.
template <bool Bad>
__global__ void global_nobody_wrote(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  if (!Bad) out[i] = 0;
  out[i] += in[i];
}

template <bool Bad>
__global__ void shuffle_in_a_branch(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  float v = in[i];
  if (threadIdx.x % 32 < 16) v += __shfl_xor_sync(Bad ? 0xffffffffu : 0x0000ffffu, v, 1);
  out[i] = v;
}

template <bool Bad>
__global__ void shuffle_masks_differ(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  const unsigned mask = Bad && threadIdx.x % 2 ? 0xfffffffeu : 0xffffffffu;
  out[i] = __shfl_down_sync(mask, in[i], 1);
}

template <bool Bad>
__global__ void shuffle_without_the_caller(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  out[i] = __shfl_sync(Bad ? 0x7fffffffu : 0xffffffffu, in[i], 0);
}

template <bool Bad>
__global__ void shuffle_from_outside(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  float v = in[i];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0x0000ffffu, v, Bad ? 16 : 15);
  out[i] = v;
}

template <bool Bad>
__global__ void misaligned_load(const float* in, float* out, int64_t n) {
  const int64_t i = latentdem::thread_index();
  if (i < n / 2 - 1)
    out[i] = static_cast<float>(*reinterpret_cast<const double*>(in + 2 * i + (Bad ? 1 : 0)));
}

volatile float host_value = 1;

template <bool Bad>
__global__ void host_memory(const float* in, float* out, int64_t) {
  const int64_t i = latentdem::thread_index();
  out[i] = in[i] + (Bad ? host_value : 1.0f);
}

template <bool Bad>
__global__ void block_too_large(const float* in, float* out, int64_t) {
  if (blockIdx.x == 0 && threadIdx.x < kThreads) out[threadIdx.x] = in[threadIdx.x];
}

using Kernel = void (*)(const float*, float*, int64_t);
struct Planted {
  const char* name;
  Kernel good, bad;
  size_t shared_bytes;
  int bad_threads;
};

#define LATENTDEM_PLANT(name) {#name, name<false>, name<true>, 0, kThreads}
const Planted kPlanted[] = {
    LATENTDEM_PLANT(read_past_the_end),
    LATENTDEM_PLANT(write_past_the_end),
    LATENTDEM_PLANT(write_past_shared),
    {"write_past_dynamic_shared", write_past_dynamic_shared<false>, write_past_dynamic_shared<true>,
     kThreads * sizeof(float), kThreads},
    LATENTDEM_PLANT(wide_load_across_the_end),
    LATENTDEM_PLANT(barrier_in_a_branch),
    LATENTDEM_PLANT(barrier_after_return),
    LATENTDEM_PLANT(two_barriers),
    LATENTDEM_PLANT(missing_barrier),
    LATENTDEM_PLANT(missing_warp_barrier),
    LATENTDEM_PLANT(same_place_from_two_threads),
    LATENTDEM_PLANT(blocks_share_a_sum),
    LATENTDEM_PLANT(block_reads_another),
    LATENTDEM_PLANT(plain_beside_atomic),
    LATENTDEM_PLANT(shared_nobody_wrote),
    LATENTDEM_PLANT(global_nobody_wrote),
    LATENTDEM_PLANT(shuffle_in_a_branch),
    LATENTDEM_PLANT(shuffle_masks_differ),
    LATENTDEM_PLANT(shuffle_without_the_caller),
    LATENTDEM_PLANT(shuffle_from_outside),
    LATENTDEM_PLANT(misaligned_load),
    LATENTDEM_PLANT(host_memory),
    {"block_too_large", block_too_large<false>, block_too_large<true>, 0, 2048},
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int planted_count() { return sizeof(kPlanted) / sizeof(kPlanted[0]); }
const char* planted_name(int i) { return kPlanted[i].name; }

// The message that the kernel ends with, or an empty one.
const char* planted_run(int i, bool bad, uint64_t seed) {
  using namespace latentdem;
  static char text[1024];
  text[0] = '\0';
  constexpr int64_t n = 4 * kThreads;
  static float in[n];
  for (int64_t j = 0; j < n; ++j) in[j] = static_cast<float>(j);
  auto* out = static_cast<float*>(emulation::allocate(n * sizeof(float), "out"));
  emulation::lend(in, sizeof(in), "in");
  emulation::set_seed(seed);
  try {
    const Planted& planted = kPlanted[i];
    emulation::launch(planted.name, bad ? planted.bad : planted.good, 4,
                      bad ? planted.bad_threads : kThreads, planted.shared_bytes, nullptr, in, out,
                      n);
  } catch (const std::exception& error) {
    std::strncpy(text, error.what(), sizeof(text) - 1);
  }
  emulation::take_back();
  emulation::release(out);
  return text;
}

}  // extern "C"
#pragma GCC visibility pop
