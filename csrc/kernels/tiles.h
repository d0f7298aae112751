// Two products whose results, a tile at a time, stay in registers: dot products for S, and sums of
// weighted rows.

// Accumulators and one operand of each side fill the registers.
constexpr int kDotRows = BST_REGISTERS == 32 ? 6 : 3;
constexpr int kDotColumns = 4;
constexpr int kProductRows = BST_REGISTERS == 32 ? 12 : 6;
constexpr int kProductVectors = 2;
static_assert(kTile % kDotRows == 0 && kTile % kDotColumns == 0);
static_assert(kRowGroup % kProductRows == 0);

template <class T>
constexpr int64_t kPanel = kProductVectors * kLanes<T>;

// out[r * kTile + c] += rows[r] . columns[c] over `depth` elements from `from`.
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
  for (int r = 0; r < kDotRows; ++r) add_four_sums<T>(acc[r], out + r * kTile);
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
