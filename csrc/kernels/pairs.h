// The vectorised kernels, written once and compiled for each instruction set: the including file
// defines BST_ISA (its namespace), BST_VECTOR_BYTES and BST_REGISTERS (vector registers).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/kernels.h"

#if defined(__GNUC__)
#define BST_UNROLL _Pragma("GCC unroll 16")
#else
#define BST_UNROLL
#endif

namespace bstriplet::BST_ISA {
namespace {

#include "kernels/vec.h"

// Accumulators fill the registers, less one operand of each side.
constexpr int kDotRows = BST_REGISTERS == 32 ? 6 : 3;
constexpr int kDotColumns = 4;
constexpr int kProductRows = BST_REGISTERS == 32 ? 12 : 6;
constexpr int kProductVectors = 2;
static_assert(kBlock % kDotRows == 0 && kBlock % kDotColumns == 0);
static_assert(kRowGroup % kProductRows == 0);

// Elements of a row that `dots` takes at a time: a tile's rows of both sides stay in a 32 KiB cache.
template <class T>
constexpr int64_t kDepth = 2048 / sizeof(T);

// out[r * kBlock + c] += rows[r] . columns[c] over `depth` elements from `from`.
template <class T>
BST_INLINE void dot_tile(const T* const* rows, const T* const* columns, int64_t from, int64_t depth,
                         T* out) {
  Vec<T> acc[kDotRows][kDotColumns] = {};
  for (int64_t k = from; k < from + depth; k += kLanes<T>) {
    Vec<T> a[kDotRows];
    BST_UNROLL
    for (int r = 0; r < kDotRows; ++r) a[r] = load(rows[r] + k);
    BST_UNROLL
    for (int c = 0; c < kDotColumns; ++c) {
      const Vec<T> b = load(columns[c] + k);
      BST_UNROLL
      for (int r = 0; r < kDotRows; ++r) acc[r][c] = multiply_add<T>(a[r], b, acc[r][c]);
    }
  }
  BST_UNROLL
  for (int r = 0; r < kDotRows; ++r) add_four_sums<T>(acc[r], out + r * kBlock);
}

// One kBlock x kBlock tile of raw products. Below a tile's edge the last row stands in for the
// missing ones, so that nothing is read beyond the matrix; what they give is not stored.
template <class T>
void block_dots(const Matrix<T>& rows, const Matrix<T>& columns, int64_t top, int64_t left,
                bool on_diagonal, T* out) {
  const T* row[kBlock];
  const T* column[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    row[i] = rows.row(top + i < rows.rows ? top + i : rows.rows - 1);
    column[i] = columns.row(left + i < columns.rows ? left + i : columns.rows - 1);
  }
  std::memset(out, 0, kBlock * kBlock * sizeof(T));
  const int64_t padded = round_up(rows.columns, kPad);
  for (int64_t from = 0; from < padded; from += kDepth<T>) {
    const int64_t rest = padded - from;
    const int64_t depth = rest < kDepth<T> ? rest : kDepth<T>;
    for (int r = 0; r < kBlock && top + r < rows.rows; r += kDotRows) {
      for (int c = 0; c < kBlock && left + c < columns.rows; c += kDotColumns) {
        if (on_diagonal && c >= r + kDotRows) break;
        dot_tile(row + r, column + c, from, depth, out + r * kBlock + c);
      }
    }
  }
}

template <class T>
void dots(const Matrix<T>& rows, const Matrix<T>& columns, T* s, int64_t s_stride, T* mirror,
          int64_t mirror_stride, T* squared, int64_t begin, int64_t end) {
  const bool symmetric = squared != nullptr;
  const int64_t across = round_up(columns.rows, kBlock) / kBlock;
  int64_t down = begin / across, right = begin % across;
  if (symmetric) {  // tile t of the triangle is in line d where d (d + 1) / 2 <= t
    down = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(begin) + 1.0) - 1.0) / 2.0);
    while (down * (down + 1) / 2 > begin) --down;
    while ((down + 1) * (down + 2) / 2 <= begin) ++down;
    right = begin - down * (down + 1) / 2;
  }
  T tile[kBlock * kBlock];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t top = down * kBlock, left = right * kBlock;
    const bool on_diagonal = symmetric && down == right;
    block_dots(rows, columns, top, left, on_diagonal, tile);
    const int64_t height = rows.rows - top < kBlock ? rows.rows - top : kBlock;
    const int64_t width = columns.rows - left < kBlock ? columns.rows - left : kBlock;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t wide = on_diagonal ? i + 1 : width;
      for (int64_t j = 0; j < wide; ++j) {
        s[(top + i) * s_stride + left + j] = tile[i * kBlock + j];
      }
      for (int64_t j = 0; mirror != nullptr && j < wide; ++j) {
        mirror[(left + j) * mirror_stride + top + i] = tile[i * kBlock + j];
      }
      if (on_diagonal) {
        squared[top + i] = tile[i * kBlock + i];
        s[(top + i) * s_stride + top + i] = 0;  // no row is its own positive
      }
    }
    if (++right == (symmetric ? down + 1 : across)) {
      right = 0;
      ++down;
    }
  }
}

template <class T>
void squared_norms(const Matrix<T>& rows, T* squared, int64_t begin, int64_t end) {
  const int64_t padded = round_up(rows.columns, kPad);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = rows.row(i);
    Vec<T> total = {};
    for (int64_t k = 0; k < padded; k += kLanes<T>) {
      const Vec<T> x = load(row + k);
      total = multiply_add<T>(x, x, total);
    }
    squared[i] = sum<T>(total);
  }
}

template <class T>
BST_INLINE Vec<T> cosine(const T* raw, Vec<T> inverse, const Side<T>& columns, int64_t j) {
  // In this order no intermediate leaves the range that |f_i| |f_j| itself is in.
  return multiply<T>(multiply<T>(load(raw + j), inverse), load(columns.inverse + j));
}

template <class T, bool is_signed>
void sum_row(const T* raw, T inverse, Class<T> label, const Side<T>& columns, int64_t padded,
             T* positive, T* negative) {
  const Vec<T> zero = {};
  const Vec<T> scale = broadcast(inverse);
  Vec<T> same = {}, other = {};
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> s = cosine(raw, scale, columns, j);
    const Vec<T> phi = multiply<T>(s, is_signed ? magnitude<T>(s) : s);
    same = add<T>(same, where_label<T>(columns.label + j, label, phi, zero));
    other = add<T>(other, where_label<T>(columns.label + j, label, zero, phi));
  }
  *positive = sum<T>(same);
  *negative = sum<T>(other);
}

template <class T>
void row_sums(const T* raw, T inverse, Class<T> label, const Side<T>& columns, int64_t padded,
              Similarity similarity, T* positive, T* negative) {
  (similarity.is_signed ? sum_row<T, true> : sum_row<T, false>)(raw, inverse, label, columns,
                                                                padded, positive, negative);
}

template <class T, bool is_signed>
T weigh_row(T* raw, const Side<T>& rows, int64_t i, const Side<T>& columns, int64_t padded) {
  const Vec<T> scale = broadcast(rows.inverse[i]);
  const Vec<T> own_positive = broadcast(rows.per_positive[i]);
  const Vec<T> own_negative = broadcast(rows.per_negative[i]);
  const Vec<T> two = broadcast<T>(2), minus_two = broadcast<T>(-2);
  const Class<T> label = rows.label[i];
  Vec<T> along = {};
  for (int64_t j = 0; j < padded; j += kLanes<T>) {
    const Vec<T> s = cosine(raw, scale, columns, j);
    const Vec<T> positive = add<T>(own_positive, load(columns.per_positive + j));
    const Vec<T> negative = add<T>(own_negative, load(columns.per_negative + j));
    const Vec<T> twice = where_label<T>(columns.label + j, label, multiply<T>(minus_two, positive),
                                        multiply<T>(two, negative));
    const Vec<T> slope = multiply<T>(twice, is_signed ? magnitude<T>(s) : s);
    along = multiply_add<T>(slope, s, along);
    store(raw + j, multiply<T>(slope, load(columns.inverse + j)));
  }
  return sum<T>(along);
}

template <class T>
T row_weights(T* raw, const Side<T>& rows, int64_t i, const Side<T>& columns, int64_t padded,
              Similarity similarity) {
  return (similarity.is_signed ? weigh_row<T, true> : weigh_row<T, false>)(raw, rows, i, columns,
                                                                           padded);
}

template <class T>
constexpr int64_t kPanel = kProductVectors * kLanes<T>;

// Columns [left, left + kPanel) of every row, one after the other, zeros beyond the last column.
template <class T>
void pack_panel(const Matrix<T>& from, int64_t left, T* packed) {
  const int64_t width = round_up(from.columns, kPad) - left;
  for (int64_t j = 0; j < from.rows; ++j, packed += kPanel<T>) {
    BST_UNROLL
    for (int v = 0; v < kProductVectors; ++v) {
      const int64_t at = v * kLanes<T>;
      store(packed + at, at < width ? load(from.row(j) + left + at) : Vec<T>{});
    }
  }
}

// total[r] = sum_j weights[r][j] others[j], kProductRows x kPanel numbers, where others[j] begins
// `stride` elements after others[j - 1].
template <class T>
BST_INLINE void product_tile(const T* const* weights, const T* others, int64_t stride,
                             int64_t depth, T* total) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kProductRows][kProductVectors] = {};
  for (int64_t j = 0; j < depth; ++j, others += stride) {
    Vec<T> b[kProductVectors];
    BST_UNROLL
    for (int v = 0; v < kProductVectors; ++v) b[v] = load(others + v * lanes);
    BST_UNROLL
    for (int r = 0; r < kProductRows; ++r) {
      const Vec<T> a = broadcast(weights[r][j]);
      BST_UNROLL
      for (int v = 0; v < kProductVectors; ++v) acc[r][v] = multiply_add<T>(a, b[v], acc[r][v]);
    }
  }
  BST_UNROLL
  for (int r = 0; r < kProductRows; ++r) {
    BST_UNROLL
    for (int v = 0; v < kProductVectors; ++v) store(total + r * kPanel<T> + v * lanes, acc[r][v]);
  }
}

// to = (total - back f) scale, `width` numbers of a panel.
template <class T>
BST_INLINE void project_row(const T* total, const T* f, T back, T scale, int64_t width, T* to) {
  if (width < kPanel<T>) {
    for (int64_t d = 0; d < width; ++d) to[d] = (total[d] - back * f[d]) * scale;
    return;
  }
  const Vec<T> minus_back = broadcast(-back), scales = broadcast(scale);
  BST_UNROLL
  for (int d = 0; d < kPanel<T>; d += kLanes<T>) {
    const Vec<T> tangent = multiply_add<T>(minus_back, load(f + d), load(total + d));
    store(to + d, multiply<T>(tangent, scales));
  }
}

template <class T>
void product(const T* weights, int64_t weights_stride, const Matrix<T>& all_others,
             const Matrix<T>& all_own, const T* inverse, const T* along, T* gradient, T* packed,
             int64_t begin, int64_t end) {
  const Matrix<T> others = all_others, own = all_own;  // in registers, whatever is stored to
  const int64_t groups = round_up(own.rows, kRowGroup) / kRowGroup;
  int64_t packed_left = -1;
  T total[kProductRows * kPanel<T>];
  const T* weight_row[kProductRows];
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t left = unit / groups * kPanel<T>;
    const int64_t group = unit % groups * kRowGroup;
    const int64_t bottom = group + kRowGroup < own.rows ? group + kRowGroup : own.rows;
    const int64_t width = own.columns - left < kPanel<T> ? own.columns - left : kPanel<T>;
    if (left != packed_left) pack_panel(others, left, packed);
    packed_left = left;
    for (int64_t top = group; top < bottom; top += kProductRows) {
      for (int64_t r = 0; r < kProductRows; ++r) {
        weight_row[r] = weights + (top + r < own.rows ? top + r : own.rows - 1) * weights_stride;
      }
      product_tile(weight_row, packed, kPanel<T>, others.rows, total);
      const T* f = own.row(top) + left;
      T* to = gradient + top * own.columns + left;
      const int64_t height = bottom - top < kProductRows ? bottom - top : kProductRows;
      for (int64_t r = 0; r < height; ++r, f += own.stride, to += own.columns) {
        const T scale = inverse[top + r];
        project_row(total + r * kPanel<T>, f, along[top + r] * scale, scale, width, to);
      }
    }
  }
}

#include "kernels/moments.h"

BST_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

void widen_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
}

void widen_float16(const uint16_t* from, float* to, int64_t n) {
  // With exponent and fraction in float's places only the exponent's bias, 15 and 127, differs,
  // which is a factor of 2^112, for subnormals too. All-ones exponents (inf, NaN) stay all ones.
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = from[i];
    const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
    const float magnitude = from_bits(rest) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    to[i] = from_bits(bits | sign);
  }
}

template <class T>
constexpr Kernels<T> table() {
  return {dots<T>,       squared_norms<T>, row_sums<T>,  row_weights<T>,
          product<T>,    kPanel<T>,        scale_rows<T>, add_moment<T>,
          forms<T>,       multiply_rows<T>, add_block<T>, through_normalisation<T>,
          widen_bfloat16, widen_float16};
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
