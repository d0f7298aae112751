// Stands in for CUDA's header where csrc/cuda/small_batch.cu is compiled as C++: what that file uses, no more.
//
// A block is an OS thread, so that its shared memory is C++'s thread_local. Its threads are fibres
// of that OS thread, which change at barriers and shuffles alone; see fibres.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static thread_local

// widen(Half), the one place with assembly, names the operands of cvt.f32.f16 so.
#define asm(cvt) wide = static_cast<float>(std::bit_cast<_Float16>(x.bits))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_host {

const dim3& thread_index();
const dim3& block_index();
void exchange(void* value, size_t size, int lane_mask);  // for that of another lane of the warp
void run_grid(const std::function<void()>& kernel, unsigned blocks, unsigned threads,
              unsigned cluster);

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index()
#define blockIdx cuda_on_host::block_index()

using std::isinf;
using std::max;
using std::min;
using std::sqrt;

template <class T>
T rsqrt(T x) {
  return 1 / sqrt(x);
}
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }

// `line` is the caller's: a test leaves out the barrier of one line, to see that it is missed.
void __syncthreads(unsigned line = __builtin_LINE());
void __cluster_barrier_wait(unsigned line = __builtin_LINE());
void* __cluster_map_shared_rank(const void* own, unsigned rank);

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  cuda_on_host::exchange(&value, sizeof value, lane_mask);
  return value;
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidClusterSize };
enum cudaDeviceAttr { cudaDevAttrClusterLaunch };
enum cudaFuncAttribute { cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Devices by their number modulo 5: without clusters; with room for many, for none, for one; for many
// of eight blocks.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*);
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the launch was refused"; }

template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const std::remove_const_t<Arguments>& arguments) {
  const unsigned cluster = config->numAttrs == 1 ? config->attrs->val.clusterDim.x : 1;
  if (config->gridDim.x == 0 || config->gridDim.x % cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  cuda_on_host::run_grid([&] { kernel(arguments); }, blocks, threads, cluster);
  return cudaSuccess;
}
