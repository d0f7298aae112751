// The caller's arrays as the arithmetic sees them: pointers and strides, without torch's headers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace bstriplet {

enum class Element { float64, float32, float16, bfloat16 };

// A matrix [rows, columns] in the caller's memory; strides in elements.
struct StridedRows {
  const void* data;
  Element element;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

// Copies n elements, `stride` apart, to consecutive elements of type T.
template <class From, class T>
void gather(const void* data, int64_t n, int64_t stride, T* to) {
  const From* from = static_cast<const From*>(data);
  if constexpr (std::is_same_v<From, T>) {
    if (stride == 1) return static_cast<void>(std::memcpy(to, from, n * sizeof(T)));
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
}

// rows x columns, a number of elements; throws where int64 cannot count their bytes.
int64_t checked_product(int64_t rows, int64_t columns);

}  // namespace bstriplet
