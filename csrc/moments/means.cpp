// The forward: Eq. 3's two means of each row as quadratic forms,
//
//   positive = p_c (u^T T_c u - |u|^4)        negative = q_c u^T (T - T_c) u.
#include <vector>

#include "moments/packing.h"
#include "moments/sums.h"

namespace bstriplet {
namespace {

// Rows of the classes with slots.
template <class T>
void large_means(const ClassRows<T>& rows, const ClassMatrices<T>& moments, T* positive,
                 T* negative) {
  const Classes& classes = rows.classes;
  for_each_slot(
      rows,
      [&](int64_t s, int64_t panel, T* const* packed) {
        const auto t_c = moments[s];
        pack_half(rows, panel, packed[0], [t_c](int64_t at) { return t_c.own(at); });
        pack_half(rows, panel, packed[1], [t_c](int64_t at) { return t_c.others(at); });
      },
      [&](int64_t s, Range range, T* const* packed) {
        const int64_t c = classes.small() + s;
        const T p = static_cast<T>(classes.p(c)), q = static_cast<T>(classes.q(c));
        const auto scratch = rows.scratch(1);
        const Block<const T> unit = as_const(rows.read_units(range, scratch.unit));
        const T* const own = scratch.form;
        const T* const others = scratch.other_form;
        rows.k.quadratic_forms(unit, packed[0], scratch.form);
        rows.k.quadratic_forms(unit, packed[1], scratch.other_form);
        for (int64_t i = 0; i < range.size(); ++i) {
          const int64_t at = rows.order[range.begin + i];
          positive[at] = p * (own[i] - rows.self(range.begin + i));
          negative[at] = q * others[i];
        }
      });
}

// Rows of the small classes: S of the class replaces T_c. The form of T - T_c is that of T less the
// class's own sum.
template <class T>
void small_means(const ClassRows<T>& rows, const ClassMatrices<T>& moments, T* positive,
                 T* negative) {
  const Classes& classes = rows.classes;
  if (classes.small() == 0) return;
  const AlignedArray<T> packed(packed_size(rows));
  for (int64_t panel = 0; panel < panel_count(rows); ++panel) {
    pack_half(rows, panel, packed.data(), [&](int64_t at) { return moments.all(at); });
  }
  const auto group_means = [&](Range group) {
    const Range range = rows.rows_of(group);
    const auto scratch = rows.scratch(1);
    const Block<T> unit = rows.read_units(range, scratch.unit);
    rows.k.quadratic_forms(as_const(unit), packed.data(), scratch.form);
    for (int64_t c = group.begin; c < group.end; ++c) {
      const int64_t members = classes.size(c), first = classes.starts[c] - range.begin;
      const T p = static_cast<T>(classes.p(c)), q = static_cast<T>(classes.q(c));
      const T* const all = scratch.form + first;
      T* const own = scratch.other_form;
      own[0] = 0;
      if (members > 1) {
        rows.similarities(unit.row(first), members, scratch);
        rows.k.squared_norms({scratch.similarity, members, members, scratch.similarity_stride},
                             own, 0, members);
      }
      for (int64_t i = 0; i < members; ++i) {
        const int64_t at = rows.order[classes.starts[c] + i];
        positive[at] = p * own[i];
        negative[at] = q * (all[i] - own[i] - rows.self(classes.starts[c] + i));
      }
    }
  };
  const std::vector<Range> groups = rows.small_class_groups();
  parallel_for(0, static_cast<int64_t>(groups.size()), rows.block_grain(),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) group_means(groups[i]);
               });
}

}  // namespace

template <class T>
void means_by_moments(const Sorted& sorted, double eps, const KeptMoments<T>& kept, T* positive,
                      T* negative) {
  const ClassRows<T> rows(sorted, kept.inverse);
  add_up_moments(rows, eps, kept);
  const ClassMatrices<T> moments =
      moments_of(rows, KeptMoments<const T>{kept.inverse, kept.slots, kept.small});
  small_means(rows, moments, positive, negative);
  large_means(rows, moments, positive, negative);
}

template void means_by_moments(const Sorted&, double, const KeptMoments<float>&, float*, float*);
template void means_by_moments(const Sorted&, double, const KeptMoments<double>&, double*, double*);

}  // namespace bstriplet
