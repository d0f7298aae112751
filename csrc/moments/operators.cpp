// The operators moment_means and moment_gradient: they check, allocate and number the classes.
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "moments/moments.h"
#include "operator.h"

namespace bstriplet {
namespace {

// Class numbers of labels, and how many rows each number has; some can have none.
class Numbered {
 public:
  explicit Numbered(const Tensor& labels) : numbers_(labels.size(0)) {
    const int64_t n = labels.size(0);
    std::vector<int64_t> values(n);
    gather<int64_t>(labels.const_data_ptr(), n, labels.stride(0), values.data());
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const uint64_t least = static_cast<uint64_t>(*low);
    const uint64_t span = static_cast<uint64_t>(*high) - least;
    if (span < static_cast<uint64_t>(4 * n + 1024)) {  // a table of all labels is small
      sizes_.assign(span + 1, 0);
      for (int64_t i = 0; i < n; ++i) {
        numbers_[i] = static_cast<int64_t>(static_cast<uint64_t>(values[i]) - least);
        ++sizes_[numbers_[i]];
      }
      return;
    }
    std::unordered_map<int64_t, int64_t> known;
    for (int64_t i = 0; i < n; ++i) {
      const auto [at, is_new] = known.emplace(values[i], static_cast<int64_t>(sizes_.size()));
      if (is_new) sizes_.push_back(0);
      numbers_[i] = at->second;
      ++sizes_[at->second];
    }
  }

  // Sorts the classes by size; writes the rows to `order` by class, within a class as they come.
  Classes sort(int64_t* order) const {
    std::vector<int64_t> by_size;
    for (size_t c = 0; c < sizes_.size(); ++c) {
      if (sizes_[c] > 0) by_size.push_back(static_cast<int64_t>(c));
    }
    std::stable_sort(by_size.begin(), by_size.end(),
                     [&](int64_t a, int64_t b) { return sizes_[a] < sizes_[b]; });
    Classes classes;
    std::vector<int64_t> next(sizes_.size());
    for (int64_t c : by_size) {
      next[c] = classes.starts.back();
      classes.starts.push_back(classes.starts.back() + sizes_[c]);
    }
    for (size_t i = 0; i < numbers_.size(); ++i) {
      order[next[numbers_[i]]++] = static_cast<int64_t>(i);
    }
    return classes;
  }

 private:
  std::vector<int64_t> numbers_;
  std::vector<int64_t> sizes_;
};

// The classes for the backward, run-length coded: a line (rows, columns, k) stands for the next k
// classes, which have so many rows and columns each. Here columns = rows: there is no ref_emb.
Tensor make_table(const Classes& classes, const Tensor& like) {
  std::vector<int64_t> lines;
  for (int64_t c = 0; c < classes.count(); ++c) {
    const int64_t size = classes.size(c);
    if (c == 0 || size != classes.size(c - 1)) lines.insert(lines.end(), {size, size, 0});
    ++lines.back();
  }
  Tensor table =
      empty_tensor({static_cast<int64_t>(lines.size()) / 3, 3}, ScalarType::Long, like);
  std::copy(lines.begin(), lines.end(), static_cast<int64_t*>(table.mutable_data_ptr()));
  return table;
}

// Reads what `make_table` wrote; throws where it cannot have come from there.
Classes read_table(const Tensor& table, int64_t rows, int64_t slots) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) == 3 && table.is_contiguous(),
                  "table must be int64 [lines, 3], contiguous");
  const int64_t* line = static_cast<const int64_t*>(table.const_data_ptr());
  Classes classes;
  for (int64_t i = 0; i < table.size(0); ++i, line += 3) {
    STD_TORCH_CHECK(line[0] >= 1 && line[0] == line[1] && line[2] >= 1 && line[0] <= rows &&
                        line[2] <= rows,
                    "table must come from moment_means");
    for (int64_t k = 0; k < line[2]; ++k) {
      STD_TORCH_CHECK(classes.rows() <= rows - line[0] &&
                          (classes.count() == 0 || classes.size(classes.count() - 1) <= line[0]),
                      "table must have the rows of embeddings, classes by size");
      classes.starts.push_back(classes.starts.back() + line[0]);
    }
  }
  STD_TORCH_CHECK(classes.rows() == rows && slots <= classes.count(),
                  "table and slots must be of the classes of embeddings");
  STD_TORCH_CHECK(slots > 0 || classes.dominating() < 0,
                  "slots must hold the class with more than half of the rows");
  classes.slots = slots;
  return classes;
}

using Means = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Means means_of(const Tensor& embeddings, const Tensor& labels, double eps, int64_t smallest_moment,
               ScalarType accumulation) {
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  Tensor order = empty_tensor({n}, ScalarType::Long, embeddings);
  int64_t* const places = static_cast<int64_t*>(order.mutable_data_ptr());
  Classes classes = Numbered(labels).sort(places);
  while (classes.slots < classes.count()) {
    const int64_t c = classes.small() - 1;
    if (classes.size(c) < smallest_moment && c != classes.dominating()) break;
    ++classes.slots;
  }
  checked_product(checked_product(d, d), classes.slots + 2);
  Tensor table = make_table(classes, embeddings);
  Tensor positive = empty_tensor({n}, accumulation, embeddings);
  Tensor negative = empty_tensor({n}, accumulation, embeddings);
  Tensor small = empty_tensor({2, d, d}, accumulation, embeddings);
  Tensor slots = empty_tensor({classes.slots, d, d}, accumulation, embeddings);
  Tensor inverse = empty_tensor({n}, accumulation, embeddings);
  means_by_moments<T>({strided_rows(embeddings), classes, places}, eps,
                      {static_cast<T*>(inverse.mutable_data_ptr()),
                       static_cast<T*>(slots.mutable_data_ptr()),
                       static_cast<T*>(small.mutable_data_ptr())},
                      static_cast<T*>(positive.mutable_data_ptr()),
                      static_cast<T*>(negative.mutable_data_ptr()));
  return {positive, negative, table, small, slots, order, inverse};
}

Means moment_means(Tensor embeddings, Tensor labels, double eps, int64_t smallest_moment) {
  const Inputs in = checked(embeddings, std::nullopt, labels, std::nullopt, std::nullopt);
  return in.accumulation == ScalarType::Double
             ? means_of<double>(embeddings, labels, eps, smallest_moment, in.accumulation)
             : means_of<float>(embeddings, labels, eps, smallest_moment, in.accumulation);
}

template <class T>
Tensor gradient_of(const Tensor& a, const Tensor& embeddings, const Classes& classes,
                   const Tensor& small, const Tensor& slots, const Tensor& order,
                   const Tensor& inverse, double sigma, ScalarType accumulation) {
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  const int64_t* const places = static_cast<const int64_t*>(order.const_data_ptr());
  const T* const given = static_cast<const T*>(a.const_data_ptr());
  const int64_t stride = a.stride(0);
  std::vector<T> in_order(n);
  for (int64_t i = 0; i < n; ++i) in_order[i] = given[places[i] * stride];
  Tensor result = empty_tensor({n, d}, accumulation, embeddings);
  gradient_by_moments<T>({strided_rows(embeddings), classes, places},
                         {static_cast<const T*>(inverse.const_data_ptr()),
                          static_cast<const T*>(slots.const_data_ptr()),
                          static_cast<const T*>(small.const_data_ptr())},
                         in_order.data(), sigma, static_cast<T*>(result.mutable_data_ptr()));
  return result;
}

void check_kept(const char* name, const Tensor& tensor, ScalarType dtype,
                std::initializer_list<int64_t> sizes, const Tensor& embeddings) {
  bool fits = tensor.scalar_type() == dtype && tensor.is_contiguous() &&
              tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t k = 0;
  for (const int64_t size : sizes) fits = fits && tensor.size(k++) == size;
  STD_TORCH_CHECK(fits, name, " must come from moment_means of these embeddings");
  check_device(name, tensor, embeddings);
}

Tensor moment_gradient(Tensor a, Tensor embeddings, Tensor table, Tensor small, Tensor slots,
                       Tensor order, Tensor inverse, double sigma) {
  check_matrix("embeddings", embeddings);
  const int64_t n = embeddings.size(0), d = embeddings.size(1);
  const ScalarType accumulation =
      embeddings.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_vector("a", a, accumulation, n);
  check_device("a", a, embeddings);
  check_device("table", table, embeddings);
  STD_TORCH_CHECK(slots.dim() == 3, "slots must have 3 dimensions, got ", slots.dim());
  check_kept("small", small, accumulation, {2, d, d}, embeddings);
  check_kept("slots", slots, accumulation, {slots.size(0), d, d}, embeddings);
  check_kept("order", order, ScalarType::Long, {n}, embeddings);
  check_kept("inverse", inverse, accumulation, {n}, embeddings);
  const int64_t* const places = static_cast<const int64_t*>(order.const_data_ptr());
  STD_TORCH_CHECK(std::all_of(places, places + n, [n](int64_t i) { return 0 <= i && i < n; }),
                  "order must hold rows of embeddings, from 0 to ", n - 1);
  const Classes classes = read_table(table, n, slots.size(0));
  const auto run = accumulation == ScalarType::Double ? gradient_of<double> : gradient_of<float>;
  return run(a, embeddings, classes, small, slots, order, inverse, sigma, accumulation);
}

}  // namespace
}  // namespace bstriplet

STABLE_TORCH_LIBRARY_IMPL(bstriplet, CPU, library) {
  library.impl("moment_means", TORCH_BOX(&bstriplet::moment_means));
  library.impl("moment_gradient", TORCH_BOX(&bstriplet::moment_gradient));
}
