// What Python calls: the kernel of csrc/cuda/small_batch.cu on the host.
#include "cuda/small_batch.h"
#include "fibres.h"

// Returns what went wrong, or null. A device says what it has by its number: see cuda_runtime.h.
extern "C" const char* launch_on_host(const bstriplet::SmallBatch* batch, int device,
                                      unsigned barrier_left_out, int* races) {
  cuda_on_host::left_out = barrier_left_out;
  cuda_on_host::races = races;
  return bstriplet::launch(*batch, device, nullptr);
}
