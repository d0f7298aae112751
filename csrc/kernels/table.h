// The kernels of one instruction set, written once: the including file defines BST_ISA (their
// namespace), BST_VECTOR_BYTES and BST_REGISTERS (how many vector registers there are).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/kernels.h"

#if defined(__GNUC__)
#define BST_INLINE inline __attribute__((always_inline))
#define BST_UNROLL _Pragma("GCC unroll 16")
#else
#define BST_INLINE inline
#define BST_UNROLL
#endif

// The files included here are parts of this namespace and have none of their own.
namespace bstriplet::BST_ISA {
namespace {

// The files after each of these two use it.
#include "kernels/vec.h"

#include "kernels/tiles.h"

#include "kernels/halves.h"
#include "kernels/pairs.h"
#include "kernels/unit_rows.h"

template <class T>
constexpr Kernels<T> table() {
  return {dots<T>,
          squared_norms<T>,
          row_sums<T>,
          row_weights<T>,
          product<T>,
          kPanel<T>,
          scale_rows<T>,
          add_moment<T>,
          quadratic_forms<T>,
          multiply_rows<T>,
          add_weighted_rows<T>,
          through_normalisation<T>,
          widen_bfloat16,
          widen_float16};
}

}  // namespace

const Kernels<float>& float_kernels() {
  static constexpr Kernels<float> kernels = table<float>();
  return kernels;
}

const Kernels<double>& double_kernels() {
  static constexpr Kernels<double> kernels = table<double>();
  return kernels;
}

}  // namespace bstriplet::BST_ISA
