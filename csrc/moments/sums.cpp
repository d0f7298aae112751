// Sums over rows, T_c = sum_j u_j u_j^T and A_c = sum_j a_j u_j u_j^T. Each part of a class is
// summed in the accumulation type, the parts in double. Parts depend on sizes alone.
#include "moments/sums.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace bstriplet {
namespace {

// Rows of one sum in the accumulation type: of one class with a slot, or of small classes of one
// size.
struct Part {
  Range range;
  int64_t slot;  // -1 for small classes
  double q;      // of small classes
};

template <class T>
std::vector<Part> small_parts(const ClassRows<T>& rows) {
  const Classes& classes = rows.classes;
  std::vector<Part> parts;
  for (int64_t c = 0, next = 0; c < classes.small(); c = next) {
    while (next < classes.small() && classes.size(next) == classes.size(c)) ++next;
    split({classes.starts[c], classes.starts[next]}, rows.part_rows,
          [&](Range range) { parts.push_back({range, -1, classes.q(c)}); });
  }
  return parts;
}

template <class T>
void add_slot_parts(const ClassRows<T>& rows, int64_t s, std::vector<Part>& parts) {
  split(rows.classes.slot_range(s), rows.part_rows,
        [&](Range range) { parts.push_back({range, s, 0.0}); });
}

// The sum of weighted_i u_i^T over each part: the half that `add_moment` writes.
template <class T>
class PartSums {
 public:
  // weigh(range, scratch) puts the unit rows into scratch.unit and returns the weighted ones.
  template <class Weigh>
  PartSums(const ClassRows<T>& rows, const std::vector<Part>& parts, const Weigh& weigh)
      : size_(checked_product(rows.d, rows.wide)), numbers_(allocated(parts)) {
    const int64_t count = static_cast<int64_t>(parts.size());
    std::vector<int64_t> in_memory(parts.size());  // parts, by their first rows in memory
    std::iota(in_memory.begin(), in_memory.end(), int64_t{0});
    std::sort(in_memory.begin(), in_memory.end(), [&](int64_t a, int64_t b) {
      return rows.lies_before(parts[a].range, parts[b].range);
    });
    const int64_t part_grain = grain(rows.part_rows * rows.d * rows.d / 2);
    parallel_for(0, count, part_grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        T* const sum = (*this)[in_memory[k]];
        std::fill(sum, sum + size_, T(0));
        split(parts[in_memory[k]].range, rows.block_rows, [&](Range range) {
          const auto scratch = rows.scratch(2);
          const Block<const T> weighted = as_const(weigh(range, scratch));
          rows.k.add_moment(weighted, as_const(with_rows(scratch.unit, range.size())), sum,
                            rows.wide);
        });
      }
    });
  }

  T* operator[](int64_t i) const { return numbers_.data() + i * size_; }

 private:
  AlignedArray<T> allocated(const std::vector<Part>& parts) const {
    const int64_t count = static_cast<int64_t>(parts.size());
    return AlignedArray<T>(count == 0 ? 0 : checked_product(size_, count));
  }

  int64_t size_;
  AlignedArray<T> numbers_;
};

// Adds up the parts of `range` into `sum` [D, D], and each times its q into `sum_times_q` [D, D],
// and mirrors both. Either can be null.
template <class T>
void add_up(const ClassRows<T>& rows, const PartSums<T>& sums, const std::vector<Part>& parts,
            Range range, T* sum, T* sum_times_q) {
  const int64_t d = rows.d;
  parallel_for(0, d, grain(range.size() * d), [&](int64_t begin, int64_t end) {
    std::vector<double> line(2 * d);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(line.begin(), line.end(), 0.0);
      for (int64_t part = range.begin; part < range.end; ++part) {
        const T* const from = sums[part] + i * rows.wide;
        const double q = parts[part].q;
        for (int64_t j = i; j < d; ++j) {
          line[j] += static_cast<double>(from[j]);
          line[d + j] += q * static_cast<double>(from[j]);
        }
      }
      for (int64_t j = i; j < d; ++j) {
        if (sum != nullptr) sum[i * d + j] = sum[j * d + i] = static_cast<T>(line[j]);
        if (sum_times_q != nullptr) {
          sum_times_q[i * d + j] = sum_times_q[j * d + i] = static_cast<T>(line[d + j]);
        }
      }
    }
  });
}

// Calls use(slot, range of its parts) for each slot among the parts from `first` on.
template <class Use>
void for_each_sum(const std::vector<Part>& parts, int64_t first, const Use& use) {
  const int64_t count = static_cast<int64_t>(parts.size());
  for (int64_t begin = first, end = first; begin < count; begin = end) {
    while (end < count && parts[end].slot == parts[begin].slot) ++end;
    use(parts[begin].slot, Range{begin, end});
  }
}

// Whether all rows of a range have one weight.
template <class T>
bool is_level(const T* a, Range range) {
  return std::all_of(a + range.begin, a + range.end, [&](T x) { return x == a[range.begin]; });
}

}  // namespace

template <class T>
void add_up_moments(const ClassRows<T>& rows, double eps, const KeptMoments<T>& kept) {
  const T squared_eps = static_cast<T>(eps * eps);
  const int64_t matrix = rows.d * rows.d;
  std::vector<Part> parts = small_parts(rows);
  const int64_t n_small = static_cast<int64_t>(parts.size());
  for (int64_t s = 0; s < rows.classes.slots; ++s) add_slot_parts(rows, s, parts);
  const PartSums<T> sums(rows, parts, [&](Range range, const auto& scratch) {
    rows.read(range, scratch.unit);
    const Block<T> unit = with_rows(scratch.unit, range.size());
    T* const inverse = kept.inverse + range.begin;
    rows.k.squared_norms({unit.data, unit.rows, rows.d, rows.stride}, inverse, 0, unit.rows);
    invert_norms(inverse, unit.rows, squared_eps);
    rows.k.scale_rows(unit, inverse);
    return unit;
  });
  add_up(rows, sums, parts, {0, n_small}, kept.small, kept.small + matrix);
  for_each_sum(parts, n_small, [&](int64_t s, Range range) {
    add_up<T>(rows, sums, parts, range, kept.slots + s * matrix, nullptr);
  });
}

template <class T>
ClassMatrices<T> moments_of(const ClassRows<T>& rows, const KeptMoments<const T>& kept) {
  std::vector<typename ClassMatrices<T>::Slot> slots;
  for (int64_t s = 0; s < rows.classes.slots; ++s) {
    slots.push_back({kept.slots + s * rows.d * rows.d, 1.0, 1.0});
  }
  return ClassMatrices<T>(rows.classes, rows.d, std::move(slots), kept.small);
}

template <class T>
ClassMatrices<T> weighted_moments_of(const ClassRows<T>& rows, const KeptMoments<const T>& kept,
                                     const T* a) {
  const Classes& classes = rows.classes;
  const int64_t matrix = rows.d * rows.d;
  std::vector<T> small(matrix);   // the sum of q_c A_c over the small classes
  std::vector<T> numbers;         // A_c of the classes whose rows differ in weight
  std::vector<typename ClassMatrices<T>::Slot> slots;
  {
    std::vector<Part> parts;
    const bool small_is_level = is_level(a, classes.small_rows());
    if (!small_is_level) parts = small_parts(rows);
    const int64_t n_small = static_cast<int64_t>(parts.size());
    int64_t mixed = 0;
    for (int64_t s = 0; s < classes.slots; ++s) {
      const Range range = classes.slot_range(s);
      const double q = classes.q(classes.small() + s);
      if (is_level(a, range)) {
        slots.push_back({kept.slots + s * matrix, static_cast<double>(a[range.begin]), q});
      } else {
        slots.push_back({nullptr, 1.0, q});
        add_slot_parts(rows, s, parts);
        ++mixed;
      }
    }
    const PartSums<T> sums(rows, parts, [&](Range range, const auto& scratch) {
      const Block<T> unit = rows.read_units(range, scratch.unit);
      const Block<T> weighted = with_rows(scratch.result, range.size());
      std::copy(unit.data, unit.row(unit.rows), weighted.data);
      rows.k.scale_rows(weighted, a + range.begin);
      return weighted;
    });
    if (!small_is_level) {
      add_up<T>(rows, sums, parts, {0, n_small}, nullptr, small.data());
    } else if (classes.small() > 0) {
      const T* const times_q = kept.small + matrix;
      for (int64_t at = 0; at < matrix; ++at) small[at] = a[0] * times_q[at];
    }
    numbers.resize(mixed * matrix);
    T* next = numbers.data();
    for_each_sum(parts, n_small, [&](int64_t s, Range range) {
      add_up<T>(rows, sums, parts, range, next, nullptr);
      slots[s].numbers = next;
      next += matrix;
    });
  }
  return ClassMatrices<T>(classes, rows.d, std::move(slots), small.data(), std::move(numbers));
}

template void add_up_moments(const ClassRows<float>&, double, const KeptMoments<float>&);
template void add_up_moments(const ClassRows<double>&, double, const KeptMoments<double>&);
template ClassMatrices<float> moments_of(const ClassRows<float>&, const KeptMoments<const float>&);
template ClassMatrices<double> moments_of(const ClassRows<double>&,
                                          const KeptMoments<const double>&);
template ClassMatrices<float> weighted_moments_of(const ClassRows<float>&,
                                                  const KeptMoments<const float>&, const float*);
template ClassMatrices<double> weighted_moments_of(const ClassRows<double>&,
                                                   const KeptMoments<const double>&, const double*);

}  // namespace bstriplet
