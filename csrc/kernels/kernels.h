// What the operator's driver and the vectorised kernels agree on. The kernels are compiled once for
// each instruction set, so nothing here may instantiate a template of the standard library: the
// linker would be free to keep the copy that older processors cannot run.
#pragma once

#include <cstdint>

namespace bstriplet {

inline constexpr int64_t kPad = 16;        // the widest vector, in elements
inline constexpr int64_t kWidestPanel = 32;  // of `product`, in elements
inline constexpr int64_t kBlock = 12;      // rows and columns of a tile of S
inline constexpr int64_t kRowGroup = 96;   // rows that share one packed panel in `product`

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of a matrix [rows, columns] with unit stride along a row; each row is readable, and zero,
// from its last column up to a multiple of kPad.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  const T* row(int64_t i) const { return data + i * stride; }
};

// An integer as wide as T, so that a comparison of class numbers masks a vector of T.
template <class T>
struct ClassOf;
template <>
struct ClassOf<float> {
  using type = int32_t;
};
template <>
struct ClassOf<double> {
  using type = int64_t;
};
template <class T>
using Class = typename ClassOf<T>::type;

// Loss rows or columns, one entry for each embedding; arrays are padded to a multiple of kPad.
// For class numbers the padding is -1, for all others 0, so that padding adds nothing to a sum.
template <class T>
struct Side {
  T* inverse;        // 1 / |f_i|, 0 for a zero row, NaN where |f_i|^2 overflows
  Class<T>* label;   // dense class numbers
  T* per_positive;   // a_i / N_i+: the row's share of dL/ds for each of its positives
  T* per_negative;   // sigma a_i / N_i-
};

struct Similarity {
  bool is_signed;  // phi(s) = s|s| instead of s^2
};

// Consecutive rows, `stride` elements apart, of a scratch; a row is readable, and zero, from its last
// column up to a multiple of kWidestPanel.
template <class T>
struct Block {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
};

// The kernels of one instruction set for one accumulation type.
template <class T>
struct Kernels {
  // Raw dot products of tiles [begin, end) of rows x columns into s and, transposed, into mirror if there is one.
  // With `squared`, columns are the rows, only tiles on or below the diagonal are counted, and
  // squared[i] = |f_i|^2 comes from the diagonal.
  void (*dots)(const Matrix<T>& rows, const Matrix<T>& columns, T* s, int64_t s_stride, T* mirror,
               int64_t mirror_stride, T* squared, int64_t begin, int64_t end);
  // |f_i|^2 of rows [begin, end).
  void (*squared_norms)(const Matrix<T>& rows, T* squared, int64_t begin, int64_t end);
  // The sums of phi(s_ij) over row i's own class and over the others, for one row of raw products
  // of `padded` elements.
  void (*row_sums)(const T* raw, T inverse, Class<T> label, const Side<T>& columns, int64_t padded,
                   Similarity similarity, T* positive, T* negative);
  // Turns a row of raw products into w_ij phi'(s_ij) / |f_j| and returns sum_j w_ij phi'(s_ij) s_ij.
  T (*row_weights)(T* raw, const Side<T>& rows, int64_t i, const Side<T>& columns, int64_t padded,
                   Similarity similarity);
  // Units [begin, end) of gradient_i = (sum_j w_ij f_j - (along_i / |f_i|) f_i) / |f_i|, where a
  // unit is kRowGroup rows of one panel of columns. packed has room for others.rows x panel.
  void (*product)(const T* weights, int64_t weights_stride, const Matrix<T>& others,
                  const Matrix<T>& own, const T* inverse, const T* along, T* gradient, T* packed,
                  int64_t begin, int64_t end);
  int64_t panel;  // columns of the gradient that one unit of `product` writes

  // Second moments. Unit rows u_i are the rows of a Block; a packed matrix M [D, D] is panels of
  // `panel` columns, D lines each, so that panel p begins at M + p D panel.

  // rows_i *= factor_i.
  void (*scale_rows)(Block<T> rows, const T* factor);
  // total += sum_i weighted_i^T unit_i [D, D], from the first line down to each panel's diagonal.
  void (*add_moment)(Block<const T> weighted, Block<const T> unit, T* total, int64_t total_stride);
  // form_i = u_i^T M u_i, of a panel the lines down to its last column: what stands above the
  // panel's diagonal block counts for what stands below, so it has to be doubled.
  void (*forms)(Block<const T> unit, const T* packed, T* form);
  // result_i = factor_i u_i M, or where `add` is true that is added; factor null: 1.
  void (*multiply)(Block<const T> unit, const T* packed, const T* factor, bool add, Block<T> result);
  // result_i += sum_j weights[i][j] u_j, for as many weights a row as there are unit rows.
  void (*add_block)(const T* weights, int64_t weights_stride, Block<const T> unit, Block<T> result);
  // v_i = (v_i - (v_i . u_i) u_i) inverse_i.
  void (*through_normalisation)(Block<T> v, Block<const T> unit, const T* inverse);

  // Half precision rows to float.
  void (*widen_bfloat16)(const uint16_t* from, float* to, int64_t n);
  void (*widen_float16)(const uint16_t* from, float* to, int64_t n);
};

// Number of tiles that `dots` counts.
inline int64_t tiles(int64_t rows, int64_t columns, bool symmetric) {
  const int64_t down = round_up(rows, kBlock) / kBlock;
  const int64_t across = round_up(columns, kBlock) / kBlock;
  return symmetric ? down * (down + 1) / 2 : down * across;
}

// The kernels compiled for each instruction set. Baseline is what the compiler was told to assume:
// SSE2 on x86-64, NEON on arm64.
namespace baseline {
const Kernels<float>& float_kernels();
const Kernels<double>& double_kernels();
}  // namespace baseline
namespace avx2 {
const Kernels<float>& float_kernels();
const Kernels<double>& double_kernels();
}  // namespace avx2
namespace avx512 {
const Kernels<float>& float_kernels();
const Kernels<double>& double_kernels();
}  // namespace avx512

}  // namespace bstriplet
