// batch_similarity on the CPU: Eqs. 3 and 4 and their gradient in one call.
//
// S is computed once, as raw dot products: N M D multiply-adds for N rows and M columns, half of
// that without ref_emb, where M = N. One sweep over S gives every row's sums; a second turns S in
// place into the weights w_ij phi'(s_ij) / |f_j|; their product with the embeddings, another N M D
// multiply-adds a side, is the gradient. Large batches are bound by the products, small ones by the
// calls around them.
//
// One thread computes each number, in a fixed order, so the bits depend on neither the number of
// threads nor chance.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/cpu.h"
#include "operator.h"

namespace bstriplet {
namespace {

// S, or its transpose: rows are padded to whole vectors. An odd multiple of kPad from row to row
// keeps rows from falling into the same few sets of the cache.
template <class T>
struct PairMatrix {
  Tensor owner;
  T* data;
  int64_t stride;

  PairMatrix(int64_t rows, int64_t columns, const Inputs& in)
      : owner(empty_vector(checked_product(rows, padded_stride(columns)), in.accumulation,
                           in.embeddings)),
        data(static_cast<T*>(owner.mutable_data_ptr())),
        stride(padded_stride(columns)) {}

  T* row(int64_t i) const { return data + i * stride; }

  static int64_t padded_stride(int64_t columns) {
    const int64_t padded = round_up(columns, kPad);
    return padded % (2 * kPad) == 0 ? padded + kPad : padded;
  }
};

// Embeddings as a Matrix<T>: their own memory where that fits, else a padded copy.
template <class T>
class PaddedRows {
 public:
  PaddedRows(const Tensor& tensor, const Inputs& in) {
    const StridedRows given = strided_rows(tensor);
    const int64_t n = given.rows, d = given.columns;
    if (tensor.scalar_type() == in.accumulation && given.column_stride == 1 && d % kPad == 0) {
      matrix_ = {static_cast<const T*>(given.data), n, d, given.row_stride};
      return;
    }
    const int64_t padded = round_up(d, kPad);
    copy_ = empty_matrix(n, padded, in.accumulation, tensor);
    T* const to = static_cast<T*>(copy_->mutable_data_ptr());
    matrix_ = {to, n, d, padded};
    const RowReader<T> read(given);
    parallel_for(0, n, grain(4 * d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) read(i, to + i * padded, padded);
    });
  }

  const Matrix<T>& matrix() const { return matrix_; }

 private:
  std::optional<Tensor> copy_;
  Matrix<T> matrix_;
};

// A `Side` and the memory of its arrays.
template <class T>
struct SideArrays {
  std::vector<T> numbers;
  std::vector<Class<T>> labels;
  std::vector<T> along;  // sum_j w_ij phi'(s_ij) s_ij
  Side<T> side;

  explicit SideArrays(int64_t n) {
    const int64_t padded = round_up(n, kPad);
    numbers.assign(3 * padded, T(0));
    labels.assign(padded, Class<T>(-1));
    along.assign(n, T(0));
    side = {numbers.data(), labels.data(), numbers.data() + padded, numbers.data() + 2 * padded};
  }
};

// The classes of the columns, in ascending order, and how many columns each has.
class ColumnClasses {
 public:
  explicit ColumnClasses(const Tensor& labels) : values_(read(labels)) {
    std::sort(values_.begin(), values_.end());
    for (size_t i = 0; i < values_.size(); ++i) {
      if (i == 0 || values_[i] != values_[i - 1]) {
        starts_.push_back(static_cast<int64_t>(i));
      }
    }
    for (size_t c = 0; c < starts_.size(); ++c) values_[c] = values_[starts_[c]];
    starts_.push_back(static_cast<int64_t>(values_.size()));
    values_.resize(starts_.size() - 1);
  }

  // Writes each label's class number; one past the last number where no column has the label.
  template <class C>
  void number(const Tensor& labels, C* to) const {
    for (int64_t label : read(labels)) {
      const auto at = std::lower_bound(values_.begin(), values_.end(), label);
      *to++ = static_cast<C>(at != values_.end() && *at == label ? at - values_.begin()
                                                                 : values_.size());
    }
  }

  int64_t members(int64_t number) const {
    return number < static_cast<int64_t>(values_.size()) ? starts_[number + 1] - starts_[number]
                                                         : 0;
  }

 private:
  static std::vector<int64_t> read(const Tensor& labels) {
    std::vector<int64_t> values(labels.size(0));
    gather<int64_t>(labels.const_data_ptr(), labels.size(0), labels.stride(0), values.data());
    return values;
  }

  std::vector<int64_t> values_;
  std::vector<int64_t> starts_;
};

template <class T>
class PairwiseLoss {
 public:
  PairwiseLoss(const Inputs& in, const Spec& spec)
      : in_(in),
        spec_(spec),
        s_(in.rows, in.columns, in),
        rows_(in.embeddings, in),
        own_(in.rows),
        classes_(in.ref_labels ? *in.ref_labels : in.labels) {
    classes_.number(in.labels, own_.side.label);
    if (in.ref_emb) {
      ref_rows_.emplace(*in.ref_emb, in);
      ref_.emplace(in.columns);
      classes_.number(*in.ref_labels, ref_->side.label);
      if (spec.gradient) mirror_.emplace(in.columns, in.rows, in);
    }
  }

  Results run() {
    const int64_t n = in_.rows;
    Tensor loss = empty_scalar(in_.accumulation, in_.embeddings);
    Tensor means = empty_matrix(2, n, in_.accumulation, in_.embeddings);
    similarities();
    T* const positives = static_cast<T*>(means.mutable_data_ptr());
    T* const negatives = positives + n;
    row_means(positives, negatives);
    const bool any_active = hinge(positives, negatives, static_cast<T*>(loss.mutable_data_ptr()));
    if (!spec_.gradient) return {loss, means, nothing(), nothing()};
    Tensor grad = gradient(in_.embeddings, any_active, s_, matrix(), columns(), own_, other());
    Tensor grad_ref = in_.ref_emb ? gradient(*in_.ref_emb, any_active, *mirror_, columns(),
                                             matrix(), *ref_, own_)
                                  : nothing();
    return {loss, means, grad, grad_ref};
  }

 private:
  const Matrix<T>& matrix() const { return rows_.matrix(); }
  const Matrix<T>& columns() const { return ref_rows_ ? ref_rows_->matrix() : rows_.matrix(); }
  SideArrays<T>& other() { return ref_ ? *ref_ : own_; }
  Tensor nothing() const { return empty_vector(0, in_.accumulation, in_.embeddings); }

  // Computes S as raw products, its transpose where grad_ref needs it, and every 1 / |f_i|.
  void similarities() {
    const Kernels<T>& k = kernels<T>();
    const T squared_eps = static_cast<T>(spec_.squared_eps);
    const bool symmetric = !in_.ref_emb;
    const int64_t count = tile_count(in_.rows, in_.columns, symmetric);
    T* const mirror = symmetric ? s_.data : mirror_ ? mirror_->data : nullptr;
    const int64_t mirror_stride = symmetric ? s_.stride : mirror_ ? mirror_->stride : 0;
    T* const squared = symmetric ? own_.side.inverse : nullptr;
    parallel_for(0, count, grain(kTile * kTile * in_.depth), [&](int64_t begin, int64_t end) {
      k.dots(matrix(), columns(), s_.data, s_.stride, mirror, mirror_stride, squared, begin, end);
    });
    if (!symmetric) {
      squared_norms(matrix(), own_);
      squared_norms(columns(), *ref_);
      invert_norms(ref_->side.inverse, in_.columns, squared_eps);
    }
    invert_norms(own_.side.inverse, in_.rows, squared_eps);
  }

  void squared_norms(const Matrix<T>& matrix, SideArrays<T>& to) {
    parallel_for(0, matrix.rows, grain(matrix.columns), [&](int64_t begin, int64_t end) {
      kernels<T>().squared_norms(matrix, to.side.inverse, begin, end);
    });
  }

  int64_t positives_of(int64_t i) const {
    return classes_.members(own_.side.label[i]) - (in_.ref_emb ? 0 : 1);
  }

  int64_t negatives_of(int64_t i) const {
    return in_.columns - classes_.members(own_.side.label[i]);
  }

  // Eq. 3's two means for each row.
  void row_means(T* positive, T* negative) {
    const Kernels<T>& k = kernels<T>();
    const int64_t m = in_.columns, padded = round_up(m, kPad);
    const Side<T>& columns = other().side;
    parallel_for(0, in_.rows, grain(4 * m), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::fill(s_.row(i) + m, s_.row(i) + padded, T(0));
        k.row_sums(s_.row(i), own_.side.inverse[i], own_.side.label[i], columns, padded,
                   spec_.is_signed, positive + i, negative + i);
        positive[i] /= static_cast<T>(std::max<int64_t>(1, positives_of(i)));
        negative[i] /= static_cast<T>(std::max<int64_t>(1, negatives_of(i)));
      }
    });
  }

  // Computes Eq. 4, and each row's a_i = dL/dl_i [h_i > 0] over its counts. Returns whether any row
  // is active; one whose h_i is NaN is.
  bool hinge(const T* positive, const T* negative, T* loss) {
    const T* upstream = in_.upstream ? static_cast<const T*>(in_.upstream->const_data_ptr())
                                     : nullptr;
    const int64_t stride = in_.upstream ? in_.upstream->stride(0) : 0;
    const T margin = static_cast<T>(spec_.margin), sigma = static_cast<T>(spec_.sigma);
    double total = 0;
    bool any_active = false;
    for (int64_t i = 0; i < in_.rows; ++i) {
      const T h = margin - positive[i] + sigma * negative[i];
      if (h <= 0) continue;
      any_active = true;
      total += static_cast<double>(h);
      const T a = upstream == nullptr ? static_cast<T>(spec_.scale) : upstream[i * stride];
      const int64_t positives = positives_of(i), negatives = negatives_of(i);
      if (positives > 0) own_.side.per_positive[i] = a / static_cast<T>(positives);
      if (negatives > 0) own_.side.per_negative[i] = sigma * a / static_cast<T>(negatives);
    }
    *loss = static_cast<T>(spec_.scale * total);
    return any_active;
  }

  // dL/df of one side, whose rows are those of s; s is overwritten.
  Tensor gradient(const Tensor& of, bool any_active, const PairMatrix<T>& s, const Matrix<T>& rows,
                  const Matrix<T>& columns, SideArrays<T>& row_side, SideArrays<T>& column_side) {
    const Kernels<T>& k = kernels<T>();
    const int64_t m = columns.rows, padded = round_up(m, kPad);
    Tensor result = empty_matrix(rows.rows, rows.columns, in_.accumulation, of);
    T* const to = static_cast<T*>(result.mutable_data_ptr());
    if (!any_active) {  // exactly zero, and late in training not rare
      std::fill(to, to + rows.rows * rows.columns, T(0));
      return result;
    }
    parallel_for(0, rows.rows, grain(8 * m), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::fill(s.row(i) + m, s.row(i) + padded, T(0));
        row_side.along[i] = k.row_weights(s.row(i), row_side.side, i, column_side.side, padded,
                                          spec_.is_signed);
      }
    });
    const int64_t groups = round_up(rows.rows, kRowGroup) / kRowGroup;
    const int64_t panels = round_up(rows.columns, k.panel) / k.panel;
    const int64_t work = std::min(rows.rows, kRowGroup) * k.panel * m;
    parallel_for(0, groups * panels, grain(work), [&](int64_t begin, int64_t end) {
      k.product(s.data, s.stride, columns, rows, row_side.side.inverse, row_side.along.data(), to,
                thread_scratch<T>(checked_product(m, k.panel)), begin, end);
    });
    return result;
  }

  const Inputs& in_;
  const Spec& spec_;
  PairMatrix<T> s_;  // first: if there is no memory for it, nothing has been written yet
  PaddedRows<T> rows_;
  std::optional<PaddedRows<T>> ref_rows_;
  SideArrays<T> own_;
  std::optional<SideArrays<T>> ref_;
  std::optional<PairMatrix<T>> mirror_;
  ColumnClasses classes_;
};

Results run(const Inputs& in, const Spec& spec) {
  return in.accumulation == ScalarType::Double ? PairwiseLoss<double>(in, spec).run()
                                               : PairwiseLoss<float>(in, spec).run();
}

}  // namespace
}  // namespace bstriplet

STABLE_TORCH_LIBRARY_IMPL(bstriplet, CPU, library) {
  library.impl("batch_similarity", TORCH_BOX(&bstriplet::batch_similarity<&bstriplet::run>));
}
