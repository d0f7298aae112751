// The kernels of batch_similarity: S of rows x columns as raw products, the sweeps over it, and the
// product of weights with rows.

// Elements of a row that `dots` takes at a time, 2 KiB. The columns of a tile and the rows of one
// `dot_tile` are then 30 KiB (16 registers) or 36 KiB (32): about a first-level cache.
template <class T>
constexpr int64_t kDepth = 2048 / sizeof(T);

// One kTile x kTile tile of raw products. At the edge the last row stands in for the missing ones,
// so that nothing is read beyond the matrix; their products are not stored.
template <class T>
void raw_tile(const Matrix<T>& rows, const Matrix<T>& columns, int64_t top, int64_t left,
                bool on_diagonal, T* out) {
  const T* row[kTile];
  const T* column[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    row[i] = rows.row(top + i < rows.rows ? top + i : rows.rows - 1);
    column[i] = columns.row(left + i < columns.rows ? left + i : columns.rows - 1);
  }
  std::memset(out, 0, kTile * kTile * sizeof(T));
  const int64_t padded = round_up(rows.columns, kPad);
  for (int64_t from = 0; from < padded; from += kDepth<T>) {
    const int64_t rest = padded - from;
    const int64_t depth = rest < kDepth<T> ? rest : kDepth<T>;
    for (int r = 0; r < kTile && top + r < rows.rows; r += kDotRows) {
      for (int c = 0; c < kTile && left + c < columns.rows; c += kDotColumns) {
        if (on_diagonal && c >= r + kDotRows) break;
        dot_tile(row + r, column + c, from, depth, out + r * kTile + c);
      }
    }
  }
}

template <class T>
void dots(const Matrix<T>& rows, const Matrix<T>& columns, T* s, int64_t s_stride, T* mirror,
          int64_t mirror_stride, T* squared, int64_t begin, int64_t end) {
  const bool symmetric = squared != nullptr;
  const int64_t across = round_up(columns.rows, kTile) / kTile;
  int64_t down = begin / across, right = begin % across;
  if (symmetric) {  // tile t of the triangle is in the last line d with d (d + 1) / 2 <= t
    down = static_cast<int64_t>((std::sqrt(8.0 * static_cast<double>(begin) + 1.0) - 1.0) / 2.0);
    while (down * (down + 1) / 2 > begin) --down;
    while ((down + 1) * (down + 2) / 2 <= begin) ++down;
    right = begin - down * (down + 1) / 2;
  }
  T tile[kTile * kTile];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t top = down * kTile, left = right * kTile;
    const bool on_diagonal = symmetric && down == right;
    raw_tile(rows, columns, top, left, on_diagonal, tile);
    const int64_t height = rows.rows - top < kTile ? rows.rows - top : kTile;
    const int64_t width = columns.rows - left < kTile ? columns.rows - left : kTile;
    for (int64_t i = 0; i < height; ++i) {
      const int64_t wide = on_diagonal ? i + 1 : width;
      for (int64_t j = 0; j < wide; ++j) {
        s[(top + i) * s_stride + left + j] = tile[i * kTile + j];
      }
      for (int64_t j = 0; mirror != nullptr && j < wide; ++j) {
        mirror[(left + j) * mirror_stride + top + i] = tile[i * kTile + j];
      }
      if (on_diagonal) {
        squared[top + i] = tile[i * kTile + i];
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
  // In this order the intermediate product is at most |f_j|; 1 / (|f_i| |f_j|) could overflow.
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
              bool is_signed, T* positive, T* negative) {
  (is_signed ? sum_row<T, true> : sum_row<T, false>)(raw, inverse, label, columns,
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
              bool is_signed) {
  return (is_signed ? weigh_row<T, true> : weigh_row<T, false>)(raw, rows, i, columns,
                                                                           padded);
}

// Packs columns [left, left + kPanel) of every row, row after row, zeros beyond the last column.
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

// to = (total - back f) scale: `width` numbers of a panel.
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
  // Copies: no store can change them, so they stay in registers.
  const Matrix<T> others = all_others, own = all_own;
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
