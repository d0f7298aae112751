// batch_similarity on CUDA for small batches (N <= 64, the paper's N_b = 36): loss, row means and
// gradient in one launch.
//
// A team of blocks forms S, N x N, in shared memory. Where eight blocks can be a cluster (Hopper
// and later) they are the team: each multiplies out its share of the D columns, and the partial S
// are added over distributed shared memory, in the blocks' order. Elsewhere a block is a team of
// its own and multiplies out all columns. Several teams form the same S, so that the columns of the
// gradient are spread over more multiprocessors: at this size that is cheaper than a second launch.
//
// Reads N D elements for each team and writes N D; N^2 D / 2 multiply-adds for S, for each team,
// and N^2 D for the gradient; bound by latency. No atomics: the same bits from run to run.
#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#include "cuda_launch.h"

namespace bstriplet {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCluster = 8;            // the largest that is portable
constexpr int kPart = 32;              // columns of the gradient that a block had best write
constexpr int kMostClusters = 8;       // teams, however many columns: each reads all embeddings
constexpr int kMostBlocks = 64;        // teams where there are no clusters
constexpr int kLanes = kThreads / kMaxRows;  // of a warp, that have a row
constexpr int kStride = kMaxRows + 4;  // of shared rows: whole 16-byte loads, fewer conflicts

template <class In>
struct Arguments {
  const In* embeddings;
  int64_t row_stride, column_stride;
  const int64_t* labels;
  int64_t label_stride;
  const void* upstream;  // of the accumulation type, or null
  int64_t upstream_stride;
  int rows;
  int64_t depth;
  int64_t share, part;  // columns of which a block forms S; of those, columns of its gradient
  double margin, sigma, squared_eps, scale;
  bool is_signed, gradient;
  void *loss, *means, *grad;  // of the accumulation type
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// Over `lanes` adjacent lanes of a warp, all of which call it; each has the sum.
template <int lanes, class T>
__device__ inline T sum_over(T x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Columns of the embeddings that are in shared memory at a time.
template <class T>
constexpr int kChunk = sizeof(T) == 4 ? 64 : 16;

template <class T>
struct Shared {
  alignas(16) T chunk[kChunk<T>][kStride];  // transposed: [column][row]
  alignas(16) T s[kMaxRows][kStride];       // S, then the weights
  T inverse[kMaxRows];
  T per_positive[kMaxRows], per_negative[kMaxRows], loss[kMaxRows];
  int64_t label[kMaxRows];
};

template <class T>
constexpr int kElements = kMaxRows * kChunk<T> / kThreads;  // of a chunk, for each thread

// Calls visit(k, row, column) for each of a thread's elements. A warp has 8 columns of 4 rows:
// whole 32-byte sectors of memory, and a bank of shared memory for each lane.
template <class T, class Visit>
__device__ inline void for_each_element(Visit visit) {
  constexpr int across = kChunk<T> / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kElements<T>; ++k) {
    const int patch = warp + k * kWarps;
    visit(k, patch / across * 4 + lane / 8, patch % across * 8 + lane % 8);
  }
}

// The columns [from, from + kChunk) of the embeddings; zeros from column `end` and row N on.
template <class In, class T>
__device__ inline void load(const Arguments<In>& args, int64_t from, int64_t end,
                            T (&elements)[kElements<T>]) {
  for_each_element<T>([&](int k, int row, int column) {
    const bool inside = row < args.rows && from + column < end;
    const int64_t at = row * args.row_stride + (from + column) * args.column_stride;
    elements[k] = inside ? static_cast<T>(widen(args.embeddings[at])) : T(0);
  });
}

template <class T>
__device__ inline void store(const T (&elements)[kElements<T>], Shared<T>& shared) {
  for_each_element<T>([&](int k, int row, int column) { shared.chunk[column][row] = elements[k]; });
}

// Adds the 4 x 4 tiles of `groups` adjacent lanes. A lane's tile[0 .. 16 / groups) are then the sums
// of the elements from group * 16 / groups on: each step exchanges halves, so few values are sent.
template <int groups, int size = 16, class T>
__device__ inline void add_over_groups(int group, T (&tile)[16]) {
  if constexpr (groups > 1) {
    const bool upper = group & groups / 2;
#pragma unroll
    for (int k = 0; k < size / 2; ++k) {
      const T sent = upper ? tile[k] : tile[k + size / 2];
      const T own = upper ? tile[k + size / 2] : tile[k];
      tile[k] = own + __shfl_xor_sync(0xffffffffu, sent, groups / 2);
    }
    add_over_groups<groups / 2, size / 2>(group, tile);
  }
}

// Raw products of columns [begin, end) into shared.s, both triangles. `groups` adjacent lanes share
// a 4 x 4 tile of the lower triangle: each takes every groups-th column.
template <int groups, class In, class T>
__device__ void dots(const Arguments<In>& args, int64_t begin, int64_t end, Shared<T>& shared) {
  constexpr int chunk = kChunk<T>;
  T next[kElements<T>];
  load(args, begin, end, next);
  const int n = args.rows, down = (n + 3) / 4;
  const int group = threadIdx.x % groups, tile = threadIdx.x / groups;
  const bool active = tile < down * (down + 1) / 2;
  int top = 0;
  while ((top + 1) * (top + 2) / 2 <= tile) ++top;
  const int left = tile - top * (top + 1) / 2;
  T acc[16] = {};
  for (int64_t from = begin; from < end; from += chunk) {
    store(next, shared);
    __syncthreads();
    if (from + chunk < end) load(args, from + chunk, end, next);
    if (active) {
#pragma unroll(sizeof(T) == 4 ? 4 : 2)
      for (int column = group; column < min(int64_t{chunk}, end - from); column += groups) {
        T a[4], b[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[k] = shared.chunk[column][4 * top + k];
          b[k] = shared.chunk[column][4 * left + k];
        }
#pragma unroll
        for (int k = 0; k < 16; ++k) acc[k] += a[k / 4] * b[k % 4];
      }
    }
    __syncthreads();
  }
  add_over_groups<groups>(group, acc);
  if (!active) return;
#pragma unroll
  for (int k = 0; k < 16 / groups; ++k) {
    const int at = group * (16 / groups) + k;
    const int row = 4 * top + at / 4, column = 4 * left + at % 4;
    if (row < n && column <= row) {
      shared.s[row][column] = acc[k];
      shared.s[column][row] = acc[k];
    }
  }
}

// Among as many lanes as there are threads for.
template <class In, class T>
__device__ void dots(const Arguments<In>& args, int64_t begin, int64_t end, Shared<T>& shared) {
  const int down = (args.rows + 3) / 4, tiles = down * (down + 1) / 2;
  if (8 * tiles <= kThreads) {
    dots<8>(args, begin, end, shared);
  } else if (4 * tiles <= kThreads) {
    dots<4>(args, begin, end, shared);
  } else {
    dots<2>(args, begin, end, shared);
  }
}

// Adds the cluster's partial S, in the order of its blocks, into every block's shared.s. A block
// adds an eighth of the elements and writes them to all, so that little crosses between the blocks;
// a thread has one element at most, and all its eight remote loads are under way together.
template <class T>
__device__ void add_over_cluster(int n, Shared<T>& shared) {
  static_assert(kMaxRows * kMaxRows <= kCluster * kThreads);
  const int per_block = (n * n + kCluster - 1) / kCluster;
  const int thread = threadIdx.x;
  const int at = static_cast<int>(__clusterRelativeBlockRank()) * per_block + thread;
  const int row = at / n, column = at % n;
  T* element[kCluster];  // in each block
#pragma unroll
  for (int rank = 0; rank < kCluster; ++rank) {
    Shared<T>* const of_rank = static_cast<Shared<T>*>(__cluster_map_shared_rank(&shared, rank));
    element[rank] = &of_rank->s[0][0] + row * kStride + column;
  }
  // What cooperative_groups calls; its header takes longer to compile than all that is here.
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  if (thread < per_block && at < n * n) {
    T partial[kCluster];
#pragma unroll
    for (int rank = 0; rank < kCluster; ++rank) partial[rank] = *element[rank];
    T total = partial[0];
#pragma unroll
    for (int rank = 1; rank < kCluster; ++rank) total += partial[rank];
#pragma unroll
    for (int rank = 0; rank < kCluster; ++rank) *element[rank] = total;
  }
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

template <class T>
__device__ inline T phi_slope(T s, bool is_signed) {
  return is_signed ? (s < 0 ? -s : s) : s;  // half of phi'; s times it is phi
}

// Eq. 3 for every row: the means, h_i, and a_i over its counts. `kLanes` lanes have a row.
template <class In, class T>
__device__ void row_means(const Arguments<In>& args, bool writes, Shared<T>& shared) {
  const int i = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, n = args.rows;
  T same = 0, other = 0;
  int positives = 0;
  for (int j = lane; i < n && j < n; j += kLanes) {
    const T s = shared.s[i][j] * shared.inverse[i] * shared.inverse[j];
    const T phi = s * phi_slope(s, args.is_signed);
    if (j == i) continue;
    if (shared.label[j] == shared.label[i]) {
      same += phi;
      ++positives;
    } else {
      other += phi;
    }
  }
  same = sum_over<kLanes>(same);
  other = sum_over<kLanes>(other);
  positives = sum_over<kLanes>(positives);
  if (i >= n || lane != 0) return;
  const int negatives = n - 1 - positives;
  const T positive = same / static_cast<T>(max(1, positives));
  const T negative = other / static_cast<T>(max(1, negatives));
  const T sigma = static_cast<T>(args.sigma);
  const T h = static_cast<T>(args.margin) - positive + sigma * negative;
  const bool inactive = h <= 0;  // false for NaN, which counts as active
  const T* upstream = static_cast<const T*>(args.upstream);
  const T a = inactive              ? T(0)
              : upstream == nullptr ? static_cast<T>(args.scale)
                                    : upstream[i * args.upstream_stride];
  shared.loss[i] = inactive ? T(0) : h;
  shared.per_positive[i] = positives > 0 ? a / static_cast<T>(positives) : T(0);
  shared.per_negative[i] = negatives > 0 ? sigma * a / static_cast<T>(negatives) : T(0);
  if (writes) {
    static_cast<T*>(args.means)[i] = positive;
    static_cast<T*>(args.means)[n + i] = negative;
  }
}

// shared.s becomes the matrix W of dL/df_i = sum_j W_ij f_j / |f_i|: w_ij phi'(s_ij) / |f_j|, on
// the diagonal -sum_j w_ij phi'(s_ij) s_ij / |f_i|. Zeros fill the rows up to whole 16-byte loads.
template <class In, class T>
__device__ void weigh(const Arguments<In>& args, Shared<T>& shared) {
  const int i = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, n = args.rows;
  T along = 0;
  for (int j = lane; i < n && j < n; j += kLanes) {
    if (j == i) continue;
    const T s = shared.s[i][j] * shared.inverse[i] * shared.inverse[j];
    const T weight = shared.label[j] == shared.label[i]
                         ? -(shared.per_positive[i] + shared.per_positive[j])
                         : shared.per_negative[i] + shared.per_negative[j];
    const T slope = 2 * weight * phi_slope(s, args.is_signed);
    along += slope * s;
    shared.s[i][j] = slope * shared.inverse[j];
  }
  along = sum_over<kLanes>(along);
  if (i >= n) return;
  if (lane == 0) shared.s[i][i] = -along * shared.inverse[i];
  if (lane < (-n & 3)) shared.s[i][n + lane] = 0;
}

// dL/df in columns [begin, end), of which shared.chunk has the first. A thread has 4 rows of 2
// columns: 32 multiply-adds for every 6 loads of 16 bytes.
template <class In, class T>
__device__ void gradient(const Arguments<In>& args, int64_t begin, int64_t end,
                         Shared<T>& shared) {
  constexpr int chunk = kChunk<T>;
  static_assert(chunk / 2 * (kMaxRows / 4) <= kThreads);
  if (begin >= end) return;
  const int n = args.rows;
  const int across = (static_cast<int>(min(int64_t{chunk}, end - begin)) + 1) / 2;
  const int top = threadIdx.x / across * 4, first = threadIdx.x % across;
  for (int64_t from = begin; from < end; from += chunk) {
    if (from > begin) {
      T next[kElements<T>];
      load(args, from, end, next);
      __syncthreads();
      store(next, shared);
      __syncthreads();
    }
    if (top >= n) continue;
    T acc[4][2] = {};
    for (int j = 0; j < n; j += 4) {
      T f[2][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        f[0][k] = shared.chunk[first][j + k];
        f[1][k] = shared.chunk[first + across][j + k];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T weight = shared.s[top + r][j + k];
          acc[r][0] += weight * f[0][k];
          acc[r][1] += weight * f[1][k];
        }
      }
    }
    const int64_t d = from + first;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = top + r;
      if (i < n) {
        T* const row = static_cast<T*>(args.grad) + i * args.depth;
        if (d < end) row[d] = acc[r][0] * shared.inverse[i];
        if (d + across < end) row[d + across] = acc[r][1] * shared.inverse[i];
      }
    }
  }
}

template <class In, class T, bool clustered>
__device__ void batch_similarity(const Arguments<In>& args) {
  __shared__ Shared<T> shared;
  static_assert(sizeof(shared) <= 48 * 1024, "the static shared memory of a block on every chip");
  constexpr int team_size = clustered ? kCluster : 1;
  const int n = args.rows, rank = blockIdx.x % team_size, team = blockIdx.x / team_size;
  const int64_t begin = rank * args.share, end = min(args.depth, begin + args.share);
  const int64_t first = begin + team * args.part, last = min(end, first + args.part);
  static_assert(kMaxRows <= kThreads);
  const int row = threadIdx.x;
  const int64_t label = row < n ? args.labels[row * args.label_stride] : 0;  // arrives during dots
  dots(args, begin, end, shared);
  if (row < n) shared.label[row] = label;
  if (args.gradient) {  // while the columns are in the first-level cache, which the barrier empties
    T own[kElements<T>];
    load(args, first, last, own);
    store(own, shared);
  }
  if constexpr (clustered) {
    add_over_cluster(n, shared);
  } else {
    __syncthreads();
  }
  if (row < n) {
    const T squared = shared.s[row][row];
    shared.inverse[row] = squared <= static_cast<T>(args.squared_eps) ? T(0)
                          : isinf(squared) ? static_cast<T>(NAN)  // 1 / inf = 0 would hide it
                                           : T(1) / sqrt(squared);
  }
  __syncthreads();
  row_means(args, blockIdx.x == 0, shared);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x / 32 == kWarps - 1) {  // which has the fewest weights
    const int lane = threadIdx.x % 32;
    double total = 0;
    for (int i = lane; i < n; i += 32) total += static_cast<double>(shared.loss[i]);
    const double scale = args.scale;
    total = sum_over<32>(total);
    if (lane == 0) *static_cast<T*>(args.loss) = static_cast<T>(scale * total);
  }
  if (args.gradient) {
    weigh(args, shared);
    __syncthreads();
    gradient(args, first, last, shared);
  }
}

template <class In, class T, bool clustered>
__global__ void __launch_bounds__(kThreads, 1) batch_similarity_kernel(const Arguments<In> args) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (clustered) {
    __trap();  // never launched on a chip without clusters; if it were, an error and no numbers
  } else
#endif
    batch_similarity<In, T, clustered>(args);
}

// How many clusters of the kernel the current device has room for at a time; 0 where it has no
// clusters, or too few multiprocessors for eight blocks, as a small slice of a GPU.
int ask_for_clusters(int device, const void* kernel, const cudaLaunchConfig_t& config) {
  int supported = 0, found = 0;
  if (cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
      (supported == 0 || cudaOccupancyMaxActiveClusters(&found, kernel, &config) == cudaSuccess)) {
    return found;
  }
  cudaGetLastError();  // the plain form runs anywhere, and what is truly wrong its launch will tell
  return 0;
}

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class In>
cudaError_t launch_as(const SmallBatch& batch, int device, void* stream) {
  using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  auto kernel = batch_similarity_kernel<In, T, true>;
  static std::atomic<int> known[128];  // by device: 1 + the answer, since to ask takes microseconds
  std::atomic<int>& answer = known[device % 128];
  if (answer.load(std::memory_order_relaxed) == 0) {
    const void* const asked_for = reinterpret_cast<const void*>(kernel);
    answer.store(1 + ask_for_clusters(device, asked_for, config), std::memory_order_relaxed);
  }
  const int clusters = answer.load(std::memory_order_relaxed) - 1;
  int64_t team_size = kCluster, most = clusters < kMostClusters ? clusters : kMostClusters;
  if (clusters == 0) {
    kernel = batch_similarity_kernel<In, T, false>;
    config.numAttrs = 0;
    team_size = 1;
    most = kMostBlocks;
  }
  const int64_t share = quotient_up(batch.depth, team_size);
  const int64_t wanted = batch.gradient ? quotient_up(share, kPart) : 1;
  const int64_t teams = wanted < most ? wanted : most;
  config.gridDim = dim3(static_cast<unsigned>(team_size * teams));
  const Arguments<In> args{
      static_cast<const In*>(batch.embeddings),
      batch.row_stride,
      batch.column_stride,
      batch.labels,
      batch.label_stride,
      batch.upstream,
      batch.upstream_stride,
      static_cast<int>(batch.rows),
      batch.depth,
      share,
      quotient_up(share, teams),
      batch.margin,
      batch.sigma,
      batch.squared_eps,
      batch.scale,
      batch.is_signed,
      batch.gradient,
      batch.loss,
      batch.means,
      batch.grad,
  };
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args);
  if (launched != cudaSuccess) cudaGetLastError();  // else the next call of anyone finds it
  return launched;
}

}  // namespace

template <class In>
const char* launch(const SmallBatch& batch, int device, void* stream) {
  const cudaError_t error = launch_as<In>(batch, device, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* launch<double>(const SmallBatch&, int, void*);
template const char* launch<float>(const SmallBatch&, int, void*);
template const char* launch<Half>(const SmallBatch&, int, void*);
template const char* launch<BFloat16>(const SmallBatch&, int, void*);

}  // namespace bstriplet
