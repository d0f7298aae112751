// What the operators share on the CPU: the choice of kernels, threads, scratch, and reading rows.
// It has no headers of torch, so that the arithmetic compiles in a moment.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "kernels/kernels.h"
#include "rows.h"

namespace bstriplet {

enum class InstructionSet { baseline, avx2, avx512 };

// The instruction set in use; the first call chooses it.
InstructionSet instruction_set();

template <class T>
const Kernels<T>& kernels() {
  constexpr bool single = std::is_same_v<T, float>;
#if defined(BSTRIPLET_X86_KERNELS)
  if (instruction_set() == InstructionSet::avx512) {
    if constexpr (single)
      return avx512::float_kernels();
    else
      return avx512::double_kernels();
  }
  if (instruction_set() == InstructionSet::avx2) {
    if constexpr (single)
      return avx2::float_kernels();
    else
      return avx2::double_kernels();
  }
#endif
  if constexpr (single)
    return baseline::float_kernels();
  else
    return baseline::double_kernels();
}

// The fewest units that are worth a thread: a few microseconds of multiply-adds.
inline int64_t grain(int64_t multiply_adds_per_unit) {
  return std::max<int64_t>(1, (int64_t{1} << 18) / std::max<int64_t>(1, multiply_adds_per_unit));
}

// Runs work(begin, end) on torch's threads, for pieces of [begin, end) of at least `grain` units.
// An exception in one of them is thrown here.
void run_parallel(int64_t begin, int64_t end, int64_t grain,
                  void (*work)(int64_t begin, int64_t end, void* context), void* context);

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  run_parallel(
      begin, end, grain,
      [](int64_t from, int64_t to, void* context) {
        (*static_cast<const Work*>(context))(from, to);
      },
      const_cast<Work*>(&work));
}

// Maps the pages of large fresh memory on all threads, so that the first write to each does not
// trap: 77 ms instead of 120 for 512 MiB and two threads.
void map_pages(void* data, int64_t bytes);

// Brings the start of a row to the cache; the processor fetches the rest of a long row by itself.
inline void prefetch(const char* row, int64_t bytes, bool to_write) {
#if defined(__GNUC__)
  for (int64_t k = 0; k < std::min<int64_t>(bytes, 1024); k += 64) {
    if (to_write)
      __builtin_prefetch(row + k, 1);
    else
      __builtin_prefetch(row + k, 0);
  }
#else
  (void)row, (void)bytes, (void)to_write;
#endif
}

// Uninitialised numbers, aligned to a cache line.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t n) : memory_(new T[n + kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = memory_.get() + (round_up(address, 64) - address) / sizeof(T);
  }

  T* data() const { return data_; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  std::unique_ptr<T[]> memory_;
  T* data_ = nullptr;
};

// The calling thread's memory for n numbers, kept for its next call.
template <class T>
T* thread_scratch(int64_t n) {
  thread_local AlignedArray<T> memory;
  thread_local int64_t size = 0;
  if (size < n) {
    size = 0;
    memory = {};  // first, so that old and new memory are never held together
    memory = AlignedArray<T>(n);
    size = n;
  }
  return memory.data();
}

using Widen = void (*)(const uint16_t*, float*, int64_t);

template <class T>
void gather_half(Widen widen, const void* data, int64_t n, int64_t stride, T* to) {
  constexpr int64_t piece = 256;
  uint16_t halves[piece];
  float floats[piece];
  for (int64_t k = 0; k < n; k += piece) {
    const int64_t m = std::min(piece, n - k);
    const uint16_t* from = static_cast<const uint16_t*>(data) + k * stride;
    if (stride != 1) gather<uint16_t>(from, m, stride, halves);
    widen(stride == 1 ? from : halves, floats, m);
    std::copy(floats, floats + m, to + k);
  }
}

// Reads rows of a matrix as T, whatever its elements and strides.
template <class T>
class RowReader {
 public:
  explicit RowReader(const StridedRows& rows)
      : element_(rows.element),
        columns_(rows.columns),
        element_bytes_(rows.element == Element::float64   ? 8
                       : rows.element == Element::float32 ? 4
                                                          : 2),
        stride_(rows.column_stride),
        row_bytes_(rows.row_stride * element_bytes_),
        data_(static_cast<const char*>(rows.data)) {}

  // Writes row i to `padded` elements, zeros beyond the last column.
  void operator()(int64_t i, T* to, int64_t padded) const {
    const void* const from = data_ + i * row_bytes_;
    std::fill(to + columns_, to + padded, T(0));
    const Kernels<float>& widen = kernels<float>();
    switch (element_) {
      case Element::float64:
        return gather<double>(from, columns_, stride_, to);
      case Element::float32:
        return gather<float>(from, columns_, stride_, to);
      case Element::float16:
        return gather_half(widen.widen_float16, from, columns_, stride_, to);
      default:
        return gather_half(widen.widen_bfloat16, from, columns_, stride_, to);
    }
  }

  // Prefetches row i for `operator()`, if its columns are adjacent.
  void prefetch_row(int64_t i) const {
    if (stride_ == 1) prefetch(data_ + i * row_bytes_, columns_ * element_bytes_, false);
  }

 private:
  Element element_;
  int64_t columns_;
  int64_t element_bytes_;
  int64_t stride_;
  int64_t row_bytes_;
  const char* data_;
};

// Replaces |f_i|^2 by 1 / |f_i|. An overflow becomes NaN: 1 / inf = 0 would hide it.
template <class T>
void invert_norms(T* squared, int64_t n, T squared_eps) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = squared[i];
    squared[i] = value <= squared_eps                          ? T(0)
                 : value == std::numeric_limits<T>::infinity() ? std::numeric_limits<T>::quiet_NaN()
                                                               : T(1) / std::sqrt(value);
  }
}

}  // namespace bstriplet
