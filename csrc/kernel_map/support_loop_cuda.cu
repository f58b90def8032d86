// The half-quadratic loop of one image in one block's shared memory.
#include "common/cuda_fft.h"
#include "common/wrap.h"
#include "kernel_map/kernel_map_cuda.h"
#include "kernel_map/support_solver_cuda.h"

namespace latentdem {
namespace {

constexpr int kMaxThreads = 512;
// Registers for this many of the largest blocks on a multiprocessor.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;

// The grid holds n = 2 h rows of real numbers in h complex ones and the h + 1 rows of their half
// spectrum in the same place, `pitch` apart; an odd number of columns keeps banks apart.
struct Layout {
  int h, m, pitch;
  BlockFft columns, rows;
  Divisor by_m, by_kernel_width, by_rows;
  // Offsets into shared memory, in bytes. Vectors of kernel size: solution, residual, direction,
  // and where there is room split and rhs, which are needed once an iteration only.
  int64_t grid, column_roots, row_roots, symbol, vectors, position, bytes;
  bool resident;
};

template <class T>
Layout make_layout(int64_t kh, int64_t kw, bool resident) {
  Layout l{};
  const int64_t h = next_block_fft_size(kh), m = next_block_fft_size(kw > 1 ? 2 * kw - 1 : 2);
  l.h = static_cast<int>(h);
  l.m = static_cast<int>(m);
  l.pitch = static_cast<int>(m | 1);
  l.columns = make_block_fft(h);
  l.rows = make_block_fft(m);
  l.by_m = Divisor(m);
  l.by_kernel_width = Divisor(kw);
  l.by_rows = Divisor(h + 1);
  l.resident = resident;
  const int64_t cells = (h + 1) * l.pitch, real = sizeof(T);
  int64_t end = 32 * sizeof(double);  // for block_sum
  const auto take = [&](int64_t count, int64_t size) {
    const int64_t begin = end;
    end += count * size;
    return begin;
  };
  l.grid = take(cells, 2 * real);
  l.column_roots = take(2 * h, 2 * real);
  l.row_roots = m == 2 * h ? l.column_roots : take(m, 2 * real);
  l.symbol = take(cells, real);
  l.vectors = take((resident ? 5 : 3) * kh * kw, real);
  l.position = take(h, sizeof(uint16_t));
  l.bytes = end;
  return l;
}

// Element i of a vector of kernel size in the grid: row y is half of complex row y / 2.
template <class T>
struct PackedGrid {
  T* data;
  int pitch, height, width;
  Divisor by_width;
  __device__ int index(int i, int y) const { return 2 * (y / 2 * pitch + i - y * width) + y % 2; }
  __device__ T get(int i) const { return data[index(i, by_width.divide(i))]; }
  __device__ void put(int i, T value) const {
    const int y = by_width.divide(i), at = index(i, y);
    data[at] = value;
    if (y % 2 == 0 && y + 1 == height) data[at + 1] = 0;
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T>)
    support_loop(SupportLoopParams<T> p, Layout l) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  auto* const scratch = reinterpret_cast<double*>(shared);
  auto* const grid = reinterpret_cast<Complex<T>*>(shared + l.grid);
  auto* const column_roots = reinterpret_cast<Complex<T>*>(shared + l.column_roots);
  auto* const row_roots = reinterpret_cast<Complex<T>*>(shared + l.row_roots);
  T* const symbol = reinterpret_cast<T*>(shared + l.symbol);
  T* const vectors = reinterpret_cast<T*>(shared + l.vectors);
  auto* const position = reinterpret_cast<uint16_t*>(shared + l.position);
  const int kh = static_cast<int>(p.kernel_height), kw = static_cast<int>(p.kernel_width);
  const int size = kh * kw, thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < 2 * l.h; i += threads) column_roots[i] = root_of_unity<T>(i, 2 * l.h);
  if (row_roots != column_roots)
    for (int i = thread; i < l.m; i += threads) row_roots[i] = root_of_unity<T>(i, l.m);
  for (int i = thread; i < l.h; i += threads)
    position[i] = static_cast<uint16_t>(fft_position(l.columns, i));

  const int64_t b = blockIdx.x;
  T* const split = l.resident ? vectors + 3 * size : p.split + b * size;
  T* const rhs = vectors + 4 * size;
  const SupportSolver<T, PackedGrid<T>> solver{
      p,
      size,
      vectors,
      vectors + size,
      vectors + 2 * size,
      split,
      l.resident ? rhs : p.rhs + b * size,
      scratch,
      {reinterpret_cast<T*>(grid), l.pitch, kh, kw, l.by_kernel_width}};
  solver.each([&](int i) {
    vectors[i] = p.solution[b * size + i];
    if (!l.resident) return;
    split[i] = p.split[b * size + i];
    rhs[i] = p.rhs[b * size + i];
  });
  const T* const lags = p.autocorrelation + b * (2 * kh - 1) * (2 * kw - 1);
  const auto lag = [&](int y, int x) {
    const int i = y < kh ? y + kh - 1 : y - 2 * l.h + kh - 1;
    const int j = x < kw ? x + kw - 1 : x - l.m + kw - 1;
    return i < 0 || j < 0 ? T(0) : lags[i * (2 * kw - 1) + j];
  };
  for (int i = thread; i < l.h * l.m; i += threads) {
    const int y = l.by_m.divide(i), x = i - y * l.m;
    grid[y * l.pitch + x] = {lag(2 * y, x), lag(2 * y + 1, x)};
  }

  // First the transform of the lags, then one product after the other.
  double energy = 0;
  int iteration = 0, step = 0;
  for (bool lags_first = true;; lags_first = false) {
    __syncthreads();
    const int width = lags_first ? l.m : kw;
    const FftView<T> columns{
        grid, lags_first ? l.by_m : l.by_kernel_width, 1, l.pitch, column_roots, 2};
    const FftView<T> rows{grid, l.by_rows, l.pitch, 1, row_roots, 1};
    fft_forward(columns, l.columns, l.columns.passes, lags_first ? l.h : (kh + 1) / 2);
    fft_split_real<false>(columns, column_roots, position, l.h);
    __syncthreads();
    fft_filter(rows, l.rows, width, kw, [&](int row, int column, Complex<T> value) {
      T& s = symbol[row * l.pitch + column];
      // Symmetric lags have a real spectrum; the transforms' scale goes into it.
      if (lags_first) s = value.re / (static_cast<T>(2 * l.h) * static_cast<T>(l.m));
      return s * value;
    });
    if (lags_first) {
      solver.load();
      continue;
    }
    fft_split_real<true>(columns, column_roots, position, l.h);
    __syncthreads();
    fft_inverse(columns, l.columns, l.columns.passes, (kh + 1) / 2);
    bool more = true;
    if (step == 0)
      energy = solver.start();
    else
      more = solver.step(energy);
    if (more && ++step <= p.steps) continue;
    step = 0;
    if (p.project) solver.project();
    if (++iteration == p.iterations) break;
    solver.load();
  }
  solver.each([&](int i) { p.solution[b * size + i] = vectors[i]; });
}

}  // namespace

template <class T>
bool support_loop_cuda(const SupportLoopParams<T>& p, cudaStream_t stream) {
  const auto limit = static_cast<int64_t>(max_shared_bytes());
  if (p.kernel_height * p.kernel_width > limit) return false;
  Layout l = make_layout<T>(p.kernel_height, p.kernel_width, true);
  if (l.bytes > limit) l = make_layout<T>(p.kernel_height, p.kernel_width, false);
  if (l.bytes > limit) return false;
  // A dozen elements of the spectrum for each thread: enough that barriers do not dominate.
  unsigned threads = 64;
  while (threads < kMaxThreads && static_cast<int>(threads) * 12 < (l.h + 1) * l.m) threads *= 2;
  LDEM_LAUNCH(support_loop<T>, static_cast<unsigned>(p.batch), threads,
              static_cast<size_t>(l.bytes), stream, p, l);
  return true;
}

template bool support_loop_cuda<float>(const SupportLoopParams<float>&, cudaStream_t);
template bool support_loop_cuda<double>(const SupportLoopParams<double>&, cudaStream_t);

}  // namespace latentdem
