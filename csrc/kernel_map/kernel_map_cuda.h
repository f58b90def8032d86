// Launchers of the kernel estimate's CUDA kernels: device memory, contiguous, no tensors. Letters
// as in kernel_map.h.
#pragma once

#include "common/cuda_stream.h"
#include "kernel_map/kernel_map_spectral.h"

namespace latentdem {

// Expected power of the error of an image's fields: scale * energy[b * stride], or scale.
struct NoisePower {
  double scale;
  const double* energy;  // [B|1] sum of the squared weights, or null
  int64_t stride;
  LATENTDEM_HD double of(int64_t b) const {
    return energy == nullptr ? scale : scale * energy[b * stride];
  }
};

// Fields as make_fields_cpu makes them, on the grid n x m, zero outside H x W.
template <class T>
void make_fields_cuda(const FieldShape& s, int64_t n, int64_t m, const T* image, const T* window,
                      T* fields, cudaStream_t stream);

// Spectra [B,F,bins] -> pooled power and cross spectrum, [2,B,bins].
template <class T>
void pool_spectra_cuda(int64_t batch, int64_t fields, int64_t bins, const Complex<T>* image,
                       const Complex<T>* observation, Complex<T>* pooled, cudaStream_t stream);

// Their inverse transforms [2,B,n,m] -> lags [B,2kh-1,2kw-1], the noise's added, and [B,kh,kw].
template <class T>
struct GatherLags {
  int64_t batch, n, m, kernel_height, kernel_width;
  bool gradient;
  NoisePower noise;
  const T* correlations;
  T* autocorrelation;
  T* crosscorrelation;
};
template <class T>
void gather_lags_cuda(const GatherLags<T>& p, cudaStream_t stream);

// K = (cross + alpha Z) / (power + noise |G|^2 + alpha), in place of z [B,n,M].
template <class T>
struct FullGridStepCuda {
  int64_t batch, n, m;
  bool gradient;
  double alpha;
  NoisePower noise;
  const Complex<T>* power;
  const Complex<T>* cross;
  Complex<T>* z;
};
template <class T>
void full_grid_step_cuda(const FullGridStepCuda<T>& p, cudaStream_t stream);

// The whole loop of support_loop_cpu, one block an image, in shared memory. False, and nothing is
// launched, where the kernel is too large for that. n and m are chosen here.
template <class T>
bool support_loop_cuda(const SupportLoopParams<T>& p, cudaStream_t stream);

// Pieces of the same loop for any size; the glue transforms between them. `grid` [B,n,m] is what it
// transforms, zero outside the kernel's support.
enum class SupportPhase : int {
  kLoad,     // the grid gets the solution
  kStart,    // product of the solution -> residual and direction; the grid gets the latter
  kStep,     // product of the direction -> one conjugate gradient step; likewise
  kProject,  // projection and prior; the grid gets the solution
};
template <class T>
struct SupportStep {
  SupportLoopParams<T> loop;
  T* residual;       // [B,kh,kw]
  T* direction;      // [B,kh,kw]
  double* energy;    // [B] squared norm of the residual
  const T* product;  // [B,n,m]
  T* grid;           // [B,n,m]
};
template <class T>
void support_step_cuda(const SupportStep<T>& p, SupportPhase phase, cudaStream_t stream);

// Unless `load_only`, cuts the solution out of the product, projects it and applies the prior; the
// grid gets the split variable. The kernel's middle is at the origin. Uses no residual, direction
// and energy.
template <class T>
void full_grid_project_cuda(const SupportStep<T>& p, bool load_only, cudaStream_t stream);

// lags [B,2kh-1,2kw-1] -> grid [B,n,m], lag zero at the origin.
template <class T>
void wrap_lags_cuda(const SupportLoopParams<T>& p, T* grid, cudaStream_t stream);

// z *= Re symbol, [count] each.
template <class T>
void scale_spectrum_cuda(int64_t count, const Complex<T>* symbol, Complex<T>* z,
                         cudaStream_t stream);

template <class T>
void project_simplex_cuda(int64_t planes, int64_t size, const T* in, T* out, cudaStream_t stream);

template <class T>
void recenter_kernel_cuda(int64_t planes, int64_t kh, int64_t kw, bool subpixel, const T* in,
                          T* out, cudaStream_t stream);

}  // namespace latentdem
