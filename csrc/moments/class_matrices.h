// A symmetric matrix for each class, and for each class the sum of the others'.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "moments/moments.h"

namespace bstriplet {

// M_c [D, D] with a weight w_c for each class c. The path has two: T_c with weights 1, and A_c with
// weights q_c. Classes with slots have matrices of their own; of the small ones the sum is enough.
// Elements are numbered i D + j.
template <class T>
class ClassMatrices {
 public:
  struct Slot {
    const T* numbers;  // M_c = factor numbers
    double factor;
    double weight;
  };

  // small: [D, D], the sum of w_c M_c over the classes without slots. numbers: what slots may point
  // into, kept alive here.
  ClassMatrices(const Classes& classes, int64_t d, std::vector<Slot> slots, const T* small,
                std::vector<T> numbers = {})
      : slots_(std::move(slots)),
        numbers_(std::move(numbers)),
        dominating_(classes.dominating() >= 0 ? classes.slots - 1 : -1),
        all_(d * d),
        all_but_dominating_(d * d) {
    parallel_for(0, d * d, grain(classes.slots + 1), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        all_but_dominating_[at] = static_cast<double>(small[at]);
      }
      for (int64_t s = 0; s < classes.slots; ++s) {
        if (s == dominating_) continue;
        for (int64_t at = begin; at < end; ++at) all_but_dominating_[at] += weighted(s, at);
      }
      for (int64_t at = begin; at < end; ++at) {
        all_[at] = all_but_dominating_[at];
        if (dominating_ >= 0) all_[at] += weighted(dominating_, at);
      }
    });
  }

  ClassMatrices(ClassMatrices&&) = default;  // slots point into `numbers_`, so there is no copy

  // M_c of slot s.
  double own(int64_t s, int64_t at) const {
    return slots_[s].factor * static_cast<double>(slots_[s].numbers[at]);
  }

  // The sum of w_k M_k over all classes.
  double all(int64_t at) const { return all_[at]; }

  // The sum over all classes but that of slot s. It is a difference, except for the class that has
  // more than half of the rows, where the difference would cancel.
  double others(int64_t s, int64_t at) const {
    return s == dominating_ ? all_but_dominating_[at] : all_[at] - weighted(s, at);
  }

  // Whether M_c of slot s is factor(s) times the matrix that `matrices` has there.
  bool is_multiple_of(const ClassMatrices& matrices, int64_t s) const {
    return slots_[s].numbers == matrices.slots_[s].numbers;
  }

  double factor(int64_t s) const { return slots_[s].factor; }

 private:
  double weighted(int64_t s, int64_t at) const { return slots_[s].weight * own(s, at); }

  std::vector<Slot> slots_;
  std::vector<T> numbers_;
  int64_t dominating_;  // its slot, or -1
  std::vector<double> all_;
  std::vector<double> all_but_dominating_;
};

}  // namespace bstriplet
