// The kernels of the second-moment path. Unit rows u_i are the rows of a Block.

template <class T>
void scale_rows(Block<T> rows, const T* factor) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    T* const row = rows.row(i);
    const Vec<T> scale = broadcast(factor[i]);
    for (int64_t k = 0; k < rows.columns; k += kLanes<T>) {
      store(row + k, multiply<T>(load(row + k), scale));
    }
  }
}

// Adds to kProductRows x kPanel numbers of a moment: columns from `top` of the weighted rows times
// columns from `left` of the unit rows. Both are read in place, a few cache lines a row.
template <class T>
BST_INLINE void moment_tile(const Block<const T>& weighted, const Block<const T>& unit, int64_t top,
                            int64_t left, T* total, int64_t total_stride, int64_t height) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kProductRows][kProductVectors] = {};
  const T* a = weighted.data + top;
  const T* b = unit.data + left;
  for (int64_t i = 0; i < unit.rows; ++i, a += weighted.stride, b += unit.stride) {
    Vec<T> right[kProductVectors];
    BST_UNROLL
    for (int v = 0; v < kProductVectors; ++v) right[v] = load(b + v * lanes);
    BST_UNROLL
    for (int r = 0; r < kProductRows; ++r) {
      const Vec<T> down = broadcast(a[r]);
      BST_UNROLL
      for (int v = 0; v < kProductVectors; ++v) {
        acc[r][v] = multiply_add<T>(down, right[v], acc[r][v]);
      }
    }
  }
  T* to = total + top * total_stride + left;
  BST_UNROLL
  for (int r = 0; r < kProductRows; ++r) {
    if (r < height) {
      BST_UNROLL
      for (int v = 0; v < kProductVectors; ++v) {
        store(to + v * lanes, add<T>(load(to + v * lanes), acc[r][v]));
      }
    }
    to += total_stride;
  }
}

// Rows that are added up in registers at once. The few columns that a tile reads of so few rows
// stay in the first-level cache.
constexpr int64_t kMomentRows = 128;

template <class T>
void add_moment(Block<const T> weighted, Block<const T> unit, T* total, int64_t total_stride) {
  for (int64_t first = 0; first < unit.rows; first += kMomentRows) {
    const int64_t rest = unit.rows - first;
    const int64_t rows = rest < kMomentRows ? rest : kMomentRows;
    const Block<const T> a{weighted.row(first), rows, weighted.columns, weighted.stride};
    const Block<const T> b{unit.row(first), rows, unit.columns, unit.stride};
    for (int64_t left = 0; left < unit.columns; left += kPanel<T>) {
      const int64_t end = left + kPanel<T> < unit.columns ? left + kPanel<T> : unit.columns;
      for (int64_t top = 0; top < end; top += kProductRows) {
        moment_tile(a, b, top, left, total, total_stride, end - top);
      }
    }
  }
}

// Pointers to kProductRows rows from `top`; the last row stands in for those beyond it.
template <class T>
BST_INLINE void tile_rows(const T* data, int64_t stride, int64_t rows, int64_t top,
                          const T** tile) {
  for (int64_t r = 0; r < kProductRows; ++r) {
    tile[r] = data + (top + r < rows ? top + r : rows - 1) * stride;
  }
}

template <class T>
void quadratic_forms(Block<const T> unit, const T* packed, T* form) {
  constexpr int lanes = kLanes<T>;
  constexpr int vectors = kProductVectors;
  T total[kProductRows * kPanel<T>];
  const T* row[kProductRows];
  for (int64_t top = 0; top < unit.rows; top += kProductRows) {
    tile_rows(unit.data, unit.stride, unit.rows, top, row);
    Vec<T> sums[kProductRows] = {};
    for (int64_t left = 0; left < unit.columns; left += kPanel<T>) {
      const int64_t depth = left + kPanel<T> < unit.columns ? left + kPanel<T> : unit.columns;
      product_tile(row, packed + left * unit.columns, kPanel<T>, depth, total);
      for (int r = 0; r < kProductRows; ++r) {
        for (int v = 0; v < vectors; ++v) {
          sums[r] = multiply_add<T>(load(total + r * kPanel<T> + v * lanes),
                                    load(row[r] + left + v * lanes), sums[r]);
        }
      }
    }
    for (int64_t r = 0; r < kProductRows && top + r < unit.rows; ++r)
      form[top + r] = sum<T>(sums[r]);
  }
}

// One row of a panel: to[v] = factor from[v], or += with add_to.
template <class T>
BST_INLINE void write_panel(const T* from, T factor, bool add_to, T* to) {
  const Vec<T> scale = broadcast(factor);
  BST_UNROLL
  for (int v = 0; v < kProductVectors; ++v) {
    const int64_t at = v * kLanes<T>;
    const Vec<T> before = add_to ? load(to + at) : Vec<T>{};
    store(to + at, multiply_add<T>(load(from + at), scale, before));
  }
}

template <class T>
void multiply_rows(Block<const T> unit, const T* packed, const T* factor, bool add_to,
                   Block<T> result) {
  T total[kProductRows * kPanel<T>];
  const T* row[kProductRows];
  for (int64_t left = 0; left < unit.columns; left += kPanel<T>) {
    for (int64_t top = 0; top < unit.rows; top += kProductRows) {
      tile_rows(unit.data, unit.stride, unit.rows, top, row);
      product_tile(row, packed + left * unit.columns, kPanel<T>, unit.columns, total);
      for (int64_t r = 0; r < kProductRows && top + r < unit.rows; ++r) {
        write_panel(total + r * kPanel<T>, factor == nullptr ? T(1) : factor[top + r], add_to,
                    result.row(top + r) + left);
      }
    }
  }
}

template <class T>
void add_weighted_rows(const T* weights, int64_t weights_stride, Block<const T> unit,
                       Block<T> result) {
  T total[kProductRows * kPanel<T>];
  const T* row[kProductRows];
  for (int64_t top = 0; top < result.rows; top += kProductRows) {
    tile_rows(weights, weights_stride, result.rows, top, row);
    for (int64_t left = 0; left < unit.columns; left += kPanel<T>) {
      product_tile(row, unit.data + left, unit.stride, unit.rows, total);
      for (int64_t r = 0; r < kProductRows && top + r < result.rows; ++r) {
        write_panel(total + r * kPanel<T>, T(1), true, result.row(top + r) + left);
      }
    }
  }
}

template <class T>
void through_normalisation(Block<T> v, Block<const T> unit, const T* inverse) {
  for (int64_t i = 0; i < v.rows; ++i) {
    T* const row = v.row(i);
    const T* const u = unit.row(i);
    Vec<T> product = {};
    for (int64_t k = 0; k < v.columns; k += kLanes<T>) {
      product = multiply_add<T>(load(row + k), load(u + k), product);
    }
    const Vec<T> back = broadcast(-sum<T>(product)), scale = broadcast(inverse[i]);
    for (int64_t k = 0; k < v.columns; k += kLanes<T>) {
      store(row + k, multiply<T>(multiply_add<T>(load(u + k), back, load(row + k)), scale));
    }
  }
}
