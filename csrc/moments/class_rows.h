// The rows of a batch in class order, read block by block: a block's rows are gathered, widened and
// normalised into a thread's scratch, where the kernels find them in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "moments/moments.h"

namespace bstriplet {

inline constexpr int64_t kPartRows = 4096;       // of one sum in the accumulation type
inline constexpr int64_t kBlockBytes = 1 << 17;  // of unit rows in a thread's scratch
inline constexpr int64_t kFewestRows = 96;       // of a block: one read of a matrix serves them all
inline constexpr int64_t kAhead = 8;             // rows by which a prefetch runs ahead

// Cuts a range into the fewest parts of at most `most` rows, as even as can be.
template <class Take>
void split(Range range, int64_t most, Take take) {
  const int64_t parts = round_up(range.size(), most) / most;
  for (int64_t p = 0; p < parts; ++p) {
    take(Range{range.begin + range.size() * p / parts,
               range.begin + range.size() * (p + 1) / parts});
  }
}

template <class T>
Block<T> with_rows(Block<T> block, int64_t rows) {
  block.rows = rows;
  return block;
}

template <class T>
Block<const T> as_const(Block<T> block) {
  return {block.data, block.rows, block.columns, block.stride};
}

template <class T>
class ClassRows {
 public:
  // A thread's memory for one block of rows.
  struct Scratch {
    Block<T> unit;
    Block<T> result;   // the same memory as `unit` where only one block was asked for
    T* form;           // a number a row
    T* other_form;     // a second number a row
    T* similarity;     // S of the largest small class
    int64_t similarity_stride;
  };

  // inverse: 1 / |f_i| in class order. `read` works before it is filled.
  ClassRows(const Sorted& sorted, const T* inverse)
      : classes(sorted.classes),
        d(sorted.embeddings.columns),
        wide(round_up(d, kWidestPanel)),
        stride(wide + (wide % (2 * kWidestPanel) == 0 ? kPad : 0)),
        order(sorted.order),
        inverse(inverse),
        reader_(sorted.embeddings) {
    const int64_t cached = kBlockBytes / static_cast<int64_t>(sizeof(T)) / stride;
    const int64_t share = classes.rows() / 32;
    block_rows = std::max({kFewestRows, std::min(share, cached), classes.largest_small()});
    part_rows = std::max({d, kFewestRows, std::min(share, kPartRows)});
  }

  // The calling thread's scratch, with room for one block or for two.
  Scratch scratch(int64_t blocks) const {
    const int64_t block = (block_rows + 1) * stride, rows = round_up(block_rows, kPad);
    const int64_t members = classes.largest_small();
    const int64_t similarity_stride = round_up(members, kPad) + kPad;
    T* const base = thread_scratch<T>(blocks * block + 2 * rows + members * similarity_stride);
    T* const numbers = base + blocks * block;
    return {{base, block_rows, d, stride},
            {base + (blocks - 1) * block, block_rows, d, stride},
            numbers,
            numbers + rows,
            numbers + 2 * rows,
            similarity_stride};
  }

  // Rows as they are, in the accumulation type.
  void read(Range rows, Block<T> to) const {
    for (int64_t i = 0; i < rows.size(); ++i) {
      if (i + kAhead < rows.size()) reader_.prefetch_row(order[rows.begin + i + kAhead]);
      reader_(order[rows.begin + i], to.row(i), wide);
    }
  }

  // Rows divided by their norms; returns the block of them.
  Block<T> read_units(Range rows, Block<T> to) const {
    read(rows, to);
    const Block<T> unit = with_rows(to, rows.size());
    k.scale_rows(unit, inverse + rows.begin);
    return unit;
  }

  // |u_i|^4: 1, or 0 for a zero row.
  T self(int64_t i) const { return inverse[i] != 0 ? T(1) : T(0); }

  // Whether the first row of a comes before that of b in memory. Ranges of different classes are
  // taken in this order, which reads and writes memory faster.
  bool lies_before(Range a, Range b) const { return order[a.begin] < order[b.begin]; }

  // The fewest blocks of rows, each against one matrix, that are worth a thread.
  int64_t block_grain() const { return grain(block_rows * d * d); }

  // Ranges of small classes whose rows fit a block together.
  std::vector<Range> small_class_groups() const {
    std::vector<Range> groups;
    for (int64_t c = 0; c < classes.small(); ++c) {
      if (groups.empty() || rows_of({groups.back().begin, c + 1}).size() > block_rows) {
        groups.push_back({c, c});
      }
      groups.back().end = c + 1;
    }
    return groups;
  }

  Range rows_of(Range of_classes) const {
    return {classes.starts[of_classes.begin], classes.starts[of_classes.end]};
  }

  // Writes S of one small class to the scratch, from its unit rows; the diagonal is 0, and rows are
  // padded with zeros. Overwrites `other_form`.
  void similarities(const T* unit, int64_t members, const Scratch& scratch) const {
    T* const s = scratch.similarity;
    std::fill(s, s + members * scratch.similarity_stride, T(0));
    const Matrix<T> rows{unit, members, d, stride};
    k.dots(rows, rows, s, scratch.similarity_stride, s, scratch.similarity_stride,
           scratch.other_form, 0, tile_count(members, members, true));
  }

  const Classes& classes;
  const Kernels<T>& k = kernels<T>();
  const int64_t d;
  const int64_t wide;    // D rounded up to whole panels
  const int64_t stride;  // from row to row of a block
  const int64_t* const order;
  const T* const inverse;
  int64_t block_rows;  // the most rows of a block
  int64_t part_rows;   // the most rows of one sum in the accumulation type

 private:
  RowReader<T> reader_;
};

}  // namespace bstriplet
