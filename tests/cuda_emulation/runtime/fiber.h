// Threads that switch only where they ask to.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace latentdem {
namespace emulation {

#if defined(__x86_64__)
// Pushes the registers that a call preserves, exchanges stacks, pops them.
extern "C" void latentdem_switch_stack(void** save, void* load);

struct Context {
  void* stack_pointer = nullptr;
};

inline void switch_context(Context& from, Context& to) {
  latentdem_switch_stack(&from.stack_pointer, to.stack_pointer);
}

// `entry` must not return.
inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // keeps the alignment that a call leaves
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

}  // namespace emulation
}  // namespace latentdem
