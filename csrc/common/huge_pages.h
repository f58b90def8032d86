// A hint that a large buffer, not yet written to, is read in a scattered order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace latentdem {

// Asks Linux to back the buffer with 2 MiB pages: fewer page faults and misses of the address
// cache. Only a hint; whether it is heeded does not matter to correctness.
LATENTDEM_HD void prefer_huge_pages(void* buffer, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(buffer);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)buffer;
  (void)bytes;
#endif
}

}  // namespace latentdem
