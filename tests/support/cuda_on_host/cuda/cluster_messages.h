// Stands in for csrc/cuda/cluster_messages.h: a barrier holds how many bytes are yet to arrive.
#pragma once

#include "cuda_runtime.h"

namespace cuda_on_host {

void send(const void* what, size_t bytes, void* to, unsigned rank, uint64_t* barrier);
void wait_for(const uint64_t* barrier);

}  // namespace cuda_on_host

namespace bstriplet {

// Shared memory starts as -1; what was sent too early has made it less.
inline void expect(uint64_t& barrier, int bytes) { barrier += 1 + static_cast<uint64_t>(bytes); }
inline void start_messages() {}
inline void wait_for_start(unsigned line = __builtin_LINE()) { __cluster_barrier_wait(line); }
inline void wait_for(uint64_t& barrier) { cuda_on_host::wait_for(&barrier); }

template <int bytes>
void send(const void* what, void* to, int rank, uint64_t& barrier) {
  cuda_on_host::send(what, bytes, to, static_cast<unsigned>(rank), &barrier);
}

}  // namespace bstriplet
