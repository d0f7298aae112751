// The backward: dL/du = K_c (a u) + B_c u for a row u of class c, then through the normalisation.
//
//   K_c = 2 (sigma q_c (T - T_c) - p_c T_c)                   from the row's own loss
//   B_c = 2 (sigma (sum of the other q_k A_k) - p_c A_c)      from losses with u as a column
//
// The diagonal's part is parallel to u, and the normalisation takes it out.
#include <algorithm>
#include <cstring>
#include <vector>

#include "moments/packing.h"
#include "moments/sums.h"

namespace bstriplet {
namespace {

// Turns dL/du into dL/df and writes the rows to their places.
template <class T>
void write(const ClassRows<T>& rows, Range range, Block<T> v, Block<const T> unit, T* result) {
  const int64_t bytes = rows.d * static_cast<int64_t>(sizeof(T));
  rows.k.through_normalisation(v, unit, rows.inverse + range.begin);
  for (int64_t i = 0; i < range.size(); ++i) {
    if (i + kAhead < range.size()) {
      const T* const later = result + rows.order[range.begin + i + kAhead] * rows.d;
      prefetch(reinterpret_cast<const char*>(later), bytes, true);
    }
    std::memcpy(result + rows.order[range.begin + i] * rows.d, v.row(i), bytes);
  }
}

// Rows of the classes with slots. Where the rows of a class share one a, A_c = a T_c, and one
// matrix a K_c + B_c serves them.
template <class T>
void large_gradient(const ClassRows<T>& rows, const ClassMatrices<T>& moments,
                    const ClassMatrices<T>& weighted, const T* a, double sigma, T* result) {
  const Classes& classes = rows.classes;
  for_each_slot(
      rows,
      [&](int64_t s, int64_t panel, T* const* packed) {
        const int64_t c = classes.small() + s;
        const double p = classes.p(c), q = classes.q(c);
        const auto t_c = moments[s], a_c = weighted[s];
        const auto own_share = [=](int64_t at) {
          return 2 * (sigma * q * t_c.others(at) - p * t_c.own(at));
        };
        const auto others_share = [=](int64_t at) {
          return 2 * (sigma * a_c.others(at) - p * a_c.own(at));
        };
        if (weighted.is_multiple_of(moments, s)) {
          pack(rows, panel, packed[0],
               [=](int64_t at) { return a_c.factor * own_share(at) + others_share(at); });
        } else {
          pack(rows, panel, packed[0], own_share);
          pack(rows, panel, packed[1], others_share);
        }
      },
      [&](int64_t s, Range range, T* const* packed) {
        const auto scratch = rows.scratch(2);
        const Block<const T> unit = as_const(rows.read_units(range, scratch.unit));
        const Block<T> v = with_rows(scratch.result, range.size());
        if (weighted.is_multiple_of(moments, s)) {
          rows.k.multiply_rows(unit, packed[0], nullptr, false, v);
        } else {
          rows.k.multiply_rows(unit, packed[0], a + range.begin, false, v);
          rows.k.multiply_rows(unit, packed[1], nullptr, true, v);
        }
        write(rows, range, v, unit, result);
      });
}

// Corrects dL/du of a small class, whose rows begin at `first` of the scratch. The sums over all
// rows count its pairs as negatives: takes that out and adds them as positives.
template <class T>
void add_own_class(const ClassRows<T>& rows, int64_t c, int64_t first, const T* a, double sigma,
                   const typename ClassRows<T>::Scratch& scratch) {
  const Classes& classes = rows.classes;
  const int64_t members = classes.size(c);
  if (members == 1) return;
  const Block<const T> unit{scratch.unit.row(first), members, rows.d, rows.stride};
  const Block<T> v{scratch.result.row(first), members, rows.d, rows.stride};
  rows.similarities(unit.data, members, scratch);
  const T taken_out = static_cast<T>(-2 * sigma * classes.q(c));
  const T scale = taken_out - static_cast<T>(2 * classes.p(c));
  const T* const own_a = a + classes.starts[c];
  for (int64_t i = 0; i < members; ++i) {
    T* const s = scratch.similarity + i * scratch.similarity_stride;
    for (int64_t j = 0; j < members; ++j) s[j] *= scale * (own_a[i] + own_a[j]);
  }
  rows.k.add_weighted_rows(scratch.similarity, scratch.similarity_stride, unit, v);
}

// Rows of the small classes: as if all rows were of other classes, corrected by `add_own_class`.
template <class T>
void small_gradient(const ClassRows<T>& rows, const ClassMatrices<T>& moments,
                    const ClassMatrices<T>& weighted, const T* a, double sigma, T* result) {
  const Classes& classes = rows.classes;
  if (classes.small() == 0) return;
  const AlignedArray<T> own_share(packed_size(rows)), others_share(packed_size(rows));
  for (int64_t panel = 0; panel < panel_count(rows); ++panel) {
    pack(rows, panel, own_share.data(), [&](int64_t at) { return 2 * sigma * moments.all(at); });
    pack(rows, panel, others_share.data(),
         [&](int64_t at) { return 2 * sigma * weighted.all(at); });
  }
  std::vector<T> a_times_q(classes.small_rows().size());
  for (int64_t c = 0; c < classes.small(); ++c) {
    for (int64_t i = classes.starts[c]; i < classes.starts[c + 1]; ++i) {
      a_times_q[i] = a[i] * static_cast<T>(classes.q(c));
    }
  }
  const T level = a_times_q[0];
  const bool is_level =
      std::all_of(a_times_q.begin(), a_times_q.end(), [&](T x) { return x == level; });
  if (is_level) {  // one matrix serves all rows
    for (int64_t i = 0; i < packed_size(rows); ++i) {
      others_share.data()[i] += level * own_share.data()[i];
    }
  }
  const auto group_gradient = [&](Range group) {
    const Range range = rows.rows_of(group);
    const auto scratch = rows.scratch(2);
    const Block<const T> unit = as_const(rows.read_units(range, scratch.unit));
    const Block<T> v = with_rows(scratch.result, range.size());
    rows.k.multiply_rows(unit, others_share.data(), nullptr, false, v);
    if (!is_level) {
      rows.k.multiply_rows(unit, own_share.data(), a_times_q.data() + range.begin, true, v);
    }
    for (int64_t c = group.begin; c < group.end; ++c) {
      add_own_class(rows, c, classes.starts[c] - range.begin, a, sigma, scratch);
    }
    write(rows, range, v, unit, result);
  };
  const std::vector<Range> groups = rows.small_class_groups();
  parallel_for(0, static_cast<int64_t>(groups.size()), rows.block_grain(),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) group_gradient(groups[i]);
               });
}

}  // namespace

template <class T>
void gradient_by_moments(const Sorted& sorted, const KeptMoments<const T>& kept, const T* a,
                         double sigma, T* result) {
  const ClassRows<T> rows(sorted, kept.inverse);
  const int64_t numbers = rows.classes.rows() * rows.d;
  if (std::all_of(a, a + rows.classes.rows(), [](T x) { return x == 0; })) {
    std::fill(result, result + numbers, T(0));
    return;
  }
  const ClassMatrices<T> weighted = weighted_moments_of(rows, kept, a);
  const ClassMatrices<T> moments = moments_of(rows, kept);
  map_pages(result, numbers * static_cast<int64_t>(sizeof(T)));
  small_gradient(rows, moments, weighted, a, sigma, result);
  large_gradient(rows, moments, weighted, a, sigma, result);
}

template void gradient_by_moments(const Sorted&, const KeptMoments<const float>&, const float*,
                                  double, float*);
template void gradient_by_moments(const Sorted&, const KeptMoments<const double>&, const double*,
                                  double, double*);

}  // namespace bstriplet
