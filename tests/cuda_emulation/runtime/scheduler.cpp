// Blocks one after the other, the threads of a block as fibres, in an order given by the seed.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

#include "emulation.h"
#include "runtime.h"

#if defined(__x86_64__)
asm(R"(
.text
.hidden latentdem_switch_stack
.globl latentdem_switch_stack
.type latentdem_switch_stack, @function
latentdem_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size latentdem_switch_stack, .-latentdem_switch_stack
)");
#endif

namespace latentdem {
namespace emulation {

Launch launch_state;
Thread* current = nullptr;

namespace {

Context scheduler;
Body kernel_body = nullptr;
std::string failure;
uint64_t seed = 0;
bool planning = false;
std::string notes;

char* stack_of(size_t thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    // The lowest page stays inaccessible: an overflow ends the process instead of spoiling data.
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA emulation: no memory for stacks");
    mprotect(memory, 4096, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[thread];
}

void yield(State state) {
  current->state = state;
  switch_context(current->context, scheduler);
}

void thread_main() {
  kernel_body(launch_state.arguments);
  yield(State::kExited);
}

std::string triple(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string place(const Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string message(const std::string& kind, const Thread& thread, const std::string& detail) {
  return "CUDA emulation: " + kind + " in kernel " + launch_state.name + ", block " +
         triple(launch_state.block_index) + ", " + describe(thread) + ": " + detail;
}

const char* name_of(const Thread& t) {
  if (t.state == State::kBarrier) return "__syncthreads";
  switch (t.operation) {
    case WarpOperation::kSync:
      return "__syncwarp";
    case WarpOperation::kShuffle:
      return "a shuffle";
    case WarpOperation::kBallot:
      return "a vote";
    default:
      return "a match";
  }
}

std::string whereabouts(const Thread& t) {
  if (t.state == State::kExited) return describe(t) + " has exited";
  std::string text = describe(t) + " waits in " + name_of(t) + " at " + place(t.site);
  if (t.state == State::kWarp) {
    char mask[16];
    std::snprintf(mask, sizeof(mask), "0x%08x", t.mask);
    text += std::string(" with mask ") + mask;
  }
  return text;
}

// Nothing can go on: two threads that wait for each other, or one that waits for the dead.
std::string explain_deadlock() {
  const auto& threads = launch_state.threads;
  const auto waiting = std::find_if(threads.begin(), threads.end(),
                                    [](const Thread& t) { return t.state != State::kExited; });
  for (const Thread& other : threads) {
    const bool same = other.state == waiting->state && other.site.line == waiting->site.line &&
                      other.operation == waiting->operation && other.mask == waiting->mask;
    const bool awaited =
        waiting->state == State::kBarrier ||
        (other.rank / 32 == waiting->rank / 32 && (waiting->mask >> other.lane() & 1u));
    if (awaited && !same)
      return message(
          waiting->state == State::kBarrier ? "divergent barrier" : "divergent warp operation",
          *waiting, whereabouts(*waiting) + ", while " + whereabouts(other));
  }
  return message("divergent warp operation", *waiting,
                 whereabouts(*waiting) + ", but its mask names lanes that do not exist");
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

// Lets the block go on if all its threads stand at one barrier.
bool release_barrier() {
  auto& threads = launch_state.threads;
  int count = 0;
  for (const Thread& t : threads) {
    if (t.state != State::kBarrier || t.barrier != threads[0].barrier ||
        !same_site(t.site, threads[0].site))
      return false;
    count += t.predicate != 0;
  }
  const int size = static_cast<int>(threads.size());
  for (Thread& t : threads) {
    t.result = static_cast<uint64_t>(t.barrier == Barrier::kCount ? count
                                     : t.barrier == Barrier::kAnd ? count == size
                                                                  : count > 0);
    t.state = State::kReady;
  }
  ++launch_state.epoch;
  return true;
}

// Completes the warp operation that `thread` waits in, if all lanes of its mask are there.
bool release_warp(Thread& thread) {
  auto& threads = launch_state.threads;
  const size_t first = thread.rank / 32 * 32;
  Thread* lanes[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(thread.mask >> i & 1u)) continue;
    if (first + i >= threads.size()) return false;
    Thread& t = threads[first + i];
    if (t.state != State::kWarp || t.operation != thread.operation || t.mask != thread.mask)
      return false;
    lanes[i] = &t;
  }
  unsigned votes = 0;
  uint32_t joined[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] == nullptr) continue;
    if (lanes[i]->payload != 0) votes |= 1u << i;
    if (thread.operation == WarpOperation::kSync)
      for (int j = 0; j < 32; ++j) joined[j] = std::max(joined[j], lanes[i]->clocks[j]);
  }
  for (int i = 0; i < 32; ++i) {
    if (lanes[i] == nullptr) continue;
    Thread& t = *lanes[i];
    if (t.operation == WarpOperation::kShuffle) {
      if (lanes[t.source & 31] == nullptr) {
        failure = message("shuffle from a lane outside the mask", t,
                          "reads lane " + std::to_string(t.source) + "; " + whereabouts(t));
        return false;
      }
      t.result = lanes[t.source & 31]->payload;
    } else if (t.operation == WarpOperation::kBallot) {
      t.result = votes;
    } else if (t.operation == WarpOperation::kMatch) {
      t.result = 0;
      for (int j = 0; j < 32; ++j)
        if (lanes[j] != nullptr && lanes[j]->payload == t.payload) t.result |= 1u << j;
    } else {
      std::copy(joined, joined + 32, t.clocks);
      ++t.clocks[i];
    }
  }
  for (Thread* t : lanes)
    if (t != nullptr) t->state = State::kReady;
  return true;
}

void run_block(std::mt19937_64& random) {
  auto& threads = launch_state.threads;
  launch_state.epoch = 1;
  for (Thread& t : threads) {
    t.state = State::kReady;
    std::fill(t.clocks, t.clocks + 32, 0u);
    t.clocks[t.lane()] = 1;
    start_context(t.context, t.stack, kStackBytes, thread_main);
  }
  begin_block();
  std::vector<unsigned> order(threads.size());
  std::iota(order.begin(), order.end(), 0u);
  size_t exited = 0;
  while (exited < threads.size()) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const unsigned i : order) {
      Thread& t = threads[i];
      if (t.state != State::kReady) continue;
      progress = true;
      current = &t;
      switch_context(scheduler, t.context);
      current = nullptr;
      if (t.state == State::kExited) ++exited;
      if (t.state == State::kWarp && failure.empty()) release_warp(t);
      if (!failure.empty()) return;
    }
    progress = release_barrier() || progress;
    if (!progress && exited < threads.size()) {
      failure = explain_deadlock();
      return;
    }
  }
}

void prepare_threads() {
  const dim3 block = launch_state.block;
  launch_state.threads.assign(size_t{block.x} * block.y * block.z, Thread{});
  unsigned rank = 0;
  for (Thread& t : launch_state.threads) {
    t.rank = rank;
    t.position = {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
    t.stack = stack_of(rank++);
  }
}

// Address of the kernel in this library, blocks, threads per block, dynamic shared memory.
void note(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  Dl_info info{};
  dladdr(kernel, &info);
  const size_t numbers[] = {static_cast<size_t>(static_cast<const char*>(kernel) -
                                                static_cast<const char*>(info.dli_fbase)),
                            size_t{grid.x} * grid.y * grid.z, size_t{block.x} * block.y * block.z,
                            shared_bytes};
  for (const size_t number : numbers) notes += std::to_string(number) + " ";
  notes += "\n";
}

void check_configuration(const char* name, dim3 grid, dim3 block, size_t shared_bytes) {
  const bool grid_fits = grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y < 65536 &&
                         grid.z >= 1 && grid.z < 65536;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid_fits || threads < 1 || threads > 1024 || block.z > 64 || shared_bytes > kMaxShared)
    throw std::runtime_error(std::string("CUDA emulation: invalid configuration for kernel ") +
                             name + ": grid " + triple({grid.x, grid.y, grid.z}) + ", block " +
                             triple({block.x, block.y, block.z}) + ", dynamic shared memory " +
                             std::to_string(shared_bytes) + " bytes");
}

}  // namespace

std::string describe(const Thread& thread) { return "thread " + triple(thread.position); }

void fail(const std::string& kind, const std::string& detail) {
  failure = message(kind, *current, detail);
  yield(State::kExited);
  __builtin_unreachable();
}

void trap(const char* what) { fail("trap", what); }

void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         Body body, const void* arguments, size_t bytes) {
  check_configuration(name, grid, block, shared_bytes);
  if (planning) return note(kernel, grid, block, shared_bytes);
  Launch& l = launch_state;
  l.name = name;
  ++l.number;
  l.grid = grid;
  l.block = block;
  l.shared_bytes = shared_bytes;
  l.arguments = static_cast<const char*>(arguments);
  l.argument_bytes = bytes;
  kernel_body = body;
  failure.clear();
  prepare_threads();
  begin_launch();
  std::mt19937_64 random(seed);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), random);
  for (const uint64_t number : order) {
    l.block_number = static_cast<uint32_t>(number);
    l.block_index = {static_cast<unsigned>(number % grid.x),
                     static_cast<unsigned>(number / grid.x % grid.y),
                     static_cast<unsigned>(number / grid.x / grid.y)};
    run_block(random);
    if (!failure.empty()) break;
  }
  current = nullptr;
  end_launch();
  if (!failure.empty()) throw std::runtime_error(failure);
}

int synchronize(Barrier kind, int predicate, Site site) {
  current->barrier = kind;
  current->predicate = predicate;
  current->site = site;
  yield(State::kBarrier);
  return static_cast<int>(current->result);
}

uint64_t warp_collective(WarpOperation operation, unsigned mask, uint64_t payload, int source,
                         Site site) {
  current->operation = operation;
  current->mask = mask;
  current->payload = payload;
  current->source = source;
  current->site = site;
  if (!(mask >> current->lane() & 1u)) {
    current->state = State::kWarp;
    fail("mask without the calling lane", whereabouts(*current));
  }
  yield(State::kWarp);
  return current->result;
}

int lane() { return current->lane(); }

unsigned active_lanes() {
  // Any subset that holds the caller is a legal answer; this is the one that assumes least.
  return 1u << current->lane();
}

uint3 thread_position() { return current->position; }
uint3 block_position() { return launch_state.block_index; }
dim3 block_size() { return launch_state.block; }
dim3 grid_size() { return launch_state.grid; }

void set_seed(uint64_t value) { seed = value; }

void plan(bool on) {
  planning = on;
  if (on) notes.clear();
}

bool is_planning() { return planning; }

const char* planned() { return notes.c_str(); }

}  // namespace emulation
}  // namespace latentdem
