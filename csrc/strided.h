// Reading strided arrays, and counting what they need.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rows.h"

namespace bstriplet {

// One element of a strided array after another, as T.
template <class From, class T>
void gather(const void* data, int64_t n, int64_t stride, T* to) {
  const From* from = static_cast<const From*>(data);
  if constexpr (std::is_same_v<From, T>) {
    if (stride == 1) return static_cast<void>(std::memcpy(to, from, n * sizeof(T)));
  }
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
}

// Elements of a scratch of `rows` x `columns` numbers, or an error where int64 cannot count them.
int64_t checked_product(int64_t rows, int64_t columns);

}  // namespace bstriplet
