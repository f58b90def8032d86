// What hosts of emulated kernels call: memory that kernels may touch, and the seed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latentdem {
namespace emulation {

// Device memory that nothing has written yet, between guard zones.
void* allocate(size_t bytes, const char* name);
void release(void* pointer);

// Lends memory that the host has filled. Part of an allocation: nothing changes.
void lend(const void* pointer, size_t bytes, const char* name);
void take_back();  // everything that was lent

// Order of threads and blocks in the launches to come; 0 is the natural order.
void set_seed(uint64_t seed);

// While planning, launches are noted instead of run, one line each, and memory is not watched, so
// that operators may be called in sizes that no emulation could finish.
void plan(bool on);
bool is_planning();
const char* planned();

}  // namespace emulation
}  // namespace latentdem
