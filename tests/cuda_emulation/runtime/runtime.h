// State of the emulator: one launch, one block of it at a time, its threads as fibres.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fiber.h"

namespace latentdem {
namespace emulation {

enum class State { kReady, kBarrier, kWarp, kExited };

struct Thread {
  Context context;
  char* stack = nullptr;
  State state = State::kReady;
  uint3 position{};
  unsigned rank = 0;
  Site site{};
  // Barrier or warp operation that the thread waits in, and what it brought and gets.
  Barrier barrier = Barrier::kPlain;
  int predicate = 0;
  WarpOperation operation = WarpOperation::kSync;
  unsigned mask = 0;
  uint64_t payload = 0, result = 0;
  int source = 0;
  // Accesses of lane i with a clock up to clocks[i] happened before what this thread does now.
  uint32_t clocks[32] = {};

  int lane() const { return static_cast<int>(rank % 32); }
};

inline constexpr size_t kStackBytes = 128 * 1024;
inline constexpr size_t kMaxShared = 227 * 1024;

struct Launch {
  const char* name = "";
  uint32_t number = 0;
  dim3 grid, block;
  uint3 block_index{};
  uint32_t block_number = 0, epoch = 0;
  size_t shared_bytes = 0;
  const char* arguments = nullptr;
  size_t argument_bytes = 0;
  std::vector<Thread> threads;
};

extern Launch launch_state;
extern Thread* current;  // null while no kernel runs

// Ends the launch with a message; called by the thread at fault.
[[noreturn]] void fail(const std::string& kind, const std::string& detail);
std::string describe(const Thread& thread);

// memory.cpp
void begin_launch();
void begin_block();
void end_launch();
void access(const void* address, size_t bytes, bool write, bool atomic, const void* site);

}  // namespace emulation
}  // namespace latentdem
