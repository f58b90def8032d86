// A parallel loop on OpenMP, without any torch header.
//
// torch.set_num_threads() sets the OpenMP thread count of the process, which this loop
// inherits. Work is split into contiguous ranges, so results do not depend on timing.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace latentdem {

inline int64_t max_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls body(begin, end) on disjoint ranges that cover [0, count). `grain` is the least
// number of items worth a thread of their own.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
#if defined(_OPENMP)
  const int64_t useful = (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), useful));
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads();
      const int64_t share = (count + team - 1) / team;
      const int64_t begin = omp_get_thread_num() * share;
      const int64_t end = std::min(count, begin + share);
      if (begin < end) body(begin, end);
    }
    return;
  }
#else
  (void)grain;
#endif
  body(0, count);
}

// Calls body(task) for every task in [0, count), each on whichever thread is free: for tasks of
// unequal length whose results do not depend on who computes them.
template <class Body>
void parallel_tasks(int64_t count, const Body& body) {
#if defined(_OPENMP)
  const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), count));
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
#endif
  for (int64_t task = 0; task < count; ++task) body(task);
}

// Calls body(begin, end) on ranges of planes that cover [0, planes): as many planes as fill all
// threads evenly go side by side, the rest to a body that may use all threads itself.
template <class Body>
void parallel_planes(int64_t planes, const Body& body) {
  const int64_t even = planes / max_threads() * max_threads();
  parallel_for(even, 1, body);
  if (even < planes) body(even, planes);
}

// Calls body(plane, row) for all rows of all planes, on threads if there is enough to do.
template <class Body>
void for_each_row(int64_t planes, int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElements = 1 << 14;  // worth a thread
  parallel_for(planes * rows, kElements / std::max<int64_t>(columns, 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) body(item / rows, item % rows);
               });
}

}  // namespace latentdem
