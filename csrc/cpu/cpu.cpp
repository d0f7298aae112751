// The choice of kernels, torch's threads, and the operator instruction_set, which names the choice.
#include "cpu/cpu.h"

#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "operator.h"

namespace bstriplet {
namespace {

#if defined(BSTRIPLET_X86_KERNELS)
bool supports(InstructionSet set) {
  if (set == InstructionSet::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return set == InstructionSet::baseline ||
         (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
}

// The widest that the processor has. BSTRIPLET_INSTRUCTION_SET can ask for a narrower one, to have
// the same bits on different processors.
InstructionSet choose_instruction_set() {
  const char* wanted = std::getenv("BSTRIPLET_INSTRUCTION_SET");
  const std::string limit = wanted == nullptr ? "avx512" : wanted;
  if (limit == "avx512" && supports(InstructionSet::avx512)) return InstructionSet::avx512;
  if (limit != "baseline" && supports(InstructionSet::avx2)) return InstructionSet::avx2;
  return InstructionSet::baseline;
}
#else
InstructionSet choose_instruction_set() { return InstructionSet::baseline; }
#endif

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose_instruction_set();
  return chosen;
}

void run_parallel(int64_t begin, int64_t end, int64_t grain,
                  void (*work)(int64_t begin, int64_t end, void* context), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, work, context));
}

void map_pages(void* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)  // in headers since Linux 5.14; an older kernel refuses it
  constexpr int64_t piece = int64_t{1} << 18;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const auto address = reinterpret_cast<int64_t>(data);
  const int64_t begin = round_up(address, page), end = (address + bytes) / page * page;
  if (end - begin < 64 * piece) return;  // small memory is often not fresh
  parallel_for(0, round_up(end - begin, piece) / piece, 1, [&](int64_t from, int64_t to) {
    for (int64_t at = begin + from * piece; at < std::min(begin + to * piece, end); at += piece) {
      madvise(reinterpret_cast<void*>(at), std::min(piece, end - at), MADV_POPULATE_WRITE);
    }
  });
#else
  (void)data, (void)bytes;
#endif
}

namespace {

std::string instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace
}  // namespace bstriplet

STABLE_TORCH_LIBRARY_IMPL(bstriplet, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&bstriplet::instruction_set_name));
}
