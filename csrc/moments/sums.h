// Sums over the rows of classes: T_c, and A_c of the gradient.
#pragma once

#include "moments/class_matrices.h"
#include "moments/class_rows.h"

namespace bstriplet {

// Fills `kept`: 1 / |f_i|, T_c of the classes with slots, and sums over the small classes.
template <class T>
void add_up_moments(const ClassRows<T>& rows, double eps, const KeptMoments<T>& kept);

// T_c with weights 1, from `kept`.
template <class T>
ClassMatrices<T> moments_of(const ClassRows<T>& rows, const KeptMoments<const T>& kept);

// A_c with weights q_c, for a = dL/dl [h > 0] in class order. Where the rows of a class share one
// a, A_c is that multiple of T_c.
template <class T>
ClassMatrices<T> weighted_moments_of(const ClassRows<T>& rows, const KeptMoments<const T>& kept,
                                     const T* a);

}  // namespace bstriplet
