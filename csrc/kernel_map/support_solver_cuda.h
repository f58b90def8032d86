// Steps of the half-quadratic loop by the threads of one block, for both CUDA paths: each thread
// owns its elements of every vector, so that only sums and the grid need barriers.
#pragma once

#include "common/cuda_reduce.h"
#include "kernel_map/kernel_map_spectral.h"

namespace latentdem {

// Vectors of kernel size, in shared or global memory. `scratch` is shared memory for block_sum.
// Grid: T get(int) reads the product of an element, void put(int, T) sets it for the next one.
template <class T, class Grid>
struct SupportSolver {
  const SupportLoopParams<T>& p;
  int size;
  T* solution;
  T* residual;
  T* direction;
  T* split;
  const T* rhs;
  double* scratch;
  Grid grid;

  template <class Function>
  __device__ void each(const Function& function) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x))
      function(i);
  }

  __device__ void load() const {
    each([&](int i) { grid.put(i, solution[i]); });
  }

  // With the product of the solution; returns the squared norm of the residual.
  __device__ double start() const {
    const T alpha = static_cast<T>(p.alpha);
    double energy = 0;
    each([&](int i) {
      const T r = rhs[i] - grid.get(i) + alpha * (split[i] - solution[i]);
      residual[i] = r;
      direction[i] = r;
      grid.put(i, r);
      energy += static_cast<double>(r) * r;
    });
    return block_sum(energy, scratch);
  }

  // With the product of the direction. False if more steps would change nothing: converged,
  // rounding has eaten the curvature, or not finite, which must not look like an answer.
  __device__ bool step(double& energy) const {
    const T alpha = static_cast<T>(p.alpha);
    double curvature = 0;
    each([&](int i) {
      curvature += static_cast<double>(direction[i]) * (grid.get(i) + alpha * direction[i]);
    });
    curvature = block_sum(curvature, scratch);
    if (!isfinite(curvature) || !isfinite(energy)) {
      each([&](int i) { solution[i] = static_cast<T>(NAN); });
      return false;
    }
    if (!(curvature > 0) || !(energy > 0)) return false;
    const T length = static_cast<T>(energy / curvature);
    double next = 0;
    each([&](int i) {
      solution[i] += length * direction[i];
      const T r = residual[i] - length * (grid.get(i) + alpha * direction[i]);
      residual[i] = r;
      next += static_cast<double>(r) * r;
    });
    next = block_sum(next, scratch);
    const T ratio = static_cast<T>(next / energy);
    energy = next;
    each([&](int i) {
      const T d = residual[i] + ratio * direction[i];
      direction[i] = d;
      grid.put(i, d);
    });
    return true;
  }

  // solution <- max(solution, 0) / sum, or split where nothing is left; then the prior.
  __device__ void project() const {
    normalize(solution, [&](int i) { return positive(solution[i]); }, split);
    const T weight = static_cast<T>(p.regularization), penalty = static_cast<T>(p.penalty);
    normalize(
        split, [&](int i) { return prior_step(solution[i], p.prior, weight, penalty); }, solution);
  }

 private:
  static __device__ T positive(T k) { return k < 0 ? T(0) : k; }  // keeps NaN

  template <class Function>
  __device__ void normalize(T* out, const Function& value, const T* fallback) const {
    double sum = 0;
    each([&](int i) { sum += value(i); });
    sum = block_sum(sum, scratch);
    const T scale = static_cast<T>(1 / sum);
    each([&](int i) { out[i] = sum == 0 ? fallback[i] : value(i) * scale; });
  }
};

}  // namespace latentdem
