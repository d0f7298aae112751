// What the CUDA operator hands to its kernel: numbers, without torch's headers or CUDA's.
#pragma once

#include <cstdint>

#include "rows.h"

namespace bstriplet {

constexpr int kMaxRows = 64;  // of a batch that the kernel takes

// Pointers are to memory of the device; results are of the accumulation type.
struct SmallBatch {
  StridedRows embeddings;
  const int64_t* labels;
  int64_t label_stride;
  const void* upstream;  // of the accumulation type, or null
  int64_t upstream_stride;
  double margin, sigma, squared_eps, scale;
  bool is_signed, gradient;
  void *loss, *means, *grad;
};

// One launch on the device, which must be the current one; returns what went wrong, or null.
const char* launch(const SmallBatch& batch, int device, void* stream);

}  // namespace bstriplet
