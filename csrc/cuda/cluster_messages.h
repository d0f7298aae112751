// Messages between the blocks of a cluster. A message is a store into another block's shared
// memory, which a barrier there counts when it arrives. A barrier of the whole cluster would be
// simpler but slower: before it, a block makes all its writes visible to the whole GPU.
//
// Code for chips without clusters includes this file and calls none of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace bstriplet {

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Lets the barrier's only phase end when `bytes` have arrived. One thread calls it, before
// start_messages.
__device__ inline void expect(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Says that this block is ready for messages. Every thread of the cluster calls it.
__device__ inline void start_messages() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Returns once all blocks are ready for messages. Every thread of the cluster calls it.
__device__ inline void wait_for_start() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Sends `what`, 4, 8 or 16 bytes, to the block of rank `rank`. `to` and `barrier`, which counts the
// bytes, are addresses in this block; the message uses the same places in the other.
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

// Returns once all expected bytes have arrived and the calling thread can see them.
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
