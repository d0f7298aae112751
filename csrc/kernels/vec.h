// Vectors of BST_VECTOR_BYTES: the compiler's own (GCC, Clang), else arrays. The arrays are for
// MSVC, with which nobody has built this yet.

template <class T>
struct VecOf {
  static constexpr int lanes = BST_VECTOR_BYTES / sizeof(T);
#if defined(__GNUC__)
  typedef T type __attribute__((vector_size(BST_VECTOR_BYTES)));
  typedef Class<T> mask __attribute__((vector_size(BST_VECTOR_BYTES)));
#else
  struct type {
    T lane[lanes];
    T& operator[](int i) { return lane[i]; }
    T operator[](int i) const { return lane[i]; }
  };
#endif
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int kLanes = VecOf<T>::lanes;

template <class T>
BST_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
BST_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

#if defined(__GNUC__)
template <class T>
BST_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of a zero, which 0 + x does not
}
template <class T>
BST_INLINE Vec<T> add(Vec<T> a, Vec<T> b) {
  return a + b;
}
template <class T>
BST_INLINE Vec<T> multiply(Vec<T> a, Vec<T> b) {
  return a * b;
}
// a * b + c, one instruction where there is one.
template <class T>
BST_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
template <class T>
BST_INLINE Vec<T> magnitude(Vec<T> a) {
  return a < Vec<T>{} ? -a : a;
}
// Lane by lane: labels[lane] == label ? a : b.
template <class T>
BST_INLINE Vec<T> where_label(const Class<T>* labels, Class<T> label, Vec<T> a, Vec<T> b) {
  typename VecOf<T>::mask other;
  std::memcpy(&other, labels, sizeof(other));
  return other == label ? a : b;
}
#else
template <class T>
BST_INLINE Vec<T> broadcast(T x) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = x;
  return v;
}
template <class T>
BST_INLINE Vec<T> add(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < kLanes<T>; ++i) a[i] += b[i];
  return a;
}
template <class T>
BST_INLINE Vec<T> multiply(Vec<T> a, Vec<T> b) {
  for (int i = 0; i < kLanes<T>; ++i) a[i] *= b[i];
  return a;
}
template <class T>
BST_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  for (int i = 0; i < kLanes<T>; ++i) c[i] += a[i] * b[i];
  return c;
}
template <class T>
BST_INLINE Vec<T> magnitude(Vec<T> a) {
  for (int i = 0; i < kLanes<T>; ++i) a[i] = a[i] < 0 ? -a[i] : a[i];
  return a;
}
template <class T>
BST_INLINE Vec<T> where_label(const Class<T>* labels, Class<T> label, Vec<T> a, Vec<T> b) {
  for (int i = 0; i < kLanes<T>; ++i) b[i] = labels[i] == label ? a[i] : b[i];
  return b;
}
#endif

#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BST_HAS_SHUFFLE 1
#endif
#endif

#if defined(BST_HAS_SHUFFLE)
// [a0+a1, b0+b1] where an argument consists of two halves of width kLanes / 2.
template <class T, int... I>
BST_INLINE Vec<T> fold_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>, h = n / 2;
  return __builtin_shufflevector(a, b, (I < h ? I : I - h + n)...) +
         __builtin_shufflevector(a, b, (I < h ? I + h : I + n)...);
}
// [a0+a1, a2+a3, b0+b1, b2+b3] where an argument consists of four quarters.
template <class T, int... I>
BST_INLINE Vec<T> fold_quarters(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<T>, h = n / 2, q = n / 4;
  return __builtin_shufflevector(
             a, b, ((I / h) * n + ((I % h) / q) * 2 * q + I % q)...) +
         __builtin_shufflevector(
             a, b, ((I / h) * n + ((I % h) / q) * 2 * q + q + I % q)...);
}
// [v0+v1, v2+v3, ...], half as many lanes.
template <class V, int... I>
BST_INLINE auto add_neighbours(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, 2 * I...) + __builtin_shufflevector(v, v, (2 * I + 1)...);
}
// The sums of four equal parts of a vector of n lanes, each in one lane.
template <int n, class V>
BST_INLINE auto four_lanes(V v) {
  if constexpr (n == 4) {
    return v;
  } else {
    return four_lanes<n / 2>(add_neighbours(v, std::make_integer_sequence<int, n / 2>{}));
  }
}
#endif

template <class T>
BST_INLINE T sum(Vec<T> v) {
#if defined(BST_HAS_SHUFFLE)
  if constexpr (kLanes<T> >= 4) {
    const auto four = four_lanes<kLanes<T>>(v);
    return (four[0] + four[1]) + (four[2] + four[3]);
  }
#endif
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// to[i] += sum(v[i]) for four vectors at once.
template <class T>
BST_INLINE void add_four_sums(const Vec<T>* v, T* to) {
#if defined(BST_HAS_SHUFFLE)
  if constexpr (kLanes<T> >= 4) {
    constexpr std::make_integer_sequence<int, kLanes<T>> lanes{};
    auto total = four_lanes<kLanes<T>>(fold_quarters<T>(
        fold_halves<T>(v[0], v[1], lanes), fold_halves<T>(v[2], v[3], lanes), lanes));
    decltype(total) before;
    std::memcpy(&before, to, sizeof(before));
    total += before;
    std::memcpy(to, &total, sizeof(total));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) to[i] += sum<T>(v[i]);
}
