// moments.h for one accumulation type; included where that is compiled.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/cpu.h"
#include "moments/moments.h"

namespace bstriplet {
namespace {

constexpr int64_t kPartRows = 4096;       // of one sum in the accumulation type
constexpr int64_t kBlockBytes = 1 << 17;  // of unit rows in a thread's scratch
constexpr int64_t kFewestRows = 96;       // of a block: a matrix is read once for all of them
constexpr int64_t kAhead = 8;             // rows that are asked for before they are read or written
constexpr int64_t kPackedNumbers = 1 << 21;  // of the matrices that are packed at once

// A range cut into the fewest parts of at most `most` rows, as even as can be.
template <class Take>
void split(Range range, int64_t most, Take take) {
  const int64_t parts = round_up(range.size(), most) / most;
  for (int64_t p = 0; p < parts; ++p) {
    take(Range{range.begin + range.size() * p / parts,
               range.begin + range.size() * (p + 1) / parts});
  }
}

// Matrices [count, lines, stride], uninitialised.
template <class T>
class Matrices {
 public:
  Matrices(int64_t count, int64_t lines, int64_t stride)
      : size_(checked_product(lines, stride)),
        numbers_(count == 0 ? 0 : checked_product(size_, count)) {}

  T* operator[](int64_t i) const { return numbers_.data() + i * size_; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  AlignedArray<T> numbers_;
};

// Sums of [D, D] matrices over all classes, and over all but the dominating one.
struct Complements {
  std::vector<double> total;
  std::vector<double> rest;

  const std::vector<double>& without(bool dominating) const { return dominating ? rest : total; }
};

template <class T>
class Moments {
 public:
  // `inverse` may still be what `moments` is going to fill.
  Moments(const Sorted& rows, const T* inverse)
      : classes_(rows.classes),
        d_(rows.embeddings.columns),
        wide_(round_up(d_, kWidestPanel)),
        stride_(wide_ + (wide_ % (2 * kWidestPanel) == 0 ? kPad : 0)),
        read_(rows.embeddings),
        order_(rows.order),
        inverse_(inverse) {
    const int64_t cached = kBlockBytes / static_cast<int64_t>(sizeof(T)) / stride_;
    const int64_t share = classes_.rows() / 32;
    block_rows_ = std::max({kFewestRows, std::min(share, cached), classes_.largest_small()});
    part_rows_ = std::max({d_, kFewestRows, std::min(share, kPartRows)});
  }

  // T_c of the classes that have slots, [slots, D, D], and of the others the sums of T_c and q_c
  // T_c, [2, D, D]; and 1 / |f_i|.
  void moments(double eps, T* inverses, T* slots, T* small) const {
    const T squared_eps = static_cast<T>(eps * eps);
    const auto normalise = [&](Range rows, const Scratch& scratch) {
      read(rows, scratch.unit);
      T* const inverse = inverses + rows.begin;
      k_.squared_norms({scratch.unit.data, rows.size(), d_, stride_}, inverse, 0, rows.size());
      invert_norms(inverse, rows.size(), squared_eps);
      k_.scale_rows(with_rows(scratch.unit, rows.size()), inverse);
      return scratch.unit.data;
    };
    std::vector<Part> parts = small_parts();
    const int64_t n_small = static_cast<int64_t>(parts.size());
    for (int64_t s = 0; s < classes_.slots; ++s) {
      split(classes_.range(classes_.small() + s), part_rows_,
            [&](Range rows) { parts.push_back({rows, s, 0.0}); });
    }
    const Matrices<T> sums = part_moments(parts, normalise);
    add_up(sums, {0, n_small}, parts, small, small + d_ * d_);
    for_each_slot_sum(parts, n_small, [&](int64_t s, Range range) {
      add_up(sums, range, parts, slots + s * d_ * d_, nullptr);
    });
  }

  // Eq. 3's two means of each row, in the order of the embeddings.
  void means(const T* slots, const T* small, T* positive, T* negative) const {
    const Complements others = complements(
        small, [&](int64_t s, int64_t at) { return static_cast<double>(slots[s * d_ * d_ + at]); });
    small_means(others, positive, negative);
    for_slot_batches(
        2,
        [&](int64_t s, int64_t p, T* const* packed) {
          const T* own = slots + s * d_ * d_;
          const std::vector<double>& rest = others.without(is_dominating(s));
          pack_half(p, packed[0], [&](int64_t at) { return own[at]; });
          pack_half(
              p, packed[1], [&](int64_t at) { return static_cast<T>(rest[at] - own[at]); },
              is_dominating(s) ? rest.data() : nullptr);
        },
        [&](int64_t s, Range rows, T* const* packed) {
          const int64_t c = classes_.small() + s;
          const T weight_p = static_cast<T>(classes_.p(c)),
                  weight_q = static_cast<T>(classes_.q(c));
          const Scratch scratch = make_scratch(1);
          read_units(rows, scratch.unit);
          const Block<const T> unit = as_const(with_rows(scratch.unit, rows.size()));
          k_.quadratic_forms(unit, packed[0], scratch.numbers);
          k_.quadratic_forms(unit, packed[1], scratch.more_numbers);
          for (int64_t i = 0; i < rows.size(); ++i) {
            const int64_t at = order_[rows.begin + i];
            positive[at] = weight_p * (scratch.numbers[i] - self(rows.begin + i));
            negative[at] = weight_q * scratch.more_numbers[i];
          }
        });
  }

  // dL/df for a = dL/dl [h > 0], in class order.
  void gradient(const T* a, const T* slots, const T* small, double sigma, T* result) const {
    if (std::all_of(a, a + classes_.rows(), [](T x) { return x == 0; })) {
      std::fill(result, result + classes_.rows() * d_, T(0));
      return;
    }
    const Weighted weighted = weighted_moments(a, slots, small);
    const Complements columns = complements(
        small, [&](int64_t s, int64_t at) { return static_cast<double>(slots[s * d_ * d_ + at]); });
    const Complements rows_served = complements(weighted.small.data(), [&](int64_t s, int64_t at) {
      return classes_.q(classes_.small() + s) * weighted.at(s, at);
    });
    map_pages(result, classes_.rows() * d_ * static_cast<int64_t>(sizeof(T)));
    small_gradient(a, columns, rows_served, sigma, result);
    // What a row's own loss makes of it, and what the rows make of it whose column it is.
    for_slot_batches(
        2,
        [&](int64_t s, int64_t p, T* const* packed) {
          const int64_t c = classes_.small() + s;
          const double weight_p = classes_.p(c), weight_q = classes_.q(c);
          const T* own = slots + s * d_ * d_;
          const bool dominates = is_dominating(s);
          const std::vector<double>& rest = columns.without(dominates);
          const std::vector<double>& rest_served = rows_served.without(dominates);
          const auto as_row = [&](int64_t at) {
            const double mine = own[at], others = dominates ? rest[at] : rest[at] - mine;
            return 2 * (sigma * weight_q * others - weight_p * mine);
          };
          const auto as_column = [&](int64_t at) {
            const double mine = weighted.at(s, at);
            const double others = dominates ? rest_served[at] : rest_served[at] - weight_q * mine;
            return 2 * (sigma * others - weight_p * mine);
          };
          if (weighted.is_level[s]) {
            const double level = weighted.level[s];
            pack(p, packed[0], [&](int64_t at) { return level * as_row(at) + as_column(at); });
          } else {
            pack(p, packed[0], as_row);
            pack(p, packed[1], as_column);
          }
        },
        [&](int64_t s, Range rows, T* const* packed) {
          const Scratch scratch = make_scratch(2);
          read_units(rows, scratch.unit);
          const Block<const T> unit = as_const(with_rows(scratch.unit, rows.size()));
          const Block<T> v = with_rows(scratch.result, rows.size());
          if (weighted.is_level[s]) {
            k_.multiply(unit, packed[0], nullptr, false, v);
          } else {
            k_.multiply(unit, packed[0], a + rows.begin, false, v);
            k_.multiply(unit, packed[1], nullptr, true, v);
          }
          write(rows, v, unit, result);
        });
  }

 private:
  // A part of one sum over rows: of a slot's class, or with its q of small classes of one size.
  struct Part {
    Range rows;
    int64_t slot;
    double q;
  };

  // A_c = sum of a_j u_j u_j^T: level times T_c where all rows of the class have one a.
  struct Weighted {
    std::vector<T> small;  // [D, D], the sum of q_c A_c over the classes without slots
    std::vector<char> is_level;
    std::vector<double> level;
    std::vector<const T*> matrix;
    std::vector<T> mixed;  // [D, D] for each class whose rows differ

    double at(int64_t s, int64_t i) const { return level[s] * static_cast<double>(matrix[s][i]); }
  };

  struct Scratch {
    Block<T> unit;
    Block<T> result;
    T* numbers;
    T* more_numbers;
    T* similarity;  // [largest small class, padded]
    int64_t similarity_stride;
  };

  // A thread's scratch; `blocks` says whether it has room for results beside the unit rows.
  Scratch make_scratch(int64_t blocks) const {
    const int64_t block = (block_rows_ + 1) * stride_, rows = round_up(block_rows_, kPad);
    const int64_t members = classes_.largest_small();
    const int64_t similarity_stride = round_up(members, kPad) + kPad;
    T* const base = thread_scratch<T>(blocks * block + 2 * rows + members * similarity_stride);
    T* const numbers = base + blocks * block;
    return {{base, block_rows_, d_, stride_},
            {base + (blocks - 1) * block, block_rows_, d_, stride_},
            numbers,
            numbers + rows,
            numbers + 2 * rows,
            similarity_stride};
  }

  static Block<T> with_rows(Block<T> block, int64_t rows) {
    block.rows = rows;
    return block;
  }

  static Block<const T> as_const(Block<T> block) {
    return {block.data, block.rows, block.columns, block.stride};
  }

  bool is_dominating(int64_t s) const { return classes_.small() + s == classes_.dominating(); }

  // Rows of all classes that are near each other in memory are taken one after the other: it is read
  // and written faster so.
  bool lies_before(Range a, Range b) const { return order_[a.begin] < order_[b.begin]; }

  // |u_i|^4: 1, or 0 for a zero row.
  T self(int64_t i) const { return inverse_[i] != 0 ? T(1) : T(0); }

  void read(Range rows, Block<T> to) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (i + kAhead < rows.size()) read_.prefetch_row(order_[rows.begin + i + kAhead]);
      read_(order_[rows.begin + i], to.row(i), wide_);
    }
  }

  void read_units(Range rows, Block<T> to) const {
    read(rows, to);
    k_.scale_rows(with_rows(to, rows.size()), inverse_ + rows.begin);
  }

  // Work worth a thread: units of so many rows against a matrix.
  int64_t unit_grain() const { return grain(block_rows_ * d_ * d_); }

  // Small classes of one size, cut into parts.
  std::vector<Part> small_parts() const {
    std::vector<Part> parts;
    for (int64_t c = 0, next = 0; c < classes_.small(); c = next) {
      while (next < classes_.small() && classes_.size(next) == classes_.size(c)) ++next;
      split({classes_.starts[c], classes_.starts[next]}, part_rows_,
            [&](Range rows) { parts.push_back({rows, -1, classes_.q(c)}); });
    }
    return parts;
  }

  // Sum of weighted_i u_i^T over each part, down to the diagonal's panel; [parts, D, wide].
  // fill(rows, scratch) puts unit rows into the scratch and returns the weighted ones.
  template <class Fill>
  Matrices<T> part_moments(const std::vector<Part>& parts, const Fill& fill) const {
    Matrices<T> sums(static_cast<int64_t>(parts.size()), d_, wide_);
    std::vector<int64_t> in_memory(parts.size());  // the order to take them in
    std::iota(in_memory.begin(), in_memory.end(), int64_t{0});
    std::sort(in_memory.begin(), in_memory.end(),
              [&](int64_t a, int64_t b) { return lies_before(parts[a].rows, parts[b].rows); });
    parallel_for(0, static_cast<int64_t>(parts.size()),
                                grain(part_rows_ * d_ * d_ / 2), [&](int64_t begin, int64_t end) {
                                  for (int64_t k = begin; k < end; ++k) {
                                    const int64_t i = in_memory[k];
                                    std::fill(sums[i], sums[i] + sums.size(), T(0));
                                    split(parts[i].rows, block_rows_, [&](Range rows) {
                                      const Scratch scratch = make_scratch(2);
                                      const T* const weighted = fill(rows, scratch);
                                      k_.add_moment({weighted, rows.size(), d_, stride_},
                                                    as_const(with_rows(scratch.unit, rows.size())),
                                                    sums[i], wide_);
                                    });
                                  }
                                });
    return sums;
  }

  // The sum of parts [range), mirrored, into result [D, D]; times q into `times_q` if not null.
  void add_up(const Matrices<T>& sums, Range range, const std::vector<Part>& parts, T* result,
              T* times_q) const {
    parallel_for(0, d_, grain(range.size() * d_), [&](int64_t begin, int64_t end) {
      std::vector<double> line(2 * d_);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(line.begin(), line.end(), 0.0);
        for (int64_t part = range.begin; part < range.end; ++part) {
          const T* const from = sums[part] + i * wide_;
          const double q = parts[part].q;
          for (int64_t j = i; j < d_; ++j) {
            line[j] += static_cast<double>(from[j]);
            line[d_ + j] += q * static_cast<double>(from[j]);
          }
        }
        for (int64_t j = i; j < d_; ++j) {
          if (result != nullptr) result[i * d_ + j] = result[j * d_ + i] = static_cast<T>(line[j]);
          if (times_q != nullptr) {
            times_q[i * d_ + j] = times_q[j * d_ + i] = static_cast<T>(line[d_ + j]);
          }
        }
      }
    });
  }

  // use(slot, range of its parts) for each slot among the parts from `first` on.
  template <class Use>
  static void for_each_slot_sum(const std::vector<Part>& parts, int64_t first, const Use& use) {
    const int64_t count = static_cast<int64_t>(parts.size());
    for (int64_t begin = first, end = first; begin < count; begin = end) {
      while (end < count && parts[end].slot == parts[begin].slot) ++end;
      use(parts[begin].slot, Range{begin, end});
    }
  }

  template <class At>
  Complements complements(const T* small, const At& slot_at) const {
    Complements sums{std::vector<double>(d_ * d_), std::vector<double>(d_ * d_)};
    parallel_for(0, d_ * d_, grain(classes_.slots + 1),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t at = begin; at < end; ++at)
                                    sums.rest[at] = static_cast<double>(small[at]);
                                  for (int64_t s = 0; s < classes_.slots; ++s) {
                                    if (is_dominating(s)) continue;
                                    for (int64_t at = begin; at < end; ++at)
                                      sums.rest[at] += slot_at(s, at);
                                  }
                                  for (int64_t at = begin; at < end; ++at)
                                    sums.total[at] = sums.rest[at];
                                  if (classes_.dominating() >= 0) {
                                    const int64_t s = classes_.slots - 1;
                                    for (int64_t at = begin; at < end; ++at)
                                      sums.total[at] += slot_at(s, at);
                                  }
                                });
    return sums;
  }

  // Panel p of a symmetric matrix [D, D] given by element, packed for `multiply`.
  template <class At>
  void pack(int64_t p, T* packed, const At& at) const {
    const int64_t left = p * k_.panel, width = std::min(k_.panel, d_ - left);
    T* to = packed + left * d_;
    for (int64_t i = 0; i < d_; ++i, to += k_.panel) {
      for (int64_t j = 0; j < width; ++j) to[j] = static_cast<T>(at(i * d_ + left + j));
      std::fill(to + width, to + k_.panel, T(0));
    }
  }

  // The same for `forms`.
  template <class At>
  void pack_half(int64_t p, T* packed, const At& at, const double* instead = nullptr) const {
    const int64_t left = p * k_.panel, width = std::min(k_.panel, d_ - left);
    T* to = packed + left * d_;
    for (int64_t i = 0; i < left + width; ++i, to += k_.panel) {
      const T scale = i < left ? T(2) : T(1);
      for (int64_t j = 0; j < width; ++j) {
        const int64_t k = i * d_ + left + j;
        to[j] = scale * (instead != nullptr ? static_cast<T>(instead[k]) : at(k));
      }
      std::fill(to + width, to + k_.panel, T(0));
    }
  }

  int64_t panels() const { return round_up(d_, k_.panel) / k_.panel; }
  int64_t packed_size() const { return panels() * k_.panel * d_; }

  // For the classes with slots, as many at once as there is room to pack matrices for: first
  // make(slot, panel, matrices) of each panel, then use(slot, rows, matrices) of each block of
  // rows.
  template <class Make, class Use>
  void for_slot_batches(int64_t matrices, const Make& make, const Use& use) const {
    const int64_t each = matrices * packed_size();
    if (classes_.slots == 0) return;
    const int64_t most = std::clamp<int64_t>(kPackedNumbers / each, 1, classes_.slots);
    const AlignedArray<T> packed(checked_product(most, each));
    struct Unit {
      int64_t slot;
      Range rows;
    };
    std::vector<Unit> units;
    for (int64_t first = 0; first < classes_.slots; first += most) {
      const int64_t last = std::min(first + most, classes_.slots);
      const auto matrices_of = [&](int64_t s, T** found) {
        for (int64_t m = 0; m < matrices; ++m) {
          found[m] = packed.data() + (s - first) * each + m * packed_size();
        }
      };
      parallel_for(0, (last - first) * panels(), grain(4 * matrices * d_ * k_.panel),
                                  [&](int64_t begin, int64_t end) {
                                    T* found[2];
                                    for (int64_t i = begin; i < end; ++i) {
                                      const int64_t s = first + i / panels();
                                      matrices_of(s, found);
                                      make(s, i % panels(), found);
                                    }
                                  });
      units.clear();
      for (int64_t s = first; s < last; ++s) {
        split(classes_.range(classes_.small() + s), block_rows_,
              [&](Range rows) { units.push_back({s, rows}); });
      }
      std::sort(units.begin(), units.end(),
                [&](const Unit& a, const Unit& b) { return lies_before(a.rows, b.rows); });
      parallel_for(0, static_cast<int64_t>(units.size()), unit_grain(),
                                  [&](int64_t begin, int64_t end) {
                                    T* found[2];
                                    for (int64_t i = begin; i < end; ++i) {
                                      matrices_of(units[i].slot, found);
                                      use(units[i].slot, units[i].rows, found);
                                    }
                                  });
    }
  }

  // Small classes, as many at once as fit a block: (first, last) class of each unit.
  std::vector<Range> small_units() const {
    std::vector<Range> units;
    for (int64_t c = 0; c < classes_.small(); ++c) {
      if (units.empty() ||
          classes_.starts[c + 1] - classes_.starts[units.back().begin] > block_rows_) {
        units.push_back({c, c});
      }
      units.back().end = c + 1;
    }
    return units;
  }

  Range rows_of(Range unit) const {
    return {classes_.starts[unit.begin], classes_.starts[unit.end]};
  }

  // S of one small class from its unit rows, the diagonal 0, whole vectors readable.
  void similarities(const T* unit, int64_t members, const Scratch& scratch) const {
    const int64_t stride = scratch.similarity_stride;
    T* const s = scratch.similarity;
    std::fill(s, s + members * stride, T(0));
    const Matrix<T> rows{unit, members, d_, stride_};
    k_.dots(rows, rows, s, stride, s, stride, scratch.more_numbers, 0,
            tile_count(members, members, true));
  }

  void small_means(const Complements& others, T* positive, T* negative) const {
    if (classes_.small() == 0) return;
    const AlignedArray<T> packed(packed_size());
    for (int64_t p = 0; p < panels(); ++p) {
      pack_half(p, packed.data(), [&](int64_t at) { return static_cast<T>(others.total[at]); });
    }
    const std::vector<Range> units = small_units();
    parallel_for(
        0, static_cast<int64_t>(units.size()), unit_grain(), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const Range rows = rows_of(units[i]);
            const Scratch scratch = make_scratch(1);
            read_units(rows, scratch.unit);
            T* const all = scratch.numbers;
            k_.quadratic_forms(as_const(with_rows(scratch.unit, rows.size())), packed.data(), all);
            for (int64_t c = units[i].begin; c < units[i].end; ++c) {
              const int64_t members = classes_.size(c), first = classes_.starts[c] - rows.begin;
              const T weight_p = static_cast<T>(classes_.p(c)),
                      weight_q = static_cast<T>(classes_.q(c));
              T* const own = scratch.more_numbers;
              if (members > 1) {
                similarities(scratch.unit.row(first), members, scratch);
                k_.squared_norms({scratch.similarity, members, members, scratch.similarity_stride},
                                 own, 0, members);
              } else {
                own[0] = 0;
              }
              for (int64_t r = 0; r < members; ++r) {
                const int64_t at = order_[classes_.starts[c] + r];
                positive[at] = weight_p * own[r];
                negative[at] = weight_q * (all[first + r] - own[r] - self(classes_.starts[c] + r));
              }
            }
          }
        });
  }

  void small_gradient(const T* a, const Complements& columns, const Complements& served,
                      double sigma, T* result) const {
    if (classes_.small() == 0) return;
    const AlignedArray<T> as_row(packed_size()), as_column(packed_size());
    for (int64_t p = 0; p < panels(); ++p) {
      pack(p, as_row.data(), [&](int64_t at) { return 2 * sigma * columns.total[at]; });
      pack(p, as_column.data(), [&](int64_t at) { return 2 * sigma * served.total[at]; });
    }
    // Where the rows of small classes have one weight, both matrices are one.
    const int64_t n = classes_.small_rows().size();
    std::vector<T> factor(n);
    for (int64_t c = 0; c < classes_.small(); ++c) {
      for (int64_t i = classes_.starts[c]; i < classes_.starts[c + 1]; ++i) {
        factor[i] = a[i] * static_cast<T>(classes_.q(c));
      }
    }
    const bool is_level =
        std::all_of(factor.begin(), factor.end(), [&](T x) { return x == factor[0]; });
    if (is_level) {
      for (int64_t i = 0; i < packed_size(); ++i)
        as_column.data()[i] += factor[0] * as_row.data()[i];
    }
    const std::vector<Range> units = small_units();
    parallel_for(
        0, static_cast<int64_t>(units.size()), unit_grain(), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const Range rows = rows_of(units[i]);
            const Scratch scratch = make_scratch(2);
            read_units(rows, scratch.unit);
            const Block<const T> unit = as_const(with_rows(scratch.unit, rows.size()));
            const Block<T> v = with_rows(scratch.result, rows.size());
            k_.multiply(unit, as_column.data(), nullptr, false, v);
            if (!is_level) k_.multiply(unit, as_row.data(), factor.data() + rows.begin, true, v);
            for (int64_t c = units[i].begin; c < units[i].end; ++c)
              add_own(c, rows, a, sigma, scratch);
            write(rows, v, unit, result);
          }
        });
  }

  // What the members of a small class make of each other: their share as others, which the moments
  // of all rows hold, is taken out with it.
  void add_own(int64_t c, Range rows, const T* a, double sigma, const Scratch& scratch) const {
    const int64_t members = classes_.size(c), first = classes_.starts[c] - rows.begin;
    if (members == 1) return;
    const T* const unit = scratch.unit.row(first);
    const Block<T> v{scratch.result.row(first), members, d_, stride_};
    similarities(unit, members, scratch);
    const T taken = static_cast<T>(-2 * sigma * classes_.q(c));
    const T scale = taken - static_cast<T>(2 * classes_.p(c));
    const T* const own_a = a + classes_.starts[c];
    for (int64_t i = 0; i < members; ++i) {
      T* const s = scratch.similarity + i * scratch.similarity_stride;
      for (int64_t j = 0; j < members; ++j) s[j] *= scale * (own_a[i] + own_a[j]);
    }
    k_.add_weighted_rows(scratch.similarity, scratch.similarity_stride, {unit, members, d_, stride_}, v);
  }

  // Rows of dL/df from those of dL/du, to their places.
  void write(Range rows, Block<T> v, Block<const T> unit, T* result) const {
    const int64_t bytes = d_ * static_cast<int64_t>(sizeof(T));
    k_.through_normalisation(v, unit, inverse_ + rows.begin);
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (i + kAhead < rows.size()) {
        const T* const later = result + order_[rows.begin + i + kAhead] * d_;
        prefetch(reinterpret_cast<const char*>(later), bytes, true);
      }
      std::memcpy(result + order_[rows.begin + i] * d_, v.row(i), bytes);
    }
  }

  Weighted weighted_moments(const T* a, const T* slots, const T* small) const {
    const auto level_of = [&](Range rows) {
      return std::all_of(a + rows.begin, a + rows.end, [&](T x) { return x == a[rows.begin]; });
    };
    Weighted found;
    std::vector<Part> parts;
    const bool small_is_level = level_of(classes_.small_rows());
    if (!small_is_level) parts = small_parts();
    const int64_t n_small = static_cast<int64_t>(parts.size());
    int64_t mixed = 0;
    for (int64_t s = 0; s < classes_.slots; ++s) {
      const Range rows = classes_.range(classes_.small() + s);
      found.is_level.push_back(level_of(rows));
      found.level.push_back(found.is_level.back() ? static_cast<double>(a[rows.begin]) : 1.0);
      found.matrix.push_back(slots + s * d_ * d_);
      if (found.is_level.back()) continue;
      ++mixed;
      split(rows, part_rows_, [&](Range part) { parts.push_back({part, s, 0.0}); });
    }
    const Matrices<T> sums = part_moments(parts, [&](Range rows, const Scratch& scratch) {
      read_units(rows, scratch.unit);
      std::copy(scratch.unit.data, scratch.unit.row(rows.size()), scratch.result.data);
      k_.scale_rows(with_rows(scratch.result, rows.size()), a + rows.begin);
      return scratch.result.data;
    });
    found.small.assign(d_ * d_, T(0));
    if (!small_is_level) {
      add_up(sums, {0, n_small}, parts, nullptr, found.small.data());
    } else if (classes_.small() > 0) {
      for (int64_t i = 0; i < d_ * d_; ++i) found.small[i] = a[0] * small[d_ * d_ + i];
    }
    found.mixed.resize(mixed * d_ * d_);
    T* next = found.mixed.data();
    for_each_slot_sum(parts, n_small, [&](int64_t s, Range range) {
      add_up(sums, range, parts, next, nullptr);
      found.matrix[s] = next;
      next += d_ * d_;
    });
    return found;
  }

  const Classes& classes_;
  const Kernels<T>& k_ = kernels<T>();
  const int64_t d_;
  const int64_t wide_;    // D up to whole panels
  const int64_t stride_;  // of the rows of a block
  RowReader<T> read_;
  const int64_t* order_;
  const T* inverse_;
  int64_t block_rows_;
  int64_t part_rows_;
};

}  // namespace

template <class T>
void means_by_moments(const Sorted& rows, double eps, const MomentState<T>& state, T* positive,
                      T* negative) {
  const Moments<T> path(rows, state.inverse);
  path.moments(eps, state.inverse, state.slots, state.small);
  path.means(state.slots, state.small, positive, negative);
}

template <class T>
void gradient_by_moments(const Sorted& rows, const MomentState<const T>& state, const T* a,
                         double sigma, T* result) {
  Moments<T>(rows, state.inverse).gradient(a, state.slots, state.small, sigma, result);
}

}  // namespace bstriplet
