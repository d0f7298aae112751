// A matrix as the arithmetic and the kernels see it: numbers, without torch's headers.
#pragma once

#include <cstdint>

namespace bstriplet {

enum class Element { float64, float32, float16, bfloat16 };

// [rows, columns] where it lies; strides in elements.
struct StridedRows {
  const void* data;
  Element element;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

}  // namespace bstriplet
