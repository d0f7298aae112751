// Messages between the blocks of a cluster: stores into another block's shared memory, which a
// barrier there counts as they arrive. A barrier of the cluster would do, but in front of one a
// block makes all its writes visible to the whole GPU, which takes longer than the messages.
//
// Code for chips without clusters includes this and calls none of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace bstriplet {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// The barrier's only phase ends when `bytes` have arrived. For one thread, before start_messages.
__device__ inline void expect(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// For every thread of the cluster: this block may be sent what it expects.
__device__ inline void start_messages() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// For every thread of the cluster: returns once any block may be sent what it expects.
__device__ inline void wait_for_start() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// The block of rank `rank` receives `what`, 4, 8 or 16 bytes, where this block has `to`; the
// barrier that counts them is where this block has `barrier`.
template <int bytes>
__device__ inline void send(const void* what, void* to, int rank, uint64_t& barrier) {
  uint32_t words[bytes / 4], there, counter;
  memcpy(words, what, bytes);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counter)
      : "r"(shared_address(&barrier)), "r"(rank));
  if constexpr (bytes == 4) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            there),
        "r"(words[0]), "r"(counter)
        : "memory");
  } else if constexpr (bytes == 8) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
            "r"(there),
        "r"(words[0]), "r"(words[1]), "r"(counter)
        : "memory");
  } else {
    static_assert(bytes == 16);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(counter)
        : "memory");
  }
}

// Returns once everything has arrived; the calling thread then sees it.
__device__ inline void wait_for(uint64_t& barrier) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(&barrier))
        : "memory");
  } while (done == 0);
}

}  // namespace bstriplet
