// Index on a circle.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace latentdem {

// i modulo n, from 0 to n - 1 for negative i too.
LATENTDEM_HD int64_t wrap_index(int64_t i, int64_t n) {
  const int64_t rest = i % n;
  return rest < 0 ? rest + n : rest;
}

}  // namespace latentdem
