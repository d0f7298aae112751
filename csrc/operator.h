// The operator batch_similarity: its arguments, their check and its results, the same on every
// device. After `checked` a kernel may follow every pointer. Allocations are for all operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "rows.h"
#include "spec.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // torch 2.11's headers have it by its older name
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace bstriplet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// loss [], means [2, N] (Eq. 3's over positives, over negatives), grad [N, D], grad_ref [M, D], all
// of the accumulation dtype. A gradient that is not wanted is [0], as is grad_ref without ref_emb.
// Outputs are few because each costs a microsecond.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Inputs {
  Tensor embeddings;                 // [N, D]
  std::optional<Tensor> ref_emb;     // [M, D]
  Tensor labels;                     // [N] int64
  std::optional<Tensor> ref_labels;  // [M] int64
  std::optional<Tensor> upstream;    // dL/dl_i, [N] of the accumulation dtype
  ScalarType accumulation;           // Double if either matrix is, else Float
  int64_t rows;                      // N
  int64_t columns;                   // M, or N without ref_emb
  int64_t depth;                     // D
};

// Throws std::runtime_error, naming the argument and what is allowed, if one does not fit.
Inputs checked(Tensor embeddings, std::optional<Tensor> ref_emb, Tensor labels,
               std::optional<Tensor> ref_labels, std::optional<Tensor> upstream);

// The operator that one device registers; `run` computes it there.
template <Results (*run)(const Inputs&, const Spec&)>
Results batch_similarity(Tensor embeddings, Tensor labels, bool gradient, double margin, bool mean,
                         bool is_signed, double sigma, double eps, std::optional<Tensor> ref_emb,
                         std::optional<Tensor> ref_labels, std::optional<Tensor> upstream) {
  const Inputs in = checked(std::move(embeddings), std::move(ref_emb), std::move(labels),
                            std::move(ref_labels), std::move(upstream));
  const double scale = mean ? 1.0 / static_cast<double>(in.rows) : 1.0;
  return run(in, {margin, sigma, eps * eps, scale, is_signed, gradient});
}

void check_matrix(const char* name, const Tensor& matrix);
void check_vector(const char* name, const Tensor& vector, ScalarType dtype, int64_t n);
void check_device(const char* name, const Tensor& tensor, const Tensor& embeddings);

// An uninitialised contiguous float32, float64 or int64 tensor, up to 3D, on the device of `like`.
Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like);

// An uninitialised tensor of zero, one or two dimensions, on the device of `like`.
Tensor empty_scalar(ScalarType dtype, const Tensor& like);
Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& like);
Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like);

// Pointer, sizes and strides of a matrix that passed `check_matrix`.
StridedRows strided_rows(const Tensor& matrix);

}  // namespace bstriplet
