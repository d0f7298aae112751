// What Python calls: csrc/cuda/small_batch.cu on the host.
#include "cuda/small_batch.h"
#include "fibres.h"

using namespace bstriplet;

// Returns what went wrong, or null. A device says what it has by its number: see cuda_runtime.h.
extern "C" const char* launch_on_host(int element, const SmallBatch* batch, int device,
                                      unsigned barrier_left_out, int* races) {
  constexpr decltype(&launch<float>) launches[] = {launch<double>, launch<float>, launch<Half>,
                                                   launch<BFloat16>};
  cuda_on_host::left_out = barrier_left_out;
  cuda_on_host::races = races;
  return launches[element](*batch, device, nullptr);
}
