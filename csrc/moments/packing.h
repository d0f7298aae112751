// Symmetric matrices [D, D] as the kernels read them: panels of columns, one after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "moments/class_rows.h"

namespace bstriplet {

inline constexpr int64_t kPackedNumbers = 1 << 21;  // of the matrices that are packed at once

template <class T>
int64_t panel_count(const ClassRows<T>& rows) {
  return round_up(rows.d, rows.k.panel) / rows.k.panel;
}

// Numbers of one packed matrix.
template <class T>
int64_t packed_size(const ClassRows<T>& rows) {
  return panel_count(rows) * rows.k.panel * rows.d;
}

// Packs panel p for `multiply_rows`; the matrix has element(i D + j) at (i, j).
template <class T, class ElementAt>
void pack(const ClassRows<T>& rows, int64_t p, T* packed, const ElementAt& element) {
  const int64_t panel = rows.k.panel, left = p * panel, width = std::min(panel, rows.d - left);
  T* to = packed + left * rows.d;
  for (int64_t i = 0; i < rows.d; ++i, to += panel) {
    for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(element(i * rows.d + left + j));
    std::fill(to + width, to + panel, T(0));
  }
}

// Packs panel p for `quadratic_forms`: the lines down to its last column, doubled above its
// diagonal block.
template <class T, class ElementAt>
void pack_half(const ClassRows<T>& rows, int64_t p, T* packed, const ElementAt& element) {
  const int64_t panel = rows.k.panel, left = p * panel, width = std::min(panel, rows.d - left);
  T* to = packed + left * rows.d;
  for (int64_t i = 0; i < left + width; ++i, to += panel) {
    const T scale = i < left ? T(2) : T(1);
    for (int64_t j = 0; j < width; ++j) {
      to[j] = scale * static_cast<T>(element(i * rows.d + left + j));
    }
    std::fill(to + width, to + panel, T(0));
  }
}

// Serves the rows of each class with a slot by two packed matrices. Takes as many classes at once
// as kPackedNumbers has room for: first make(slot, panel, matrices) packs each panel, then
// use(slot, range, matrices) runs for each block of rows.
template <class T, class Make, class Use>
void for_each_slot(const ClassRows<T>& rows, const Make& make, const Use& use) {
  const Classes& classes = rows.classes;
  if (classes.slots == 0) return;
  const int64_t size = packed_size(rows), panels = panel_count(rows);
  const int64_t most = std::clamp<int64_t>(kPackedNumbers / (2 * size), 1, classes.slots);
  const AlignedArray<T> packed(checked_product(most, 2 * size));
  struct Unit {
    int64_t slot;
    Range range;
  };
  std::vector<Unit> units;
  for (int64_t first = 0; first < classes.slots; first += most) {
    const int64_t last = std::min(first + most, classes.slots);
    const auto with_matrices = [&](int64_t s, const auto& run) {
      T* const one = packed.data() + (s - first) * 2 * size;
      T* const matrices[2] = {one, one + size};
      run(matrices);
    };
    parallel_for(0, (last - first) * panels, grain(8 * rows.d * rows.k.panel),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t s = first + i / panels;
                     with_matrices(s, [&](T* const* m) { make(s, i % panels, m); });
                   }
                 });
    units.clear();
    for (int64_t s = first; s < last; ++s) {
      split(classes.slot_range(s), rows.block_rows,
            [&](Range range) { units.push_back({s, range}); });
    }
    std::sort(units.begin(), units.end(),
              [&](const Unit& a, const Unit& b) { return rows.lies_before(a.range, b.range); });
    parallel_for(0, static_cast<int64_t>(units.size()), rows.block_grain(),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const auto& [s, range] = units[i];
                     with_matrices(s, [&](T* const* m) { use(s, range, m); });
                   }
                 });
  }
}

}  // namespace bstriplet
