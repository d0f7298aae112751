// What the CUDA operator hands to its kernel; needs no headers of torch or CUDA.
#pragma once

#include <cstdint>

#include "rows.h"
#include "spec.h"

namespace bstriplet {

constexpr int kMaxRows = 64;  // of a batch that the kernel takes

// Pointers are to memory of the device. The accumulation type is double for float64 embeddings,
// else float. Strides in elements.
struct SmallBatch {
  StridedRows embeddings;
  const int64_t* labels;
  int64_t label_stride;
  const void* upstream;  // of the accumulation type, or null
  int64_t upstream_stride;
  Spec spec;
  void *loss, *means, *grad;  // of the accumulation type
};

// Launches the kernel once on `device`, which must be the current one; returns the error, or null.
const char* launch(const SmallBatch& batch, int device, void* stream);

}  // namespace bstriplet
