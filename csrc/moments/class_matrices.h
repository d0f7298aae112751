// A symmetric matrix for each class, and for each class the sum of the others'.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "moments/moments.h"

namespace bstriplet {

// M_c [D, D] with a weight w_c for each class c. The path has two such sets: T_c with weights 1,
// and A_c with weights q_c. Classes with slots have matrices of their own, small classes only their
// sum. Elements are numbered i D + j.
template <class T>
class ClassMatrices {
 public:
  // A class with a slot: M_c = factor numbers, and w_c = weight.
  struct Slot {
    const T* numbers;
    double factor;
    double weight;

    double own(int64_t at) const { return factor * static_cast<double>(numbers[at]); }
  };

  // small: [D, D], the sum of w_c M_c over the classes without slots. numbers: memory that slots
  // may point into, kept alive here.
  ClassMatrices(const Classes& classes, int64_t d, std::vector<Slot> slots, const T* small,
                std::vector<T> numbers = {})
      : slots_(std::move(slots)),
        numbers_(std::move(numbers)),
        dominating_(classes.dominating() >= 0 ? classes.slots - 1 : -1),
        all_(d * d),
        all_but_dominating_(d * d) {
    double* const all = all_.data();
    double* const rest = all_but_dominating_.data();
    parallel_for(0, d * d, grain(classes.slots + 1), [&](int64_t begin, int64_t end) {
      const auto add = [begin, end](Slot slot, double* sum) {
        for (int64_t at = begin; at < end; ++at) sum[at] += slot.weight * slot.own(at);
      };
      for (int64_t at = begin; at < end; ++at) rest[at] = static_cast<double>(small[at]);
      for (int64_t s = 0; s < classes.slots; ++s) {
        if (s != dominating_) add(slots_[s], rest);
      }
      std::copy(rest + begin, rest + end, all + begin);
      if (dominating_ >= 0) add(slots_[dominating_], all);
    });
  }

  ClassMatrices(ClassMatrices&&) = default;  // slots point into `numbers_`, so there is no copy

  // The matrix of one class and the sum of the others'. Loops over elements copy it, so that the
  // compiler keeps it in registers.
  struct View : Slot {
    const double* sum;  // of w_k M_k, over all classes or over all others
    bool sum_has_own;

    double others(int64_t at) const {
      return sum_has_own ? sum[at] - this->weight * this->own(at) : sum[at];
    }
  };

  // The view of the class with slot s. The others' sum is a difference, except for the class with
  // more than half of the rows, where the difference would cancel.
  View operator[](int64_t s) const {
    const bool dominates = s == dominating_;
    return {slots_[s], (dominates ? all_but_dominating_ : all_).data(), !dominates};
  }

  // The sum of w_k M_k over all classes.
  double all(int64_t at) const { return all_[at]; }

  // Whether M_c of slot s is a multiple of that of `matrices`.
  bool is_multiple_of(const ClassMatrices& matrices, int64_t s) const {
    return slots_[s].numbers == matrices.slots_[s].numbers;
  }

 private:
  std::vector<Slot> slots_;
  std::vector<T> numbers_;
  int64_t dominating_;  // its slot, or -1
  std::vector<double> all_;
  std::vector<double> all_but_dominating_;
};

}  // namespace bstriplet
