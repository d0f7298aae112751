// The state of a launch, for fibres.cpp and races.cpp. Neither is instrumented: the kernel alone
// is.
#pragma once

#include <barrier>
#include <deque>
#include <mutex>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_on_host {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 64 * 1024;

struct Fibre {
  dim3 index;
  char* stack = nullptr;
  void* registers[5] = {};  // for __builtin_longjmp
  bool started = false;
  unsigned shuffles = 0;
  alignas(16) char slots[2][16] = {};  // what its lane hands to another
};

struct Barrier {
  std::vector<Fibre*> waiting;
  unsigned phase = 0;  // how often all have come
};

struct Cluster {
  Cluster(unsigned first_block, unsigned size)
      : first_block(first_block), barrier(size), anchors(size) {}
  unsigned first_block;
  std::mutex turn;  // of its blocks
  std::barrier<> barrier;
  std::vector<char*> anchors;
};

struct Block {
  Block(Cluster& cluster, const std::function<void()>& kernel, unsigned rank, unsigned size)
      : cluster(cluster), kernel(kernel), index{cluster.first_block + rank, 0, 0}, rank(rank),
        fibres(size), warps(size / kLanes) {
    for (unsigned k = 0; k < size; ++k) fibres[k].index = {k, 0, 0};
  }
  Cluster& cluster;
  const std::function<void()>& kernel;
  dim3 index;
  unsigned rank;
  std::vector<Fibre> fibres;
  std::deque<Fibre*> ready;
  size_t listening = 0;  // for messages that are yet to come
  std::vector<Barrier> warps;
  Barrier threads;
  unsigned cluster_phase = 0;
  Fibre* running = nullptr;
  void* registers[5] = {};
};

extern thread_local Block* block;
extern unsigned left_out;  // the line of a barrier that nobody waits at, or 0
extern int* races;         // where races are counted, or null

[[noreturn]] void fail(const char* what);
void forget_accesses();
void forget_accesses(const char* begin, const char* end);  // another block's memory lies there now

}  // namespace cuda_on_host
