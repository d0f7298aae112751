// The second-moment path on the CPU: Eq. 3 and its gradient in time linear in the batch, without an
// N x N matrix. bstriplet_kernels/paths/moments/mathematics.py has the mathematics, with the same
// names.
//
// Rows are put in class order, classes by size. A large class is served by its moment matrix T_c, a
// small one by S of its own members; every row also meets the moments of all others.
//
//   sums      T_c, the half on one side of the diagonal: about N D^2 / 2 multiply-adds. A_c, where
//             the rows of a class differ in weight: as many again
//   means     u^T T_c u and u^T (T - T_c) u by halves: N D^2; for a small class only u^T T u
//   gradient  u times one matrix where the rows of a class share one weight: N D^2; else times two
//
// The embeddings are read three times, four with A_c; the gradient is written once. Each time a
// block of rows is gathered, widened and normalised into a cache-sized scratch, where the products
// find it.
//
// Sums over many rows are added up in double, by parts that depend on sizes alone. So the bits
// depend on neither the number of threads nor chance.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace bstriplet {

// Consecutive rows in class order.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// The classes by size, smallest first. The last `slots` of them, the large ones, have moment
// matrices.
struct Classes {
  std::vector<int64_t> starts{0};
  int64_t slots = 0;

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t rows() const { return starts.back(); }
  int64_t size(int64_t c) const { return starts[c + 1] - starts[c]; }
  int64_t small() const { return count() - slots; }
  Range slot_range(int64_t s) const { return {starts[small() + s], starts[small() + s + 1]}; }
  Range small_rows() const { return {0, starts[small()]}; }
  int64_t largest_small() const { return small() > 0 ? size(small() - 1) : 0; }
  // The class with more than half of the rows, or -1. It must have a slot: T - T_c would cancel.
  int64_t dominating() const {
    return count() > 0 && 2 * size(count() - 1) > rows() ? count() - 1 : -1;
  }
  // Eq. 3's weights of a row: one over its positives, and over its negatives; 0 if it has none.
  double p(int64_t c) const { return size(c) > 1 ? 1.0 / static_cast<double>(size(c) - 1) : 0.0; }
  double q(int64_t c) const {
    return size(c) < rows() ? 1.0 / static_cast<double>(rows() - size(c)) : 0.0;
  }
};

// Embeddings, their classes, and their rows in class order.
struct Sorted {
  StridedRows embeddings;
  const Classes& classes;
  const int64_t* order;
};

// What the forward keeps for the backward; rows in class order.
template <class T>
struct KeptMoments {
  T* inverse;  // [N], 1 / |f_i|
  T* slots;    // [slots, D, D], T_c of the large classes
  T* small;    // [2, D, D], the sums of T_c and of q_c T_c over the small classes
};

// Fills `kept`, and Eq. 3's two means of each row; means are in the order of the embeddings.
template <class T>
void means_by_moments(const Sorted& rows, double eps, const KeptMoments<T>& kept, T* positive,
                      T* negative);

// dL/df [N, D], in the order of the embeddings, for a = dL/dl [h > 0] in class order.
template <class T>
void gradient_by_moments(const Sorted& rows, const KeptMoments<const T>& kept, const T* a,
                         double sigma, T* result);

}  // namespace bstriplet
