// Every kernel of kernels/baseline.cpp against loops in long double, on sizes that fill no tile: on
// x86-64 its SSE2 form, on arm64 its NEON form. Needs neither torch nor Python. Exits with 1 and
// says what is wrong, or prints the number of comparisons.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/kernels.h"

using namespace bstriplet;

namespace {

using Numbers = std::vector<long double>;
std::mt19937_64 engine(0);
int comparisons = 0;

template <class T>
const Kernels<T>& kernels() {
  if constexpr (sizeof(T) == 4) return baseline::float_kernels();
  else return baseline::double_kernels();
}

template <class T>
void agree(const std::string& what, const Numbers& got, const Numbers& truth) {
  long double error = 0, size = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (got[i] - truth[i]) * (got[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  ++comparisons;
  const long double allowed = 16 * std::numeric_limits<T>::epsilon();
  if (std::sqrt(error) <= allowed * std::sqrt(size)) return;
  std::printf("%s of %zu bytes is off by %.1Le of the norm\n", what.c_str(), sizeof(T),
              std::sqrt(error / size));
  std::exit(1);
}

// Rows with zeros up to a stride of whole panels, and a few of slack below.
template <class T>
struct Table {
  int64_t rows, columns, stride;
  std::vector<T> data;

  Table(int64_t rows, int64_t columns, bool random = true)
      : rows(rows),
        columns(columns),
        stride(round_up(columns, kWidestPanel)),
        data(static_cast<size_t>((rows + kWidestPanel) * stride)) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; random && i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) at(i, j) = static_cast<T>(normal(engine));
  }

  T& at(int64_t i, int64_t j) { return data[static_cast<size_t>(i * stride + j)]; }
  T at(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * stride + j)]; }
  Matrix<T> matrix() const { return {data.data(), rows, columns, stride}; }
  Block<T> block() { return {data.data(), rows, columns, stride}; }
  Block<const T> unit() const { return {data.data(), rows, columns, stride}; }

  Numbers numbers() const {
    Numbers all;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) all.push_back(at(i, j));
    return all;
  }
};

// numbers() of a table whose entry (i, j) is f(i, j).
template <class F>
Numbers table_of(int64_t rows, int64_t columns, F f) {
  Numbers all;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) all.push_back(f(i, j));
  return all;
}

template <class F>
long double sum_of(int64_t n, F f) {
  long double total = 0;
  for (int64_t i = 0; i < n; ++i) total += f(i);
  return total;
}

template <class T>
struct SideOf {
  std::vector<T> inverse, per_positive, per_negative;
  std::vector<Class<T>> label;

  explicit SideOf(int64_t n)
      : inverse(round_up(n, kPad)),
        per_positive(round_up(n, kPad)),
        per_negative(round_up(n, kPad)),
        label(round_up(n, kPad), -1) {
    std::uniform_real_distribution<double> uniform(0.1, 1);
    for (int64_t i = 0; i < n; ++i) {
      inverse[i] = static_cast<T>(uniform(engine));
      per_positive[i] = static_cast<T>(uniform(engine));
      per_negative[i] = static_cast<T>(uniform(engine));
      label[i] = static_cast<Class<T>>(i * 7 % 3);
    }
  }

  Side<T> side() {
    return {inverse.data(), label.data(), per_positive.data(), per_negative.data()};
  }
};

template <class T>
void check_pairs(int64_t n, int64_t m, int64_t d) {
  const Kernels<T>& k = kernels<T>();
  const Table<T> f(n, d), g(m, d);
  const auto dot = [d](const Table<T>& a, int64_t i, const Table<T>& b, int64_t j) {
    return sum_of(d, [&](int64_t c) { return static_cast<long double>(a.at(i, c)) * b.at(j, c); });
  };

  Table<T> s(n, m, false), mirror(m, n, false);
  k.dots(f.matrix(), g.matrix(), s.data.data(), s.stride, mirror.data.data(), mirror.stride,
         nullptr, 0, tile_count(n, m, false));
  agree<T>("dots", s.numbers(), table_of(n, m, [&](auto i, auto j) { return dot(f, i, g, j); }));
  agree<T>("dots' mirror", mirror.numbers(),
           table_of(m, n, [&](auto i, auto j) { return dot(g, i, f, j); }));
  Table<T> own(n, n, false), squared(1, n, false);
  const int64_t count = tile_count(n, n, true), part = count / 2;  // as two threads would
  for (const auto& [begin, end] : {std::pair(part, count), std::pair(int64_t{0}, part)}) {
    k.dots(f.matrix(), f.matrix(), own.data.data(), own.stride, own.data.data(), own.stride,
           squared.data.data(), begin, end);
  }
  const Numbers norms = table_of(1, n, [&](auto, auto i) { return dot(f, i, f, i); });
  agree<T>("dots of itself", own.numbers(), table_of(n, n, [&](auto i, auto j) {
             return i == j ? 0 : dot(f, i, f, j);
           }));
  agree<T>("norms by dots", squared.numbers(), norms);
  k.squared_norms(f.matrix(), squared.data.data(), 0, n);
  agree<T>("squared_norms", squared.numbers(), norms);

  SideOf<T> rows(n), columns(m);
  for (const bool is_signed : {false, true}) {
    const auto cosine = [&](int64_t i, int64_t j) {
      return static_cast<long double>(s.at(i, j)) * rows.inverse[i] * columns.inverse[j];
    };
    const auto slope = [&](int64_t i, int64_t j) {
      const long double same = -2 * (static_cast<long double>(rows.per_positive[i]) +
                                     columns.per_positive[j]);
      const long double other = 2 * (static_cast<long double>(rows.per_negative[i]) +
                                     columns.per_negative[j]);
      return (rows.label[i] == columns.label[j] ? same : other) *
             (is_signed ? std::abs(cosine(i, j)) : cosine(i, j));
    };
    const auto phi_sum = [&](int64_t i, bool same) {
      return sum_of(m, [&](int64_t j) {
        const long double c = cosine(i, j);
        return (rows.label[i] == columns.label[j]) == same ? c * (is_signed ? std::abs(c) : c) : 0;
      });
    };
    Table<T> sums(2, n, false), along(1, n, false), weights = s;
    for (int64_t i = 0; i < n; ++i) {
      k.row_sums(&s.at(i, 0), rows.inverse[i], rows.label[i], columns.side(), round_up(m, kPad),
                 is_signed, &sums.at(0, i), &sums.at(1, i));
      along.at(0, i) = k.row_weights(&weights.at(i, 0), rows.side(), i, columns.side(),
                                     round_up(m, kPad), is_signed);
    }
    agree<T>("row_sums", sums.numbers(),
             table_of(2, n, [&](auto line, auto i) { return phi_sum(i, line == 0); }));
    agree<T>("row_weights", weights.numbers(), table_of(n, m, [&](auto i, auto j) {
               return slope(i, j) * columns.inverse[j];
             }));
    agree<T>("row_weights' sum", along.numbers(), table_of(1, n, [&](auto, auto i) {
               return sum_of(m, [&](int64_t j) { return slope(i, j) * cosine(i, j); });
             }));

    std::vector<T> gradient(static_cast<size_t>(n * d)), packed(static_cast<size_t>(m * k.panel));
    const int64_t units = round_up(n, kRowGroup) / kRowGroup * (round_up(d, k.panel) / k.panel);
    k.product(weights.data.data(), weights.stride, g.matrix(), f.matrix(), rows.inverse.data(),
              along.data.data(), gradient.data(), packed.data(), 0, units);
    agree<T>("product", Numbers(gradient.begin(), gradient.end()),
             table_of(n, d, [&](auto i, auto c) {
               const long double v = sum_of(m, [&](int64_t j) {
                 return static_cast<long double>(weights.at(i, j)) * g.at(j, c);
               });
               const long double inverse = rows.inverse[i];
               return (v - along.at(0, i) * inverse * f.at(i, c)) * inverse;
             }));
  }
}

template <class T>
void check_moments(int64_t n, int64_t d) {
  const Kernels<T>& k = kernels<T>();
  const Table<T> unit(n, d), weighted(n, d), moment(d, d);
  Table<T> factor(1, n);
  std::vector<T> whole(static_cast<size_t>(round_up(d, k.panel) * d)), half = whole;
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < d; ++j) {
      const int64_t left = j / k.panel * k.panel;
      const auto at = static_cast<size_t>(left * d + i * k.panel + j - left);
      whole[at] = i < j ? moment.at(i, j) : moment.at(j, i);
      half[at] = i < left ? 2 * whole[at] : whole[at];
    }
  }
  const auto symmetric = [&](int64_t i, int64_t j) -> long double {
    return moment.at(std::min(i, j), std::max(i, j));
  };
  const auto times_moment = [&](int64_t i, int64_t c) {
    return sum_of(d, [&](int64_t b) { return unit.at(i, b) * symmetric(b, c); });
  };

  Table<T> scaled = unit, form(1, n, false), total(d, d, false), result(n, d), weights(n, n);
  k.scale_rows(scaled.block(), factor.data.data());
  agree<T>("scale_rows", scaled.numbers(), table_of(n, d, [&](auto i, auto c) {
             return static_cast<long double>(unit.at(i, c)) * factor.at(0, i);
           }));
  k.add_moment(weighted.unit(), unit.unit(), total.data.data(), total.stride);
  Numbers upper, upper_truth;
  for (int64_t b = 0; b < d; ++b) {
    for (int64_t c = b; c < d; ++c) {
      upper.push_back(total.at(b, c));
      upper_truth.push_back(sum_of(n, [&](int64_t i) {
        return static_cast<long double>(weighted.at(i, b)) * unit.at(i, c);
      }));
    }
  }
  agree<T>("add_moment", upper, upper_truth);
  k.quadratic_forms(unit.unit(), half.data(), form.data.data());
  agree<T>("quadratic_forms", form.numbers(), table_of(1, n, [&](auto, auto i) {
             return sum_of(d, [&](int64_t c) { return times_moment(i, c) * unit.at(i, c); });
           }));
  for (const bool add : {false, true}) {
    const Table<T> before = result;
    const T* const factors = add ? factor.data.data() : nullptr;
    k.multiply_rows(unit.unit(), whole.data(), factors, add, result.block());
    agree<T>("multiply_rows", result.numbers(), table_of(n, d, [&](auto i, auto c) {
               return times_moment(i, c) * (add ? factor.at(0, i) : T(1)) +
                      (add ? before.at(i, c) : T(0));
             }));
  }
  const Table<T> before = result;
  k.add_weighted_rows(weights.data.data(), weights.stride, unit.unit(), result.block());
  agree<T>("add_weighted_rows", result.numbers(), table_of(n, d, [&](auto i, auto c) {
             return before.at(i, c) + sum_of(n, [&](int64_t j) {
                      return static_cast<long double>(weights.at(i, j)) * unit.at(j, c);
                    });
           }));
  Table<T> v = weighted;
  k.through_normalisation(v.block(), unit.unit(), factor.data.data());
  agree<T>("through_normalisation", v.numbers(), table_of(n, d, [&](auto i, auto c) {
             const long double along = sum_of(d, [&](int64_t b) {
               return static_cast<long double>(weighted.at(i, b)) * unit.at(i, b);
             });
             return (weighted.at(i, c) - along * unit.at(i, c)) * factor.at(0, i);
           }));
}

// Every bit pattern of a half type: sign, exponent, fraction by the book.
void check_widen(bool brain) {
  const int fraction_bits = brain ? 7 : 10, bias = brain ? 127 : 15;
  const int ones = (1 << (15 - fraction_bits)) - 1;
  std::vector<uint16_t> halves(1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> got(halves.size());
  const Kernels<float>& k = kernels<float>();
  (brain ? k.widen_bfloat16 : k.widen_float16)(halves.data(), got.data(), 1 << 16);
  for (size_t i = 0; i < halves.size(); ++i) {
    const int exponent = static_cast<int>(i >> fraction_bits) & ones;
    const double fraction = static_cast<double>(i & ((1u << fraction_bits) - 1)) /
                            static_cast<double>(1 << fraction_bits);
    double truth = exponent == 0 ? std::ldexp(fraction, 1 - bias)
                                 : std::ldexp(1 + fraction, exponent - bias);
    if (exponent == ones) truth = fraction == 0 ? std::numeric_limits<double>::infinity() : NAN;
    if (i >> 15) truth = -truth;
    const bool right = std::isnan(truth) ? std::isnan(got[i])
                                         : got[i] == truth && std::signbit(got[i]) == (i >> 15);
    if (!right) {
      std::printf("widen_%s of %zx is %g, not %g\n", brain ? "bfloat16" : "float16", i,
                  static_cast<double>(got[i]), truth);
      std::exit(1);
    }
  }
  ++comparisons;
}

template <class T>
void check() {
  for (const auto& [n, m, d] : {std::tuple<int64_t, int64_t, int64_t>{37, 45, 75},
                               {2, 1, 1},
                               {36, 36, 128},
                               {101, 13, 530}}) {
    check_pairs<T>(n, m, d);
    check_moments<T>(n, d % 97);
  }
}

}  // namespace

int main() {
  check<float>();
  check<double>();
  check_widen(true);
  check_widen(false);
  std::printf("%d comparisons\n", comparisons);
}
