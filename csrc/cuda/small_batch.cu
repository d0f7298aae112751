// batch_similarity on CUDA for small batches (N <= 64, the paper's N_b = 36): loss, row means and
// gradient in one launch.
//
// A team of blocks forms S, N x N, in shared memory. On chips with clusters (Hopper and later) a
// team is 16 blocks, or eight where 16 do not fit: each multiplies out its share of the D columns,
// sends its partial S to the others, and they add the parts, always in the same order. Elsewhere a
// team is one block, which multiplies out all columns. Every team forms the whole S and writes its
// own columns of the gradient: at this size that is cheaper than a second launch.
//
// Each team reads N D elements and does N^2 D / 2 multiply-adds for S; all teams together do
// another N^2 D for the gradient, and write its N D elements. The kernel is bound by latency. It
// has no atomics, so the bits are the same from run to run.
#include "cuda/cluster_messages.h"
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cuda/small_batch.h"

namespace bstriplet {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPart = 16;              // columns of the gradient that suit a block best
constexpr int kMostClusters = 8;       // the most teams of clusters: each reads all embeddings
constexpr int kMostBlocks = 64;        // the most teams of one block
constexpr int kLanes = kThreads / kMaxRows;  // adjacent lanes that share a row
constexpr int kSlots = 8;              // vectors, or elements of S, that a lane holds of its row
constexpr int kStride = kMaxRows + 4;  // of the weights: whole 16-byte loads
constexpr int kMostTiles = kMaxRows / 4 * (kMaxRows / 4 + 1) / 2;  // 4 x 4, of the lower triangle

// Columns that fill 16 bytes in the accumulation type.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T of[kVector<T>];
};

// Half precision as it lies in memory. With cuda_fp16.h and cuda_bf16.h the kernel would take a
// tenth longer to compile.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The accumulation type, and the columns of a Vector as they lie in memory.
template <class In>
using Accumulation = std::conditional_t<std::is_same_v<In, double>, double, float>;
template <class In>
struct alignas(sizeof(In) * kVector<Accumulation<In>>) Raw {
  In of[kVector<Accumulation<In>>];
};

// The kernel's arguments: the batch, and how the launch shares out its columns.
struct Arguments : SmallBatch {
  int64_t share, part;  // columns of which a block forms S; of those, columns of its gradient
  int chunk, stride;    // vectors of a row in shared memory at a time; from row to row
  bool vectors;         // whether a vector is a single aligned load from memory
};

__device__ inline int rows_of(const Arguments& args) {
  return static_cast<int>(args.embeddings.rows);  // at most kMaxRows
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// The sum over `lanes` adjacent lanes of a warp, in each of them. All lanes of the warp must call
// it.
template <int lanes, class T>
__device__ inline T sum_over(T x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Vectors that shared memory has room for: a chunk of the columns of all rows.
template <class T>
constexpr int kRoom = (sizeof(T) == 4 ? 27 : 9) * kMaxRows;

template <class T>
struct Shared {
  Vector<T> columns[kRoom<T>];  // [row][vector]
  union {
    struct {
      alignas(16) T s[kMostTiles * 16];  // by tiles, those on the diagonal first
      Vector<T> parts[kMostTiles * 16 / kVector<T>];  // [vector of s to add][block of the cluster]
    };
    alignas(16) T weights[kMaxRows][kStride];
  };
  uint64_t parts_are_here, s_is_here;  // barriers that count a cluster's messages
  T inverse[kMaxRows];
  T per_positive[kMaxRows], per_negative[kMaxRows], loss[kMaxRows];
  int64_t label[kMaxRows];
};

// The index of S_ij of n rows in shared.s, which holds whole tiles, on the diagonal too.
__device__ inline int element(int n, int i, int j) {
  const int high = max(i, j), low = min(i, j), top = high / 4, left = low / 4;
  const int tile = top == left ? top : (n + 3) / 4 + top * (top - 1) / 2 + left;
  return tile * 16 + high % 4 * 4 + low % 4;
}

// Vectors of a row in the first chunk of columns [from, end).
template <class T>
__device__ inline int vectors_of(const Arguments& args, int64_t from, int64_t end) {
  return static_cast<int>(
      max(int64_t{0}, min(int64_t{args.chunk}, (end - from + kVector<T> - 1) / kVector<T>)));
}

// Starts to load the first chunk of columns [from, end), zeros after `end`; the caller goes on
// meanwhile. The lanes of a row take adjacent vectors.
template <class In>
__device__ inline void load(const Arguments& args, int64_t from, int64_t end,
                            Raw<In> (&held)[kSlots]) {
  constexpr int vector = kVector<Accumulation<In>>;
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int count = row < rows_of(args) ? vectors_of<Accumulation<In>>(args, from, end) : 0;
  const int64_t at = from + lane * vector;
  const StridedRows& x = args.embeddings;
  const In* const source =
      static_cast<const In*>(x.data) + row * x.row_stride + at * x.column_stride;
  if (args.vectors) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (lane + k * kLanes >= count) continue;
      held[k] = *reinterpret_cast<const Raw<In>*>(source + k * kLanes * vector);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
#pragma unroll
      for (int c = 0; c < vector; ++c) {
        const int ahead = k * kLanes * vector + c;
        const bool inside = lane + k * kLanes < count && at + ahead < end;
        held[k].of[c] = inside ? source[ahead * x.column_stride] : In{};
      }
    }
  }
}

// Widens what `load` brought, `count` vectors of every row, into shared.columns.
template <class In, class T>
__device__ inline void store(const Arguments& args, int count, const Raw<In> (&held)[kSlots],
                             Shared<T>& shared) {
  const int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (row >= rows_of(args)) return;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (lane + k * kLanes >= count) continue;
    Vector<T> wide;
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c) wide.of[c] = widen(held[k].of[c]);
    shared.columns[row * args.stride + lane + k * kLanes] = wide;
  }
}

// Adds the values of `groups` lanes of a warp, which are `apart` lanes apart. Afterwards a lane's
// values [0, size / groups) are the sums of those from group * size / groups on. Each step
// exchanges halves, so that few values are sent.
template <int groups, int apart, int size, class T, int all>
__device__ inline void add_over_groups(int group, T (&values)[all]) {
  if constexpr (groups > 1) {
    const bool upper = group & groups / 2;
#pragma unroll
    for (int k = 0; k < size / 2; ++k) {
      const T sent = upper ? values[k] : values[k + size / 2];
      const T own = upper ? values[k + size / 2] : values[k];
      values[k] = own + __shfl_xor_sync(0xffffffffu, sent, groups / 2 * apart);
    }
    add_over_groups<groups / 2, apart, size / 2>(group, values);
  }
}

// Multiplies out columns [begin, end), of which `held` has the first chunk. The raw products go
// into shared.s, or to the blocks of the cluster that add them. `groups` adjacent lanes share a 4 x
// 4 tile of the lower triangle: each takes every groups-th vector.
template <int groups, int cluster, class In, class T>
__device__ void dots(const Arguments& args, int64_t begin, int64_t end,
                     Raw<In> (&held)[kSlots], Shared<T>& shared) {
  const int down = (rows_of(args) + 3) / 4;
  const int group = threadIdx.x % groups, tile = threadIdx.x / groups;
  const bool active = tile < down * (down + 1) / 2;
  int top = tile, left = tile;
  if (tile >= down) {
    for (top = 1, left = tile - down; left >= top; ++top) left -= top;
  }
  const Vector<T>* const a = shared.columns + 4 * top * args.stride;
  const Vector<T>* const b = shared.columns + 4 * left * args.stride;
  const int64_t step = args.chunk * kVector<T>;
  T acc[16] = {};
  for (int64_t from = begin;; from += step) {
    const int count = vectors_of<T>(args, from, end);
    store(args, count, held, shared);
    __syncthreads();
    if (from + step < end) load(args, from + step, end, held);
    if (active) {
#pragma unroll 1
      for (int v = group; v < count; v += groups) {
        Vector<T> x[4], y[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          x[k] = a[k * args.stride + v];
          y[k] = b[k * args.stride + v];
        }
#pragma unroll
        for (int c = 0; c < kVector<T>; ++c) {
#pragma unroll
          for (int k = 0; k < 16; ++k) acc[k] += x[k / 4].of[c] * y[k % 4].of[c];
        }
      }
    }
    if (from + step >= end) break;
    __syncthreads();
  }
  add_over_groups<groups, 1, 16>(group, acc);
  constexpr int own = 16 / groups;
  const int at = tile * 16 + group * own;
  if constexpr (cluster > 1) {
    wait_for_start();
    if (!active) return;
    constexpr int size = own < kVector<T> ? own : kVector<T>;
    const int rank = static_cast<int>(blockIdx.x % cluster);
#pragma unroll
    for (int k = 0; k < own; k += size) {
      const int vector = (at + k) / kVector<T>, to = vector % cluster;
      Vector<T>& target = shared.parts[vector / cluster * cluster + rank];
      send<size * sizeof(T)>(acc + k, target.of + (at + k) % kVector<T>, to, shared.parts_are_here);
    }
  } else if (active) {
#pragma unroll
    for (int k = 0; k < own; ++k) shared.s[at + k] = acc[k];
  }
}

// The same, with as many lanes for a tile as there are threads for.
template <int cluster, class In, class T>
__device__ void dots(const Arguments& args, int64_t begin, int64_t end,
                     Raw<In> (&held)[kSlots], Shared<T>& shared) {
  const int down = (rows_of(args) + 3) / 4, tiles = down * (down + 1) / 2;
  if (8 * tiles <= kThreads) {
    dots<8, cluster>(args, begin, end, held, shared);
  } else if (4 * tiles <= kThreads) {
    dots<4, cluster>(args, begin, end, held, shared);
  } else {
    dots<2, cluster>(args, begin, end, held, shared);
  }
}

template <class T>
__device__ inline T inverse_norm(T squared, T squared_eps) {
  return squared <= squared_eps ? T(0)
         : isinf(squared)       ? static_cast<T>(NAN)  // 1 / inf = 0 would hide it
                                : rsqrt(squared);
}

// Vectors that hold S of n rows.
template <class T>
__device__ inline int vectors_of_s(int n) {
  const int down = (n + 3) / 4;
  return down * (down + 1) / 2 * 16 / kVector<T>;
}

// Tells the barriers how many bytes `dots` and `add_over_cluster` of all blocks send to this one.
template <int cluster, class T>
__device__ inline void expect_messages(int n, Shared<T>& shared) {
  const int count = vectors_of_s<T>(n), rank = static_cast<int>(blockIdx.x % cluster);
  const int to_add = max(0, count - rank + cluster - 1) / cluster;
  expect(shared.parts_are_here, to_add * cluster * 16);
  expect(shared.s_is_here, count * 16 + n * static_cast<int>(sizeof(T)));
}

// Adds the cluster's partial S and sends the sums, and 1 over the norms, to every block. Of 16
// blocks each adds every 16th vector, so that little crosses between them. 16 lanes share a vector:
// each reads the part that one block has sent, and sends the sum to that block.
template <int cluster, class T>
__device__ void add_over_cluster(int n, T squared_eps, Shared<T>& shared) {
  const int count = vectors_of_s<T>(n), lane = threadIdx.x % cluster;
  const int rank = static_cast<int>(blockIdx.x % cluster);
  // Begins with the last warps, since `row_of` keeps the first ones busy. All lanes of a warp run
  // the same number of rounds, as shuffles need.
  const int start = (kWarps - 1 - static_cast<int>(threadIdx.x) / 32) * 32;
  if (start < count) wait_for(shared.parts_are_here);
  for (int from = start; from < count; from += kThreads) {
    const int first = from + threadIdx.x % 32 / cluster * cluster, at = first + rank;
    Vector<T> sum{};
    if (at < count) sum = shared.parts[first + lane];
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c) sum.of[c] = sum_over<cluster>(sum.of[c]);
    if (at < count) send<16>(&sum, shared.s + at * kVector<T>, lane, shared.s_is_here);
    const int row = at * kVector<T> / 4, diagonal = row % 4 - at * kVector<T> % 4;
    if (row >= n || diagonal < 0 || diagonal >= kVector<T>) continue;
    T squared = sum.of[0];
#pragma unroll
    for (int c = 1; c < kVector<T>; ++c) squared = c == diagonal ? sum.of[c] : squared;
    const T norm = inverse_norm(squared, squared_eps);
    send<sizeof(T)>(&norm, shared.inverse + row, lane, shared.s_is_here);
  }
}

template <class T>
__device__ inline T phi_slope(T s, bool is_signed) {
  return is_signed ? (s < 0 ? -s : s) : s;  // half of phi'; s times it is phi
}

// What a lane can tell about its row without S. Its columns are lane, lane + kLanes, ...
template <class T>
struct Row {
  unsigned positives;            // bit k: column lane + k kLanes is a positive
  T per_positive, per_negative;  // 1 over the row's counts; 0 where there are none
  T upstream;
  int at[kSlots];                // indices into shared.s
};

template <class T>
__device__ Row<T> row_of(const Arguments& args, const Shared<T>& shared) {
  const int i = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, n = rows_of(args);
  Row<T> row{0, 0, 0, static_cast<T>(args.spec.scale), {}};
  int positives = 0;
  if (i < n) {
    if (args.upstream != nullptr) {
      row.upstream = static_cast<const T*>(args.upstream)[i * args.upstream_stride];
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (k * kLanes >= n) break;
      const int j = lane + k * kLanes;
      row.at[k] = element(n, i, j);
      if (j < n && j != i && shared.label[j] == shared.label[i]) {
        row.positives |= 1u << k;
        ++positives;
      }
    }
  }
  positives = sum_over<kLanes>(positives);
  const int negatives = n - 1 - positives;
  if (positives > 0) row.per_positive = T(1) / static_cast<T>(positives);
  if (negatives > 0) row.per_negative = T(1) / static_cast<T>(negatives);
  return row;
}

// Computes Eq. 3 for every row: the means, h_i, and a_i over its counts. `s` becomes the lane's
// cosines.
template <class T>
__device__ void row_means(const Arguments& args, const Row<T>& row, bool writes,
                          T (&s)[kSlots], Shared<T>& shared) {
  const int i = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, n = rows_of(args);
  T same = 0, other = 0;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k * kLanes >= n) break;
    const int j = lane + k * kLanes;
    if (i >= n || j >= n || j == i) continue;
    s[k] = shared.s[row.at[k]] * shared.inverse[i] * shared.inverse[j];
    const T phi = s[k] * phi_slope(s[k], args.spec.is_signed);
    (row.positives >> k & 1 ? same : other) += phi;
  }
  const T positive = sum_over<kLanes>(same) * row.per_positive;
  const T negative = sum_over<kLanes>(other) * row.per_negative;
  if (i >= n || lane != 0) return;
  const T sigma = static_cast<T>(args.spec.sigma);
  const T h = static_cast<T>(args.spec.margin) - positive + sigma * negative;
  const bool inactive = h <= 0;  // false for NaN, which counts as active
  const T a = inactive ? T(0) : row.upstream;
  shared.loss[i] = inactive ? T(0) : h;
  shared.per_positive[i] = a * row.per_positive;
  shared.per_negative[i] = sigma * a * row.per_negative;
  if (writes) {
    static_cast<T*>(args.means)[i] = positive;
    static_cast<T*>(args.means)[n + i] = negative;
  }
}

// The weights of dL/df_i = sum_j weights[j][i] f_j / |f_i|: w_ij phi'(s_ij) / |f_j|, on the
// diagonal -sum_j w_ij phi'(s_ij) s_ij / |f_i|.
template <class T>
__device__ void weigh(const Arguments& args, const Row<T>& row, const T (&s)[kSlots],
                      Shared<T>& shared) {
  const int j = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, n = rows_of(args);
  T along = 0;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if (k * kLanes >= n) break;
    const int i = lane + k * kLanes;
    if (j >= n || i >= n || i == j) continue;
    const T weight = row.positives >> k & 1 ? -(shared.per_positive[i] + shared.per_positive[j])
                                           : shared.per_negative[i] + shared.per_negative[j];
    const T slope = 2 * weight * phi_slope(s[k], args.spec.is_signed);
    along += slope * s[k];
    shared.weights[j][i] = slope * shared.inverse[j];
  }
  along = sum_over<kLanes>(along);
  if (j < n && lane == 0) shared.weights[j][j] = -along * shared.inverse[j];
}

// Writes dL/df in columns [begin, end), whose vectors are in `columns`. A warp has 4 rows. Four
// lanes share a vector of columns: each adds up every fourth embedding for all 4 rows, and ends
// with one row.
template <class T>
__device__ void gradient(const Arguments& args, int64_t begin, int64_t end,
                         const Vector<T>* columns, const Shared<T>& shared) {
  constexpr int vector = kVector<T>;
  static_assert(kMaxRows <= 4 * kWarps);
  const int n = rows_of(args), across = vectors_of<T>(args, begin, end);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 8;
  const int top = 4 * warp;
  if (top >= n) return;
  for (int from = 0; from < across; from += 8) {
    const int v = from + lane % 8;
    T acc[4 * vector] = {};
    if (v < across) {
#pragma unroll 4
      for (int j = group; j < n; j += 4) {
        const Vector<T> f = columns[j * args.stride + v];
        T weight[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) weight[r] = shared.weights[j][top + r];
#pragma unroll
        for (int k = 0; k < 4 * vector; ++k) acc[k] += weight[k / vector] * f.of[k % vector];
      }
    }
    add_over_groups<4, 8, 4 * vector>(group, acc);
    const int i = top + group;
    if (v >= across || i >= n) continue;
    const int64_t d = begin + v * vector;
    T* const target = static_cast<T*>(args.grad) + i * args.embeddings.columns + d;
    Vector<T> scaled;
#pragma unroll
    for (int c = 0; c < vector; ++c) scaled.of[c] = acc[c] * shared.inverse[i];
    if (args.vectors) {
      *reinterpret_cast<Vector<T>*>(target) = scaled;
    } else {
#pragma unroll
      for (int c = 0; c < vector; ++c) {
        if (d + c < end) target[c] = scaled.of[c];
      }
    }
  }
}

template <class In, class T, int cluster>
__device__ void batch_similarity(const Arguments& args) {
  __shared__ Shared<T> shared;
  static_assert(sizeof(shared) <= 48 * 1024, "the static shared memory of a block on every chip");
  static_assert(kMaxRows <= kLanes * kSlots && kMaxRows <= kThreads);
  const int n = rows_of(args), rank = blockIdx.x % cluster, team = blockIdx.x / cluster;
  const int64_t begin = rank * args.share, end = min(args.embeddings.columns, begin + args.share);
  Raw<In> held[kSlots];
  load(args, begin, end, held);
  const int own = threadIdx.x;
  if constexpr (cluster > 1) {
    if (own == kThreads - 1) expect_messages<cluster>(n, shared);
    start_messages();
  }
  if (own < n) shared.label[own] = args.labels[own * args.label_stride];
  dots<cluster>(args, begin, end, held, shared);
  const T squared_eps = static_cast<T>(args.spec.squared_eps);
  if constexpr (cluster > 1) add_over_cluster<cluster>(n, squared_eps, shared);
  const bool has_rows = own / 32 * (32 / kLanes) < n;  // the same for all lanes of a warp
  Row<T> row{};
  if (has_rows) row = row_of(args, shared);
  if constexpr (cluster > 1) {
    wait_for(shared.s_is_here);
  } else {
    __syncthreads();
    if (own < n) shared.inverse[own] = inverse_norm(shared.s[element(n, own, own)], squared_eps);
    __syncthreads();
  }
  T s[kSlots];
  if (has_rows) row_means(args, row, blockIdx.x == 0, s, shared);
  __syncthreads();
  if (args.spec.gradient) {
    if (has_rows) weigh(args, row, s, shared);
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x / 32 == kWarps - 1) {  // the warp with the least to do next
    const int lane = threadIdx.x % 32;
    double total = 0;
    for (int i = lane; i < n; i += 32) total += static_cast<double>(shared.loss[i]);
    const double scale = args.spec.scale;
    total = sum_over<32>(total);
    if (lane == 0) *static_cast<T*>(args.loss) = static_cast<T>(scale * total);
  }
  if (!args.spec.gradient) return;
  const int64_t first = begin + team * args.part, last = min(end, first + args.part);
  const int64_t step = args.chunk * kVector<T>;
  if (args.share <= step) {
    gradient(args, first, last, shared.columns + team * args.part / kVector<T>, shared);
    return;
  }
  for (int64_t from = first; from < last; from += step) {
    load(args, from, last, held);
    store(args, vectors_of<T>(args, from, last), held, shared);
    __syncthreads();
    gradient(args, from, last, shared.columns, shared);
    if (from + step < last) __syncthreads();
  }
}

template <class In, class T, int cluster>
__global__ void __launch_bounds__(kThreads, 1) batch_similarity_kernel(const Arguments args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (cluster > 1) {
    __trap();  // never launched on a chip without clusters
  } else
#endif
    batch_similarity<In, T, cluster>(args);
}

// How many clusters of the kernel fit the current device at a time. That is 0 on a chip without
// clusters, and where there are too few multiprocessors, as in a small slice of a GPU.
int ask_for_clusters(int device, const void* kernel, const cudaLaunchConfig_t& config) {
  int supported = 0, found = 0;
  const auto not_portable = cudaFuncAttributeNonPortableClusterSizeAllowed;  // 16 blocks
  if (cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
      (supported == 0 ||
       (cudaFuncSetAttribute(kernel, not_portable, 1) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess))) {
    return found;
  }
  cudaGetLastError();  // clears it: the plain form runs anywhere, and reports what is truly wrong
  return 0;
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class In>
cudaError_t launch_as(const SmallBatch& batch, int device, void* stream) {
  using T = Accumulation<In>;
  constexpr int vector = kVector<T>;
  const StridedRows& x = batch.embeddings;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  struct Form {
    void (*kernel)(Arguments);
    int team_size;
    std::atomic<int> known[128];  // by device: 1 + the clusters that fit, or 0: not asked
  };
  static Form forms[] = {{batch_similarity_kernel<In, T, 16>, 16, {}},
                         {batch_similarity_kernel<In, T, 8>, 8, {}}};
  auto kernel = batch_similarity_kernel<In, T, 1>;
  int64_t team_size = 1, most = kMostBlocks;
  for (Form& form : forms) {
    cluster.val.clusterDim.x = form.team_size;
    config.gridDim = dim3(form.team_size);
    std::atomic<int>& answer = form.known[device % 128];
    if (answer.load(std::memory_order_relaxed) == 0) {
      const void* const asked_for = reinterpret_cast<const void*>(form.kernel);
      answer.store(1 + ask_for_clusters(device, asked_for, config), std::memory_order_relaxed);
    }
    const int clusters = answer.load(std::memory_order_relaxed) - 1;
    if (clusters == 0) continue;
    kernel = form.kernel;
    team_size = form.team_size;
    most = std::min(clusters, kMostClusters);
    break;
  }
  if (team_size == 1) config.numAttrs = 0;
  const int64_t vectors = quotient_up(quotient_up(x.columns, team_size), vector);
  const int64_t wanted = batch.spec.gradient ? quotient_up(vectors * vector, kPart) : 1;
  const int64_t teams = wanted < most ? wanted : most;
  config.gridDim = dim3(static_cast<unsigned>(team_size * teams));
  // Rows an odd number of vectors apart have the fewest bank conflicts.
  const int64_t room = kRoom<T> / (4 * quotient_up(x.rows, 4));
  const int64_t longest = (std::min<int64_t>(room, kSlots * kLanes) - 1) / 2 * 2 + 1;
  const int64_t chunk = quotient_up(vectors, quotient_up(vectors, longest));
  const auto address = reinterpret_cast<uintptr_t>(x.data);
  const bool aligned = x.column_stride == 1 && x.row_stride % vector == 0 &&
                       x.columns % vector == 0 && address % sizeof(Raw<In>) == 0;
  const Arguments args{
      batch,
      vectors * vector,
      quotient_up(vectors, teams) * vector,
      static_cast<int>(chunk),
      static_cast<int>(chunk | 1),
      aligned,
  };
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args);
  if (launched != cudaSuccess) cudaGetLastError();  // so that no later call finds this error
  return launched;
}

}  // namespace

const char* launch(const SmallBatch& batch, int device, void* stream) {
  const auto run = [&] {
    switch (batch.embeddings.element) {
      case Element::float64:
        return launch_as<double>(batch, device, stream);
      case Element::float32:
        return launch_as<float>(batch, device, stream);
      case Element::float16:
        return launch_as<Half>(batch, device, stream);
      default:
        return launch_as<BFloat16>(batch, device, stream);
    }
  };
  const cudaError_t error = run();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace bstriplet
