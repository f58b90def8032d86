// Fourier transforms by the threads of one block, in its shared memory.
//
// Decimation in frequency forwards, in time backwards: each butterfly writes where it read, so
// there is no second buffer and one barrier a pass, and spectra stay in the order that the forward
// passes leave (fft_position). Pointwise arithmetic does not care, and the last forward pass, a
// multiplication and the first inverse pass are one pass in registers (fft_multiply).
//
// Not cuFFTDx: its sizes and architectures are template parameters, it stores natural order, and
// nothing but nvcc compiles it, so that no test here could run it.
#pragma once

#include <initializer_list>

#include "common/complex.h"
#include "common/cuda_launch.h"
#include "common/macros.h"

namespace latentdem {

// Quotients by a number that is fixed during a launch, of numbers whose product with it is below
// 2^32.
struct Divisor {
  unsigned divisor, reciprocal;
  Divisor() = default;
  explicit Divisor(int64_t d)
      : divisor(static_cast<unsigned>(d)),
        reciprocal(static_cast<unsigned>(((uint64_t{1} << 32) + divisor - 1) / divisor)) {}
  LATENTDEM_HD int divide(int x) const {
    if (divisor == 1) return x;  // its reciprocal is one bit too long
    return static_cast<int>(uint64_t{static_cast<unsigned>(x)} * reciprocal >> 32);
  }
};

inline constexpr int kMaxFftPasses = 12;

// The length is the product of the radices; before pass i, transforms of length radix * stride
// stand side by side, and its twiddle factors are exp(-2 pi i j k root_step / length).
struct FftPass {
  int radix, stride, root_step;
  Divisor by_stride;
};
struct BlockFft {
  int length, passes;
  FftPass pass[kMaxFftPasses];
};

// 2^a 3^b 5^c, at least 2.
inline bool is_block_fft_size(int64_t n) {
  if (n < 2) return false;
  for (const int64_t prime : {2, 3, 5})
    while (n % prime == 0) n /= prime;
  return n == 1;
}
inline int64_t next_block_fft_size(int64_t n) {
  while (!is_block_fft_size(n)) ++n;
  return n;
}

// The fewest passes; false if there is no plan.
inline bool plan_block_fft(int64_t rest, int used, int best, int* radices, int* found) {
  if (rest == 1) return true;
  bool any = false;
  for (const int radix : {8, 6, 5, 4, 3, 2}) {
    if (rest % radix != 0 || used + 1 >= best) continue;
    int tail[kMaxFftPasses], count = 0;
    if (!plan_block_fft(rest / radix, used + 1, best, tail, &count)) continue;
    any = true;
    best = used + 1 + count;
    radices[0] = radix;
    for (int i = 0; i < count; ++i) radices[i + 1] = tail[i];
    *found = count + 1;
  }
  return any;
}

inline BlockFft make_block_fft(int64_t length) {
  BlockFft fft{};
  int radices[kMaxFftPasses];
  plan_block_fft(length, 0, kMaxFftPasses + 1, radices, &fft.passes);
  fft.length = static_cast<int>(length);
  int span = fft.length;
  for (int i = 0; i < fft.passes; ++i) {
    const int stride = span / radices[i];
    fft.pass[i] = {radices[i], stride, fft.length / span, Divisor(stride)};
    span = stride;
  }
  return fft;
}

#if defined(__CUDACC__) || defined(LATENTDEM_CUDA_EMULATION)

// Where the forward passes leave frequency k.
__device__ inline int fft_position(const BlockFft& fft, int k) {
  int position = 0;
  for (int i = 0; i < fft.passes; ++i) {
    position += k % fft.pass[i].radix * fft.pass[i].stride;
    k /= fft.pass[i].radix;
  }
  return position;
}

// exp(-2 pi i k / n), exact to the last bit but one.
template <class T>
__device__ inline Complex<T> root_of_unity(int k, int n) {
  double sine, cosine;
  sincospi(-2.0 * k / n, &sine, &cosine);
  return {static_cast<T>(cosine), static_cast<T>(sine)};
}

template <class T>
__device__ inline Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
__device__ inline Complex<T> operator-(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
__device__ inline Complex<T> operator*(T s, Complex<T> a) {
  return {s * a.re, s * a.im};
}
// a * w, or a * conj(w).
template <bool Conjugate, class T>
__device__ inline Complex<T> twiddle(Complex<T> a, Complex<T> w) {
  const T im = Conjugate ? -w.im : w.im;
  return {a.re * w.re - a.im * im, a.re * im + a.im * w.re};
}
// a times -i (forward) or +i (inverse).
template <bool Inverse, class T>
__device__ inline Complex<T> quarter_turn(Complex<T> a) {
  if (Inverse) return {-a.im, a.re};
  return {a.im, -a.re};
}

// v <- its transform of length R.
template <int R, bool Inverse, class T>
__device__ inline void butterfly(Complex<T>* v) {
  if constexpr (R == 2) {
    const auto a = v[0];
    v[0] = a + v[1];
    v[1] = a - v[1];
  } else if constexpr (R == 3) {
    constexpr T s = static_cast<T>(0.86602540378443864676);
    const auto sum = v[1] + v[2], turned = quarter_turn<Inverse>(s * (v[1] - v[2]));
    const auto middle = v[0] - T(0.5) * sum;
    v[0] = v[0] + sum;
    v[1] = middle + turned;
    v[2] = middle - turned;
  } else if constexpr (R == 4) {
    const auto a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3];
    const auto d = quarter_turn<Inverse>(v[1] - v[3]);
    v[0] = a + c;
    v[1] = b + d;
    v[2] = a - c;
    v[3] = b - d;
  } else if constexpr (R == 5) {
    constexpr T c1 = static_cast<T>(0.30901699437494742410);
    constexpr T c2 = static_cast<T>(-0.80901699437494742410);
    constexpr T s1 = static_cast<T>(0.95105651629515357212);
    constexpr T s2 = static_cast<T>(0.58778525229247312917);
    const auto a = v[1] + v[4], b = v[2] + v[3], c = v[1] - v[4], d = v[2] - v[3];
    const auto x = v[0] + c1 * a + c2 * b, y = v[0] + c2 * a + c1 * b;
    const auto p = quarter_turn<Inverse>(s1 * c + s2 * d);
    const auto q = quarter_turn<Inverse>(s2 * c - s1 * d);
    v[0] = v[0] + a + b;
    v[1] = x + p;
    v[2] = y + q;
    v[3] = y - q;
    v[4] = x - p;
  } else if constexpr (R == 6) {
    // Two coprime factors need no twiddle factors between them.
    Complex<T> even[3] = {v[0], v[2], v[4]}, odd[3] = {v[3], v[5], v[1]};
    butterfly<3, Inverse>(even);
    butterfly<3, Inverse>(odd);
    for (int i = 0; i < 3; ++i) {
      v[(4 * i) % 6] = even[i] + odd[i];
      v[(4 * i + 3) % 6] = even[i] - odd[i];
    }
  } else {
    static_assert(R == 8, "radices are 2, 3, 4, 5, 6 and 8");
    constexpr T s = static_cast<T>(0.70710678118654752440);
    Complex<T> even[4] = {v[0], v[2], v[4], v[6]}, odd[4] = {v[1], v[3], v[5], v[7]};
    butterfly<4, Inverse>(even);
    butterfly<4, Inverse>(odd);
    odd[1] = s * (odd[1] + quarter_turn<Inverse>(odd[1]));
    odd[2] = quarter_turn<Inverse>(odd[2]);
    odd[3] = s * (quarter_turn<Inverse>(odd[3]) - odd[3]);
    for (int i = 0; i < 4; ++i) {
      v[i] = even[i] + odd[i];
      v[i + 4] = even[i] - odd[i];
    }
  }
}

// `batch` transforms side by side: element e of transform b is data[b * between + e * step].
// Neighbouring threads take neighbouring transforms: with an odd distance between these, no two
// of a warp want the same bank.
template <class T>
struct FftView {
  Complex<T>* data;
  Divisor batch;
  int between, step;
  const Complex<T>* roots;  // exp(-2 pi i k / (length * root_scale))
  int root_scale;
};

// Forwards, elements from `limit` on are taken as zero, and need not exist; backwards they are
// not stored. A barrier must stand before and after.
template <int R, bool Inverse, class T>
__device__ inline void fft_pass(const FftView<T>& view, const FftPass& pass, int length,
                                int limit) {
  const int transforms = static_cast<int>(view.batch.divisor);
  const int root_step = pass.root_step * view.root_scale;
  for (int i = static_cast<int>(threadIdx.x); i < transforms * (length / R);
       i += static_cast<int>(blockDim.x)) {
    const int item = view.batch.divide(i), group = pass.by_stride.divide(item);
    const int offset = item - group * pass.stride, first = group * R * pass.stride + offset;
    Complex<T>* const at = view.data + (i - item * transforms) * view.between;
    Complex<T> v[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int e = first + r * pass.stride;
      v[r] = Inverse || e < limit ? at[e * view.step] : Complex<T>{0, 0};
      if (Inverse && r > 0) v[r] = twiddle<true>(v[r], view.roots[offset * r * root_step]);
    }
    butterfly<R, Inverse>(v);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int e = first + r * pass.stride;
      if (!Inverse && r > 0) v[r] = twiddle<false>(v[r], view.roots[offset * r * root_step]);
      if (!Inverse || e < limit) at[e * view.step] = v[r];
    }
  }
}

// The last forward pass, spectrum(transform, position, value) -> value, and the first inverse
// pass. `load` bounds what exists before, `store` what is wanted; both matter where this is the
// only pass.
template <int R, class T, class Function>
__device__ inline void fft_multiply(const FftView<T>& view, int length, int load, int store,
                                    const Function& spectrum) {
  const int transforms = static_cast<int>(view.batch.divisor);
  for (int i = static_cast<int>(threadIdx.x); i < transforms * (length / R);
       i += static_cast<int>(blockDim.x)) {
    const int item = view.batch.divide(i), transform = i - item * transforms;
    Complex<T>* const at = view.data + transform * view.between;
    Complex<T> v[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int e = item * R + r;
      v[r] = e < load ? at[e * view.step] : Complex<T>{0, 0};
    }
    butterfly<R, false>(v);
#pragma unroll
    for (int r = 0; r < R; ++r) v[r] = spectrum(transform, item * R + r, v[r]);
    butterfly<R, true>(v);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int e = item * R + r;
      if (e < store) at[e * view.step] = v[r];
    }
  }
}

#define LATENTDEM_FOR_RADIX(radix, call) \
  switch (radix) {                       \
    case 2:                              \
      call(2);                           \
      break;                             \
    case 3:                              \
      call(3);                           \
      break;                             \
    case 4:                              \
      call(4);                           \
      break;                             \
    case 5:                              \
      call(5);                           \
      break;                             \
    case 6:                              \
      call(6);                           \
      break;                             \
    default:                             \
      call(8);                           \
  }

// Passes [begin, end) forwards, each followed by a barrier; `limit` is that of pass 0.
template <class T>
__device__ inline void fft_forward(const FftView<T>& view, const BlockFft& fft, int end,
                                   int limit) {
  for (int i = 0; i < end; ++i) {
    const int bound = i == 0 ? limit : fft.length;
#define LATENTDEM_PASS(R) fft_pass<R, false>(view, fft.pass[i], fft.length, bound)
    LATENTDEM_FOR_RADIX(fft.pass[i].radix, LATENTDEM_PASS)
#undef LATENTDEM_PASS
    __syncthreads();
  }
}

// Passes end - 1 to 0 of the inverse, not normalised, each followed by a barrier; what pass 0
// stores ends at `limit`.
template <class T>
__device__ inline void fft_inverse(const FftView<T>& view, const BlockFft& fft, int end,
                                   int limit) {
  for (int i = end - 1; i >= 0; --i) {
    const int bound = i == 0 ? limit : fft.length;
#define LATENTDEM_PASS(R) fft_pass<R, true>(view, fft.pass[i], fft.length, bound)
    LATENTDEM_FOR_RADIX(fft.pass[i].radix, LATENTDEM_PASS)
#undef LATENTDEM_PASS
    __syncthreads();
  }
}

// Forward transform, spectrum(transform, position, value) -> value, inverse transform. The first
// `load` elements exist before, the first `store` are wanted afterwards.
template <class T, class Function>
__device__ inline void fft_filter(const FftView<T>& view, const BlockFft& fft, int load, int store,
                                  const Function& spectrum) {
  const int last = fft.passes - 1;
  fft_forward(view, fft, last, load);
  const int first = last == 0 ? load : fft.length, end = last == 0 ? store : fft.length;
#define LATENTDEM_PASS(R) fft_multiply<R>(view, fft.length, first, end, spectrum)
  LATENTDEM_FOR_RADIX(fft.pass[last].radix, LATENTDEM_PASS)
#undef LATENTDEM_PASS
  __syncthreads();
  fft_inverse(view, fft, last, store);
}
#undef LATENTDEM_FOR_RADIX

// Columns of real numbers, y = 0 .. 2h - 1, hold x[2y] + i x[2y + 1] in h rows; after their
// transforms of length h, these passes make the h + 1 bins of the real transforms of them (row
// position[k] holds bin k, row h bin h), and back, where the inverse gets twice the input.
// roots: exp(-pi i k / h).
template <bool Inverse, class T>
__device__ inline void fft_split_real(const FftView<T>& view, const Complex<T>* roots,
                                      const uint16_t* position, int h) {
  const int columns = static_cast<int>(view.batch.divisor);
  for (int i = static_cast<int>(threadIdx.x); i < columns * (h / 2 + 1);
       i += static_cast<int>(blockDim.x)) {
    const int k = view.batch.divide(i);
    Complex<T>* const column = view.data + (i - k * columns) * view.between;
    Complex<T>* const a = column + position[k] * view.step;
    Complex<T>* const b = column + (k == 0 ? h : static_cast<int>(position[h - k])) * view.step;
    const Complex<T> u = *a;
    if (k == 0) {
      if (Inverse) {
        const T end = b->re;
        *a = {u.re + end, u.re - end};
      } else {
        *a = {u.re + u.im, 0};
        *b = {u.re - u.im, 0};
      }
      continue;
    }
    const Complex<T> v = {b->re, -b->im};
    if (Inverse) {
      const Complex<T> even = u + v, odd = quarter_turn<true>(twiddle<true>(u - v, roots[k]));
      *a = even + odd;
      *b = {even.re - odd.re, odd.im - even.im};
    } else {
      const Complex<T> even = T(0.5) * (u + v);
      const Complex<T> odd = quarter_turn<false>(twiddle<false>(T(0.5) * (u - v), roots[k]));
      *a = even + odd;
      *b = {even.re - odd.re, odd.im - even.im};
    }
  }
}

#endif

}  // namespace latentdem
