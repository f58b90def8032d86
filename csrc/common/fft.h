// Two-dimensional real transforms that stay in the first-level cache, a vector at a time.
//
// A vector holds the same element of several transforms side by side, so that butterflies need
// no shuffles: eight columns (four in double) for the vertical transform, then eight rows of
// the half spectrum for the horizontal one. Spectra keep that layout, [block of rows][column]
// [row in block]: pointwise arithmetic does not care, and one transposition each way suffices.
// Callers run the two halves themselves, block by block, and put their own arithmetic between.
//
// Files that include this are compiled once per instruction set, each with its own name of
// LATENTDEM_ISA; nothing in here may be shared between them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/fft_plan.h"

namespace latentdem {
namespace LATENTDEM_ISA {

// Explicitly aligned, so that structs of them are laid out alike in every build.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(32), aligned(32)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(32), aligned(32)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int64_t kLanes = 32 / sizeof(T);

template <class T>
struct ComplexVec {
  Vec<T> re, im;
};

template <class T>
inline ComplexVec<T> operator+(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
inline ComplexVec<T> operator-(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
inline ComplexVec<T> operator*(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// conj(a) * b
template <class T>
inline ComplexVec<T> conj_times(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re};
}
// a * w, or a * conj(w), for one number w.
template <bool Conjugate, class T>
inline ComplexVec<T> twiddle(ComplexVec<T> a, Complex<T> w) {
  const T im = Conjugate ? -w.im : w.im;
  return {a.re * w.re - a.im * im, a.re * im + a.im * w.re};
}
// a times -i (forward) or +i (inverse): a quarter turn in the transform's direction.
template <bool Inverse, class T>
inline ComplexVec<T> quarter(ComplexVec<T> a) {
  if constexpr (Inverse) return {-a.im, a.re};
  return {a.im, -a.re};
}

// Heap memory aligned to whole vectors; not initialised.
template <class T>
class VectorBuffer {
 public:
  explicit VectorBuffer(int64_t count)
      : data_(static_cast<T*>(
            std::aligned_alloc(64, (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64))) {
    if (data_ == nullptr) std::abort();
  }
  VectorBuffer(const VectorBuffer&) = delete;
  VectorBuffer& operator=(const VectorBuffer&) = delete;
  ~VectorBuffer() { std::free(data_); }
  T* get() const { return data_; }

 private:
  T* data_;
};

// Transposition of kLanes vectors ---------------------------------------------------------

inline void transpose(Vec<float>* r) {
  Vec<float> a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] =
          __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

inline void transpose(Vec<double>* r) {
  const Vec<double> a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6);
  const Vec<double> b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7);
  const Vec<double> c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6);
  const Vec<double> d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

// Butterflies: a[0..R) -> its transform of length R -----------------------------------------

template <bool Inverse, class T>
inline void butterfly4(ComplexVec<T>& a0, ComplexVec<T>& a1, ComplexVec<T>& a2, ComplexVec<T>& a3) {
  const auto t0 = a0 + a2, t1 = a0 - a2, t2 = a1 + a3, t3 = quarter<Inverse>(a1 - a3);
  a0 = t0 + t2;
  a1 = t1 + t3;
  a2 = t0 - t2;
  a3 = t1 - t3;
}

template <int R, bool Inverse, class T>
inline void butterfly(ComplexVec<T>* a) {
  if constexpr (R == 2) {
    const auto t = a[0] - a[1];
    a[0] = a[0] + a[1];
    a[1] = t;
  } else if constexpr (R == 4) {
    butterfly4<Inverse>(a[0], a[1], a[2], a[3]);
  } else if constexpr (R == 8) {
    constexpr T h = static_cast<T>(0.70710678118654752440);
    butterfly4<Inverse>(a[0], a[2], a[4], a[6]);
    butterfly4<Inverse>(a[1], a[3], a[5], a[7]);
    // Odd outputs turned by eighths.
    const auto q1 = quarter<Inverse>(a[3]), q3 = quarter<Inverse>(a[7]);
    const ComplexVec<T> o1{(a[3].re + q1.re) * h, (a[3].im + q1.im) * h};
    const auto o2 = quarter<Inverse>(a[5]);
    const ComplexVec<T> o3{(q3.re - a[7].re) * h, (q3.im - a[7].im) * h};
    const auto e0 = a[0], e1 = a[2], e2 = a[4], e3 = a[6], o0 = a[1];
    a[0] = e0 + o0;
    a[1] = e1 + o1;
    a[2] = e2 + o2;
    a[3] = e3 + o3;
    a[4] = e0 - o0;
    a[5] = e1 - o1;
    a[6] = e2 - o2;
    a[7] = e3 - o3;
  } else {
    // Odd lengths: pairs j and R - j share cosines and sines.
    constexpr double kCos[3][4] = {
        {-0.5, 0, 0, 0},
        {0.30901699437494742, -0.80901699437494742, 0, 0},
        {0.62348980185873353, -0.22252093395631441, -0.90096886790241913, 0}};
    constexpr double kSin[3][4] = {
        {0.86602540378443865, 0, 0, 0},
        {0.95105651629515357, 0.58778525229247313, 0, 0},
        {0.78183148246802981, 0.97492791218182361, 0.43388373911755812, 0}};
    constexpr int kRow = (R - 3) / 2, kPairs = (R - 1) / 2;
    ComplexVec<T> sum[kPairs], difference[kPairs];
    const auto first = a[0];
    for (int j = 0; j < kPairs; ++j) {
      sum[j] = a[j + 1] + a[R - 1 - j];
      difference[j] = a[j + 1] - a[R - 1 - j];
      a[0] = a[0] + sum[j];
    }
    for (int k = 1; k <= kPairs; ++k) {
      auto u = first;
      ComplexVec<T> v{};
      for (int j = 1; j <= kPairs; ++j) {
        const int index = j * k % R;
        const bool upper = index > kPairs;
        const int folded = (upper ? R - index : index) - 1;
        const T c = static_cast<T>(kCos[kRow][folded]);
        const T s = static_cast<T>(upper ? -kSin[kRow][folded] : kSin[kRow][folded]);
        u = {u.re + c * sum[j - 1].re, u.im + c * sum[j - 1].im};
        v = {v.re + s * difference[j - 1].re, v.im + s * difference[j - 1].im};
      }
      v = quarter<Inverse>(v);
      a[k] = u + v;
      a[R - k] = u - v;
    }
  }
}

template <int R, bool Inverse, class T>
inline void fft_pass(const FftStage& stage, const Complex<T>* twiddles, const ComplexVec<T>* in,
                     ComplexVec<T>* out) {
  const int64_t m = stage.m, s = stage.s;
  for (int64_t p = 0; p < m; ++p) {
    const Complex<T>* w = twiddles + p * (R - 1);
    const ComplexVec<T>* source = in + s * p;
    ComplexVec<T>* target = out + s * R * p;
    for (int64_t q = 0; q < s; ++q) {
      ComplexVec<T> a[R];
      for (int j = 0; j < R; ++j) a[j] = source[q + s * m * j];
      butterfly<R, Inverse>(a);
      target[q] = a[0];
      for (int k = 1; k < R; ++k)
        target[q + s * k] = p == 0 ? a[k] : twiddle<Inverse>(a[k], w[k - 1]);
    }
  }
}

// Complex transforms of length plan.n, kLanes side by side, not normalised. `data` and `work`
// are both overwritten; the result lies in the one that is returned.
template <bool Inverse, class T>
inline ComplexVec<T>* fft(const FftPlan<T>& plan, ComplexVec<T>* data, ComplexVec<T>* work) {
  for (int64_t i = 0; i < plan.stage_count; ++i) {
    const FftStage& stage = plan.stages[i];
    const Complex<T>* w = plan.twiddles + stage.twiddle;
    switch (stage.radix) {
      case 2:
        fft_pass<2, Inverse>(stage, w, data, work);
        break;
      case 3:
        fft_pass<3, Inverse>(stage, w, data, work);
        break;
      case 4:
        fft_pass<4, Inverse>(stage, w, data, work);
        break;
      case 5:
        fft_pass<5, Inverse>(stage, w, data, work);
        break;
      case 7:
        fft_pass<7, Inverse>(stage, w, data, work);
        break;
      default:
        fft_pass<8, Inverse>(stage, w, data, work);
        break;
    }
    ComplexVec<T>* swap = data;
    data = work;
    work = swap;
  }
  return data;
}

// Two dimensions ---------------------------------------------------------------------------

// A real grid of n rows (even) and m columns.
template <class T>
struct RealGrid {
  int64_t n, m;
  const FftPlan<T>& columns;  // length n / 2
  const FftPlan<T>& rows;     // length m
  int64_t pitch;              // vectors from one block of rows to the next

  // Where only the first columns ever hold something, `used` of them are kept.
  RealGrid(int64_t height, int64_t width, int64_t used = 0)
      : n(height),
        m(width),
        columns(fft_plan<T>(height / 2)),
        rows(fft_plan<T>(width)),
        pitch(used > 0 ? used : width) {}
  int64_t half() const { return n / 2; }
  // Blocks of kLanes rows of the half spectrum, rows 0..n/2; the last one is filled with zeros.
  int64_t row_blocks() const { return (half() + kLanes<T>) / kLanes<T>; }
  int64_t column_blocks() const { return (pitch + kLanes<T> - 1) / kLanes<T>; }
  int64_t spectrum_size() const { return row_blocks() * pitch; }
  // Vectors of scratch that the functions below need, in each of two buffers.
  int64_t scratch_size() const {
    const int64_t padded = row_blocks() * kLanes<T>;
    return padded > m ? padded : m;
  }
};

// The two buffers.
template <class T>
struct Scratch {
  VectorBuffer<ComplexVec<T>> a, b;
  explicit Scratch(const RealGrid<T>& grid) : a(grid.scratch_size()), b(grid.scratch_size()) {}
};

template <class T>
inline Vec<T> load_columns(const T* row, int64_t count) {
  Vec<T> v{};
  if (count >= kLanes<T>)
    std::memcpy(&v, row, sizeof(v));
  else
    for (int64_t i = 0; i < count; ++i) v[i] = row[i];
  return v;
}

// Lanes of a block of columns that lie on the grid.
template <class T>
inline int64_t lanes_on_grid(const RealGrid<T>& grid, int64_t block) {
  const int64_t rest = grid.pitch - block * kLanes<T>;
  return rest < kLanes<T> ? rest : kLanes<T>;
}

// Vertical half of the forward transform for one block of columns, given as pairs of rows:
// rows[j] holds rows 2 j and 2 j + 1. Both buffers are overwritten.
template <class T>
inline void forward_block(const RealGrid<T>& grid, int64_t block, ComplexVec<T>* rows,
                          ComplexVec<T>* other, ComplexVec<T>* spectrum) {
  const int64_t h = grid.half(), count = lanes_on_grid(grid, block);
  const ComplexVec<T>* z = fft<false>(grid.columns, rows, other);
  for (int64_t first = 0; first <= h; first += kLanes<T>) {
    Vec<T> re[kLanes<T>], im[kLanes<T>];
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      const int64_t k = first + i;
      if (k > h) {
        re[i] = im[i] = Vec<T>{};
        continue;
      }
      // Real transform of even length from the complex one of half that length.
      const ComplexVec<T> p = z[k == h ? 0 : k], q = z[k == 0 ? 0 : h - k];
      const ComplexVec<T> even{p.re + q.re, p.im - q.im};
      const ComplexVec<T> odd{p.im + q.im, q.re - p.re};
      const ComplexVec<T> turned = twiddle<false>(odd, grid.columns.real[k]);
      re[i] = (even.re + turned.re) * T(0.5);
      im[i] = (even.im + turned.im) * T(0.5);
    }
    transpose(re);
    transpose(im);
    ComplexVec<T>* out = spectrum + first / kLanes<T> * grid.pitch + block * kLanes<T>;
    for (int64_t i = 0; i < count; ++i) out[i] = {re[i], im[i]};
  }
}

// The same from `load(y, x, count)`, which gives the kLanes values of row y from column x on, of
// which `count` lie on the grid.
template <class T, class Load>
inline void forward_columns(const RealGrid<T>& grid, int64_t block, const Load& load,
                            ComplexVec<T>* spectrum, ComplexVec<T>* a, ComplexVec<T>* b) {
  const int64_t h = grid.half(), x = block * kLanes<T>, count = lanes_on_grid(grid, block);
  for (int64_t j = 0; j < h; ++j) a[j] = {load(2 * j, x, count), load(2 * j + 1, x, count)};
  forward_block(grid, block, a, b, spectrum);
}

// The vertical half of a block of columns that are all zero.
template <class T>
inline void forward_zero_columns(const RealGrid<T>& grid, int64_t block, ComplexVec<T>* spectrum) {
  const int64_t x = block * kLanes<T>, count = lanes_on_grid(grid, block);
  for (int64_t r = 0; r < grid.row_blocks(); ++r)
    for (int64_t i = 0; i < count; ++i) spectrum[r * grid.pitch + x + i] = ComplexVec<T>{};
}

// Vertical half of the inverse transform for one block of columns; times n m in all. Returns
// the pairs of rows 2 j and 2 j + 1, in one of the two buffers.
template <class T>
inline ComplexVec<T>* inverse_block(const RealGrid<T>& grid, int64_t block,
                                    const ComplexVec<T>* spectrum, ComplexVec<T>* a,
                                    ComplexVec<T>* b) {
  const int64_t h = grid.half(), count = lanes_on_grid(grid, block);
  for (int64_t first = 0; first <= h; first += kLanes<T>) {
    Vec<T> re[kLanes<T>], im[kLanes<T>];
    const ComplexVec<T>* in = spectrum + first / kLanes<T> * grid.pitch + block * kLanes<T>;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      re[i] = i < count ? in[i].re : Vec<T>{};
      im[i] = i < count ? in[i].im : Vec<T>{};
    }
    transpose(re);
    transpose(im);
    for (int64_t i = 0; i < kLanes<T>; ++i) b[first + i] = {re[i], im[i]};
  }
  for (int64_t k = 0; k < h; ++k) {
    const ComplexVec<T> p = b[k], q = b[h - k];
    const ComplexVec<T> even{p.re + q.re, p.im - q.im};
    const ComplexVec<T> odd =
        twiddle<true>(ComplexVec<T>{p.re - q.re, p.im + q.im}, grid.columns.real[k]);
    a[k] = {even.re - odd.im, even.im + odd.re};
  }
  return fft<true>(grid.columns, a, b);
}

// The same into `store(y, x, count, values)`, which takes the kLanes values of row y from column x
// on.
template <class T, class Store>
inline void inverse_columns(const RealGrid<T>& grid, int64_t block, const ComplexVec<T>* spectrum,
                            const Store& store, ComplexVec<T>* a, ComplexVec<T>* b) {
  const int64_t h = grid.half(), x = block * kLanes<T>, count = lanes_on_grid(grid, block);
  const ComplexVec<T>* z = inverse_block(grid, block, spectrum, a, b);
  for (int64_t j = 0; j < h; ++j) {
    store(2 * j, x, count, z[j].re);
    store(2 * j + 1, x, count, z[j].im);
  }
}

}  // namespace LATENTDEM_ISA
}  // namespace latentdem
