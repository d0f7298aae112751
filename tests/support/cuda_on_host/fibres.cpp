// Blocks, threads, barriers and shuffles for cuda_runtime.h.
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "cuda/cluster_messages.h"
#include "fibres.h"

namespace cuda_on_host {

thread_local Block* block = nullptr;
unsigned left_out = 0;

namespace {

thread_local char anchor = 0;  // as far from the shared memory in one block as in another

// Threads change by jumps: swapcontext asks the kernel for the signal mask, which takes ten times
// as long.
[[gnu::noinline, noreturn]] void jump(void** to) { __builtin_longjmp(to, 1); }

[[gnu::noinline]] void leave(Fibre& fibre) {
  if (__builtin_setjmp(fibre.registers) == 0) jump(block->registers);
}

void enter() {
  block->kernel();
  block->running->started = false;
  jump(block->registers);
}

[[gnu::noinline]] void resume(Fibre& fibre) {
  block->running = &fibre;
  if (__builtin_setjmp(block->registers) != 0) return;
  if (fibre.started) jump(fibre.registers);
  fibre.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack = {fibre.stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Stacks of a block's threads, side by side. They are kept for later blocks: to map them anew takes a
// third of all time. What a kernel leaves there is as good as any number for one that reads too early.
class Stacks {
 public:
  explicit Stacks(size_t threads) : size_(threads * kStack) {
    const std::lock_guard lock(mutex_);
    std::vector<char*>& unused = unused_[size_];
    if (unused.empty()) {
      void* const mapped =
          mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) fail("no memory for stacks");
      unused.push_back(static_cast<char*>(mapped));
    }
    first_ = unused.back();
    unused.pop_back();
  }
  ~Stacks() {
    const std::lock_guard lock(mutex_);
    unused_[size_].push_back(first_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* operator[](unsigned thread) const { return first_ + thread * kStack; }

 private:
  inline static std::mutex mutex_;
  inline static std::map<size_t, std::vector<char*>> unused_;  // by their size
  size_t size_;
  char* first_;
};

// Blocks of a cluster run one after another, from one barrier of the cluster to the next.
void wait_for_cluster() {
  block->cluster.turn.unlock();
  block->cluster.barrier.arrive_and_wait();
  block->cluster.turn.lock();
  ++block->cluster_phase;
}

// `last` runs in the thread that comes last, before any goes on.
template <class Last>
void wait(Barrier& barrier, size_t count, Last last) {
  Fibre* const own = block->running;
  if (barrier.waiting.size() + 1 < count) {
    barrier.waiting.push_back(own);
    leave(*own);
    return;
  }
  last();
  ++barrier.phase;
  block->ready.insert(block->ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// Shared memory is this library's thread_local storage. It holds NaN until the kernel writes it; when
// a block has ended, other objects may come to lie there.
void poison_shared_memory() {
  anchor = 0;  // so that the storage is there
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void*) {
        char* const data = static_cast<char*>(module->dlpi_tls_data);
        for (int k = 0; data != nullptr && k < module->dlpi_phnum; ++k) {
          const auto& segment = module->dlpi_phdr[k];
          if (segment.p_type != PT_TLS || &anchor < data) continue;
          if (&anchor >= data + segment.p_memsz) continue;
          std::memset(data, 0xff, segment.p_memsz);
          forget_accesses(data, data + segment.p_memsz);
        }
        return 0;
      },
      nullptr);
}

void run_block(Block& own) {
  std::unique_lock turn(own.cluster.turn);
  poison_shared_memory();
  block = &own;
  own.cluster.anchors[own.rank] = &anchor;
  turn.unlock();
  own.cluster.barrier.arrive_and_wait();
  turn.lock();
  const Stacks stacks(own.fibres.size());
  for (Fibre& fibre : own.fibres) {
    fibre.stack = stacks[fibre.index.x];
    own.ready.push_back(&fibre);
  }
  while (!own.ready.empty()) {
    Fibre& next = *own.ready.front();
    own.ready.pop_front();
    resume(next);
  }
  for (Fibre& fibre : own.fibres) {
    if (fibre.started) fail("a barrier that not every thread comes to");
  }
  poison_shared_memory();
  own.cluster.barrier.arrive_and_drop();  // a block that has ended is not waited for
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s\n", what);
  std::abort();
}

void exchange(void* value, size_t size, int lane_mask) {
  Fibre& own = *block->running;
  char(&slots)[2][16] = own.slots;  // the next may be written before another has read the last
  const unsigned turn = own.shuffles++ % 2;
  std::memcpy(slots[turn], value, size);
  wait(block->warps[own.index.x / kLanes], kLanes, [] {});
  const Fibre& other = block->fibres[own.index.x ^ static_cast<unsigned>(lane_mask)];
  std::memcpy(value, other.slots[turn], size);
}

void run_grid(const std::function<void()>& kernel, unsigned blocks, unsigned threads,
              unsigned cluster_size) {
  if (threads % kLanes != 0) fail("a warp of fewer than 32 threads");
  forget_accesses();
  for (unsigned first = 0; first < blocks; first += cluster_size) {
    Cluster cluster(first, cluster_size);
    std::deque<Block> members;
    std::vector<std::thread> running;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      Block& own = members.emplace_back(cluster, kernel, rank, threads);
      running.emplace_back(run_block, std::ref(own));
    }
    for (std::thread& thread : running) thread.join();
  }
}

// To a block that expects nothing yet is a race.
void send(const void* what, size_t bytes, void* to, unsigned rank, uint64_t* barrier) {
  auto& remaining = *static_cast<uint64_t*>(__cluster_map_shared_rank(barrier, rank));
  if (static_cast<int64_t>(remaining) < 0) {
    if (races != nullptr) ++*races;
  } else if (remaining < bytes) {
    fail("more bytes than a barrier expects");
  }
  std::memcpy(__cluster_map_shared_rank(to, rank), what, bytes);
  remaining -= bytes;
}

// Other blocks have their turn when no thread of this one can go on: what it sends too early is then
// seen, whatever the machine is busy with.
void wait_for(const uint64_t* barrier) {
  Fibre* const own = block->running;
  ++block->listening;
  while (*barrier != 0) {
    if (block->ready.size() < block->listening) {
      block->cluster.turn.unlock();
      // Not a yield: beside a busy process it returns before another block has had its turn.
      std::this_thread::sleep_for(std::chrono::microseconds(1));
      block->cluster.turn.lock();
    }
    block->ready.push_back(own);
    leave(*own);
  }
  --block->listening;
}

const dim3& thread_index() { return block->running->index; }
const dim3& block_index() { return block->index; }

}  // namespace cuda_on_host

using namespace cuda_on_host;

void __syncthreads(unsigned line) {
  if (line != left_out) cuda_on_host::wait(block->threads, block->fibres.size(), [] {});
}

void __cluster_barrier_wait(unsigned line) {
  if (line != left_out) cuda_on_host::wait(block->threads, block->fibres.size(), wait_for_cluster);
}

void* __cluster_map_shared_rank(const void* own, unsigned rank) {
  if (rank >= block->cluster.anchors.size()) fail("a rank outside of the cluster");
  return block->cluster.anchors[rank] + (static_cast<const char*>(own) - &anchor);
}

static int asked_device = 0;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  asked_device = device;
  *value = device % 5 != 0;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                           const cudaLaunchConfig_t* config) {
  constexpr int room[] = {0, 16, 0, 1, 16};
  const bool fits = asked_device % 5 != 4 || config->attrs->val.clusterDim.x <= 8;
  *clusters = fits ? room[asked_device % 5] : 0;
  return cudaSuccess;
}
