// batch_similarity on CUDA for small batches (N <= 64, the paper's N_b = 36): loss, row means and
// gradient in one launch.
//
// A block owns a slice of the D columns and writes the gradient's slice; S, N x N, lives in shared
// memory. Hopper and later: one cluster of blocks, each multiplies out its own slice and the
// partial S are added over distributed shared memory, in the blocks' order. Before Hopper: every
// block multiplies out all columns, which at this size is cheaper than a second launch. Reads
// N D elements (once; once per block before Hopper) and writes N D; N^2 D / 2 multiply-adds for S
// and N^2 D for the gradient; bound by latency. No atomics: the same bits from run to run.
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda_launch.h"

namespace bstriplet {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCluster = 8;       // the largest that every chip with clusters can place
constexpr int kFirstWithClusters = 9;  // the major compute capability
constexpr int kPlainSlice = 64;   // columns of a block where there are no clusters
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
  int64_t slice;  // columns of one block
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

template <class T>
__device__ inline T warp_sum(T x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Columns of the embeddings that are in shared memory at a time.
template <class T>
constexpr int kChunk = sizeof(T) == 4 ? 64 : 16;

template <class T>
struct Shared {
  alignas(16) T chunk[kChunk<T>][kStride];  // transposed: [column][row]
  T s[kMaxRows][kMaxRows + 1];              // S, then the weights
  T inverse[kMaxRows];
  T per_positive[kMaxRows], per_negative[kMaxRows], along[kMaxRows], loss[kMaxRows];
  int64_t label[kMaxRows];
};

// Raw products of columns [begin, end) into shared.s, both triangles. Threads are groups of 4 x 4
// tiles of the lower triangle; a group takes every groups-th column, and groups add in turn.
template <class In, class T>
__device__ void dots(const Arguments<In>& args, int64_t begin, int64_t end, Shared<T>& shared) {
  constexpr int chunk = kChunk<T>;
  constexpr int per_thread = kMaxRows * chunk / kThreads;
  const int n = args.rows, down = (n + 3) / 4, tiles = down * (down + 1) / 2;
  const int groups = min(8, kThreads / tiles);
  const int group = threadIdx.x / tiles, tile = threadIdx.x % tiles;
  int top = 0;
  while ((top + 1) * (top + 2) / 2 <= tile) ++top;
  const int left = tile - top * (top + 1) / 2;

  T next[per_thread];
  const auto fetch = [&](int64_t from) {  // coalesced along the columns
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int at = threadIdx.x + k * kThreads, row = at / chunk, column = at % chunk;
      const bool inside = row < n && from + column < end;
      next[k] = inside ? static_cast<T>(widen(args.embeddings[row * args.row_stride +
                                                              (from + column) *
                                                                  args.column_stride]))
                       : T(0);
    }
  };
  T acc[4][4] = {};
  fetch(begin);
  for (int64_t from = begin; from < end; from += chunk) {
#pragma unroll
    for (int k = 0; k < per_thread; ++k) {
      const int at = threadIdx.x + k * kThreads;
      shared.chunk[at % chunk][at / chunk] = next[k];
    }
    __syncthreads();
    if (from + chunk < end) fetch(from + chunk);
    if (group < groups) {
      for (int column = group; column < chunk; column += groups) {
        T a[4], b[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          a[k] = shared.chunk[column][4 * top + k];
          b[k] = shared.chunk[column][4 * left + k];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[i][j] += a[i] * b[j];
        }
      }
    }
    __syncthreads();
  }
  for (int turn = 0; turn < groups; ++turn) {
    if (group == turn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = 4 * top + i, column = 4 * left + j;
          if (row < n && column <= row) {
            const T value = turn == 0 ? acc[i][j] : shared.s[row][column] + acc[i][j];
            shared.s[row][column] = value;
            shared.s[column][row] = value;
          }
        }
      }
    }
    __syncthreads();
  }
}

// Adds the cluster's partial S, in the order of its blocks, into every block's shared.s.
template <class T>
__device__ void add_over_cluster(int n, Shared<T>& shared) {
#if __CUDA_ARCH__ >= 900
  // What cooperative_groups calls; its header takes longer to compile than all that is here.
  const auto sync = [] {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
  };
  constexpr int per_thread = kMaxRows * kMaxRows / kThreads;
  T total[per_thread];
  sync();
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int at = threadIdx.x + k * kThreads, row = at / kMaxRows, column = at % kMaxRows;
    total[k] = 0;
    if (row < n && column < n) {
      for (unsigned rank = 0; rank < __clusterSizeInBlocks(); ++rank) {
        total[k] += static_cast<Shared<T>*>(__cluster_map_shared_rank(&shared, rank))->s[row][column];
      }
    }
  }
  sync();  // everyone has read before anyone writes
#pragma unroll
  for (int k = 0; k < per_thread; ++k) {
    const int at = threadIdx.x + k * kThreads, row = at / kMaxRows, column = at % kMaxRows;
    if (row < n && column < n) shared.s[row][column] = total[k];
  }
  __syncthreads();
#endif
}

template <class T>
__device__ inline T phi_slope(T s, bool is_signed) {
  return is_signed ? (s < 0 ? -s : s) : s;  // half of phi'; s times it is phi
}

// Eq. 3 for every row: the means, h_i, and a_i over its counts. A warp takes a row at a time.
template <class In, class T>
__device__ void row_means(const Arguments<In>& args, bool writes, Shared<T>& shared) {
  const int lane = threadIdx.x % 32, n = args.rows;
  for (int i = threadIdx.x / 32; i < n; i += kWarps) {
    T same = 0, other = 0;
    int positives = 0;
    for (int j = lane; j < n; j += 32) {
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
    same = warp_sum(same);
    other = warp_sum(other);
    positives = warp_sum(positives);
    if (lane != 0) continue;
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
}

// shared.s becomes w_ij phi'(s_ij) / |f_j|, shared.along sum_j w_ij phi'(s_ij) s_ij.
template <class In, class T>
__device__ void weigh(const Arguments<In>& args, Shared<T>& shared) {
  const int lane = threadIdx.x % 32, n = args.rows;
  for (int i = threadIdx.x / 32; i < n; i += kWarps) {
    T along = 0;
    for (int j = lane; j < n; j += 32) {
      const T s = shared.s[i][j] * shared.inverse[i] * shared.inverse[j];
      const T weight = shared.label[j] == shared.label[i]
                           ? -(shared.per_positive[i] + shared.per_positive[j])
                           : shared.per_negative[i] + shared.per_negative[j];
      const T slope = j == i ? T(0) : 2 * weight * phi_slope(s, args.is_signed);
      along += slope * s;
      shared.s[i][j] = slope * shared.inverse[j];
    }
    along = warp_sum(along);
    if (lane == 0) shared.along[i] = along;
  }
}

// dL/df in columns [begin, end): a lane a column, a warp every kWarps-th row.
template <class In, class T>
__device__ void gradient(const Arguments<In>& args, int64_t begin, int64_t end,
                         const Shared<T>& shared) {
  constexpr int rows_per_warp = kMaxRows / kWarps;
  const int warp = threadIdx.x / 32, n = args.rows;
  for (int64_t d = begin + threadIdx.x % 32; d < end; d += 32) {
    const In* column = args.embeddings + d * args.column_stride;
    T acc[rows_per_warp] = {};
#pragma unroll 4
    for (int j = 0; j < n; ++j) {
      const T f = static_cast<T>(widen(column[j * args.row_stride]));
#pragma unroll
      for (int r = 0; r < rows_per_warp; ++r) {
        const int i = warp + r * kWarps;
        if (i < n) acc[r] += shared.s[i][j] * f;
      }
    }
#pragma unroll
    for (int r = 0; r < rows_per_warp; ++r) {
      const int i = warp + r * kWarps;
      if (i < n) {
        const T f = static_cast<T>(widen(column[i * args.row_stride]));
        const T back = shared.along[i] * shared.inverse[i];
        static_cast<T*>(args.grad)[i * args.depth + d] = (acc[r] - back * f) * shared.inverse[i];
      }
    }
  }
}

template <class In, class T, bool clustered>
__device__ void batch_similarity(const Arguments<In>& args) {
  __shared__ Shared<T> shared;
  const int n = args.rows;
  const int64_t begin = blockIdx.x * args.slice;
  const int64_t end = min(args.depth, begin + args.slice);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    shared.label[i] = args.labels[i * args.label_stride];
  }
  if constexpr (clustered) {
    dots(args, begin, end, shared);
    add_over_cluster(n, shared);
  } else {
    dots(args, int64_t{0}, args.depth, shared);
  }
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const T squared = shared.s[i][i];
    shared.inverse[i] = squared <= static_cast<T>(args.squared_eps) ? T(0)
                        : isinf(squared) ? static_cast<T>(NAN)  // 1 / inf = 0 would hide it
                                         : T(1) / sqrt(squared);
  }
  __syncthreads();
  row_means(args, blockIdx.x == 0, shared);
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x < 32) {
    double total = 0;
    for (int i = threadIdx.x; i < n; i += 32) total += static_cast<double>(shared.loss[i]);
    const double scale = args.scale;
    total = warp_sum(total);
    if (threadIdx.x == 0) *static_cast<T*>(args.loss) = static_cast<T>(scale * total);
  }
  if (args.gradient) {
    weigh(args, shared);
    __syncthreads();
    gradient(args, begin, end, shared);
  }
}

// A chip's code has the one of its two forms that `launch` chooses there; the other is empty.
template <class In, class T, bool clustered>
__global__ void __launch_bounds__(kThreads, 1) batch_similarity_kernel(const Arguments<In> args) {
#if defined(__CUDA_ARCH__)
  if constexpr (clustered == (__CUDA_ARCH__ >= 100 * kFirstWithClusters)) {
    batch_similarity<In, T, clustered>(args);
  }
#endif
}

template <class In>
cudaError_t launch_as(const SmallBatch& batch, int device, void* stream) {
  using T = std::conditional_t<std::is_same_v<In, double>, double, float>;
  int major = 0;
  const cudaError_t asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (asked != cudaSuccess) return asked;
  const bool clustered = major >= kFirstWithClusters;
  const int64_t d = batch.depth;
  const int64_t slice = clustered ? (d + kCluster - 1) / kCluster : kPlainSlice;
  const int64_t blocks = clustered ? kCluster : batch.gradient ? (d + slice - 1) / slice : 1;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const Arguments<In> args{
      static_cast<const In*>(batch.embeddings),
      batch.row_stride,
      batch.column_stride,
      batch.labels,
      batch.label_stride,
      batch.upstream,
      batch.upstream_stride,
      static_cast<int>(batch.rows),
      d,
      slice,
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
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = clustered ? 1 : 0;
  const auto kernel = clustered ? batch_similarity_kernel<In, T, true>
                                : batch_similarity_kernel<In, T, false>;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t last = cudaGetLastError();
  return launched != cudaSuccess ? launched : last;
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
