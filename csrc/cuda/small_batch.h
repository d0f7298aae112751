// What the CUDA operator hands to its kernel: numbers, without torch's headers or CUDA's.
#pragma once

#include <cstdint>

namespace bstriplet {

constexpr int kMaxRows = 64;  // of a batch that the kernel takes

// Half precision as it lies in memory; reading cuda_fp16.h and cuda_bf16.h for each chip would be a
// tenth of the time that the kernel compiles.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Pointers are to memory of the device; results are of the accumulation type. Strides in elements.
struct SmallBatch {
  const void* embeddings;  // [rows, depth] of what `launch` is told
  int64_t rows, depth, row_stride, column_stride;
  const int64_t* labels;
  int64_t label_stride;
  const void* upstream;  // of the accumulation type, or null
  int64_t upstream_stride;
  double margin, sigma, squared_eps, scale;
  bool is_signed, gradient;
  void *loss, *means, *grad;
};

// One launch on the device, which must be the current one; returns what went wrong, or null. In is
// double, float, Half or BFloat16; a double is accumulated in double, the others in float.
template <class In>
const char* launch(const SmallBatch& batch, int device, void* stream);

}  // namespace bstriplet
