// What torch.ops.bstriplet.batch_similarity is given and returns on any device, and the check of
// it: after `checked` a kernel may follow every pointer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "rows.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // torch 2.11's headers have it by its older name
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace bstriplet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// loss [], means [2, N] (Eq. 3's of the positives, of the negatives), grad [N, D], grad_ref [M, D]; a
// gradient that was not asked for, or has no ref_emb to be of, is [0]. Few outputs, because each
// costs a microsecond.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Eq. 3's numbers and what to compute. The loss is the mean, or else the sum, of max(0, h_i) over
// the rows; a row's dL/dl_i is upstream's where that is given, else the one that the loss implies.
struct Options {
  double margin;
  double sigma;
  bool is_signed;
  double eps;
  bool mean;
  bool gradient;
};

struct Inputs {
  Tensor embeddings;                 // [N, D]
  std::optional<Tensor> ref_emb;     // [M, D]
  Tensor labels;                     // [N] int64
  std::optional<Tensor> ref_labels;  // [M] int64
  std::optional<Tensor> upstream;    // [N] of the accumulation dtype
  ScalarType accumulation;           // Double where an embedding is, else Float
  int64_t rows;                      // N
  int64_t columns;                   // M, or N without ref_emb
  int64_t depth;                     // D
};

// Throws std::runtime_error, naming the argument and what is allowed, unless everything fits.
Inputs checked(Tensor embeddings, std::optional<Tensor> ref_emb, Tensor labels,
               std::optional<Tensor> ref_labels, std::optional<Tensor> upstream);

void check_matrix(const char* name, const Tensor& matrix);
void check_vector(const char* name, const Tensor& vector, ScalarType dtype, int64_t n);
void check_device(const char* name, const Tensor& tensor, const Tensor& embeddings);

// An uninitialised contiguous tensor of float32, float64 or int64, on the device of `like`.
Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like);

// An uninitialised tensor of zero, one or two dimensions, on the device of `like`.
Tensor empty_scalar(ScalarType dtype, const Tensor& like);
Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& like);
Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like);

// The numbers of a matrix that `check_matrix` has seen.
StridedRows strided_rows(const Tensor& matrix);

}  // namespace bstriplet
