// The table of kernels that the CPU's operators call. The kernels are compiled once for each
// instruction set, so nothing here may instantiate a template of the standard library: the linker
// would be free to keep the copy that older processors cannot run.
#pragma once

#include <cstdint>

namespace bstriplet {

inline constexpr int64_t kPad = 16;          // elements of the widest vector
inline constexpr int64_t kWidestPanel = 32;  // the most that `Kernels::panel` can be
inline constexpr int64_t kTile = 12;         // rows and columns of S that `dots` computes at once
inline constexpr int64_t kRowGroup = 96;     // rows that share one packed panel in `product`

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix whose rows have unit stride. After its last column each row has readable zeros up to a
// multiple of kPad.
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

// The rows of the loss or its columns, one entry for each embedding. Arrays are padded to a
// multiple of kPad, class numbers with -1 and all others with 0, so that padding adds nothing to a
// sum.
template <class T>
struct Side {
  T* inverse;        // 1 / |f_i|, 0 for a zero row, NaN where |f_i|^2 overflows
  Class<T>* label;   // dense class numbers
  T* per_positive;   // a_i / N_i+: minus the row's share of w_ij for each of its positives
  T* per_negative;   // sigma a_i / N_i-: its share of w_ij for each of its negatives
};

// Consecutive rows of a scratch, `stride` elements apart. After its last column each row has
// readable zeros up to a multiple of kWidestPanel.
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
  // For S of rows x columns; the moments use `dots` and `squared_norms` too. is_signed: phi(s) is
  // s|s| instead of s^2.

  // Writes the raw dot products of tiles [begin, end) to s and, transposed, to mirror, unless that
  // is null. If `squared` is not null, columns must be the rows: only tiles on and below the
  // diagonal count, the diagonal of s becomes 0, and squared[i] = |f_i|^2.
  void (*dots)(const Matrix<T>& rows, const Matrix<T>& columns, T* s, int64_t s_stride, T* mirror,
               int64_t mirror_stride, T* squared, int64_t begin, int64_t end);
  // |f_i|^2 of rows [begin, end).
  void (*squared_norms)(const Matrix<T>& rows, T* squared, int64_t begin, int64_t end);
  // The sums of phi(s_ij) over row i's own class and over the others, from its `padded` raw
  // products.
  void (*row_sums)(const T* raw, T inverse, Class<T> label, const Side<T>& columns, int64_t padded,
                   bool is_signed, T* positive, T* negative);
  // Turns row i's raw products into w_ij phi'(s_ij) / |f_j|; returns sum_j w_ij phi'(s_ij) s_ij.
  T (*row_weights)(T* raw, const Side<T>& rows, int64_t i, const Side<T>& columns, int64_t padded,
                   bool is_signed);
  // Units [begin, end) of gradient_i = (sum_j w_ij f_j - (along_i / |f_i|) f_i) / |f_i|. A unit is
  // kRowGroup rows of one panel of columns. packed has room for others.rows x panel.
  void (*product)(const T* weights, int64_t weights_stride, const Matrix<T>& others,
                  const Matrix<T>& own, const T* inverse, const T* along, T* gradient, T* packed,
                  int64_t begin, int64_t end);

  int64_t panel;  // columns that are computed at once

  // Over unit rows u_i, the rows of a Block, for the second moments. A packed matrix M [D, D] is
  // panels of `panel` columns, D lines each: panel p begins at M + p D panel.

  // rows_i *= factor_i.
  void (*scale_rows)(Block<T> rows, const T* factor);
  // total [D, D] += sum_i weighted_i^T unit_i: in each panel the lines down to its last column.
  void (*add_moment)(Block<const T> weighted, Block<const T> unit, T* total, int64_t total_stride);
  // form_i = u_i^T M u_i. Reads the lines of each panel down to its last column. Those above its
  // diagonal block must be doubled, since they stand for the ones below as well.
  void (*quadratic_forms)(Block<const T> unit, const T* packed, T* form);
  // result_i = factor_i u_i M, or += where `add` is true. If factor is null, factor_i = 1.
  void (*multiply_rows)(Block<const T> unit, const T* packed, const T* factor, bool add,
                        Block<T> result);
  // result_i += sum_j weights[i][j] u_j; weights are square.
  void (*add_weighted_rows)(const T* weights, int64_t weights_stride, Block<const T> unit,
                            Block<T> result);
  // v_i = (v_i - (v_i . u_i) u_i) inverse_i.
  void (*through_normalisation)(Block<T> v, Block<const T> unit, const T* inverse);

  // Half precision to float.
  void (*widen_bfloat16)(const uint16_t* from, float* to, int64_t n);
  void (*widen_float16)(const uint16_t* from, float* to, int64_t n);
};

// How many tiles `dots` counts.
inline int64_t tile_count(int64_t rows, int64_t columns, bool symmetric) {
  const int64_t down = round_up(rows, kTile) / kTile;
  const int64_t across = round_up(columns, kTile) / kTile;
  return symmetric ? down * (down + 1) / 2 : down * across;
}

// The kernels of each instruction set. Baseline runs on every processor of the architecture: SSE2
// on x86-64, NEON on arm64.
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
