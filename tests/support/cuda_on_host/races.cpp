// A race detector for the kernel: GCC's -fsanitize=thread calls these functions at every access,
// and they are linked in place of ThreadSanitizer's own, for which the threads of a cluster are too
// many.
//
// On a GPU barriers alone order threads, all of a block or of a cluster; a shuffle does not order what
// its lanes do to memory. So two accesses are ordered just if a barrier that both threads come to has
// completed between them.
#include <dlfcn.h>

#include <cstdio>
#include <unordered_map>

#include "fibres.h"

namespace cuda_on_host {

int* races = nullptr;

namespace {

struct Access {
  unsigned cluster, block, thread;
  unsigned cluster_phase, block_phase;
};

struct Cell {  // 4 bytes
  bool written = false;
  Access write;
  std::vector<Access> reads;  // since that write, without those ordered before another
};

std::unordered_map<uintptr_t, Cell> cells;

bool ordered(const Access& a, const Access& b) {
  if (a.cluster != b.cluster) return false;
  if (a.cluster_phase != b.cluster_phase) return true;
  if (a.block != b.block) return false;
  return a.block_phase != b.block_phase || a.thread == b.thread;
}

void check(const char* what, const Access& before, const Access& now, void* code) {
  if (ordered(before, now) || ++*races > 5) return;
  Dl_info library;
  dladdr(code, &library);
  std::fprintf(stderr, "%s: thread %u of block %u, then thread %u of block %u; ", what,
               before.thread, before.block, now.thread, now.block);
  std::fprintf(stderr, "addr2line -e %s %#tx\n", library.dli_fname,
               static_cast<char*>(code) - static_cast<char*>(library.dli_fbase) - 1);
}

void access(const void* address, size_t size, bool writes, void* code) {
  if (races == nullptr || block == nullptr) return;
  const Fibre& own = *block->running;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - reinterpret_cast<uintptr_t>(own.stack) < kStack) return;
  const Access now{block->cluster.first_block, block->index.x, own.index.x, block->cluster_phase,
                   block->threads.phase};
  for (uintptr_t k = at / 4; k <= (at + size - 1) / 4; ++k) {
    Cell& cell = cells[k];
    const char* const what = writes ? "write after write" : "read after write";
    if (cell.written) check(what, cell.write, now, code);
    if (writes) {
      for (const Access& read : cell.reads) check("write after read", read, now, code);
      cell.written = true;
      cell.write = now;
      cell.reads.clear();
    } else {
      if (!cell.reads.empty() && ordered(cell.reads.front(), now)) {
        std::erase_if(cell.reads, [&](const Access& read) { return ordered(read, now); });
      }
      cell.reads.push_back(now);
    }
  }
}

}  // namespace

void forget_accesses() { cells.clear(); }

void forget_accesses(const char* begin, const char* end) {
  const auto first = reinterpret_cast<uintptr_t>(begin) / 4;
  const auto last = reinterpret_cast<uintptr_t>(end) / 4;
  std::erase_if(cells, [&](const auto& cell) { return cell.first >= first && cell.first < last; });
}

}  // namespace cuda_on_host

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define CALLER __builtin_return_address(0)
#define ACCESSES(name, writes)                                                       \
  void __tsan_##name##1(void* at) { cuda_on_host::access(at, 1, writes, CALLER); }   \
  void __tsan_##name##2(void* at) { cuda_on_host::access(at, 2, writes, CALLER); }   \
  void __tsan_##name##4(void* at) { cuda_on_host::access(at, 4, writes, CALLER); }   \
  void __tsan_##name##8(void* at) { cuda_on_host::access(at, 8, writes, CALLER); }   \
  void __tsan_##name##16(void* at) { cuda_on_host::access(at, 16, writes, CALLER); } \
  void __tsan_##name##_range(void* at, size_t n) { cuda_on_host::access(at, n, writes, CALLER); }
ACCESSES(read, false)
ACCESSES(write, true)
ACCESSES(unaligned_read, false)
ACCESSES(unaligned_write, true)

// What the launch remembers of a device; no thread of a kernel comes there.
int __tsan_atomic32_load(const volatile int* address, int) { return *address; }
void __tsan_atomic32_store(volatile int* address, int value, int) { *address = value; }

}  // extern "C"
