#include "common/fft_plan.h"

#include <cmath>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace latentdem {
namespace {

template <class T>
struct Storage {
  std::vector<FftStage> stages;
  std::vector<Complex<T>> twiddles, real;
  FftPlan<T> plan;
};

template <class T>
Complex<T> root(int64_t numerator, int64_t denominator) {
  // In extended precision, so that the factors are right to the last bit.
  const long double angle =
      -2 * 3.14159265358979323846264338327950288L * (numerator % denominator) / denominator;
  return {static_cast<T>(std::cos(angle)), static_cast<T>(std::sin(angle))};
}

template <class T>
std::unique_ptr<Storage<T>> make_plan(int64_t n) {
  auto storage = std::make_unique<Storage<T>>();
  int64_t rest = n, stride = 1;
  while (rest > 1) {
    int64_t radix = 7;
    for (const int64_t candidate : {8, 4, 2, 3, 5})
      if (rest % candidate == 0) {
        radix = candidate;
        break;
      }
    const int64_t m = rest / radix;
    storage->stages.push_back({radix, m, stride, static_cast<int64_t>(storage->twiddles.size())});
    for (int64_t p = 0; p < m; ++p)
      for (int64_t k = 1; k < radix; ++k) storage->twiddles.push_back(root<T>(p * k, rest));
    rest = m;
    stride *= radix;
  }
  for (int64_t k = 0; k <= n; ++k) storage->real.push_back(root<T>(k, 2 * n));
  storage->plan = {n, static_cast<int64_t>(storage->stages.size()), storage->stages.data(),
                   storage->twiddles.data(), storage->real.data()};
  return storage;
}

}  // namespace

template <class T>
const FftPlan<T>& fft_plan(int64_t n) {
  static std::mutex mutex;
  static std::unordered_map<int64_t, std::unique_ptr<Storage<T>>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& storage = plans[n];
  if (!storage) storage = make_plan<T>(n);
  return storage->plan;
}

template const FftPlan<float>& fft_plan<float>(int64_t);
template const FftPlan<double>& fft_plan<double>(int64_t);

}  // namespace latentdem
