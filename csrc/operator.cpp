// The checks and allocations that operators share on all devices.
#include "operator.h"

#include <limits>
#include <utility>

namespace bstriplet {

void check_matrix(const char* name, const Tensor& matrix) {
  const ScalarType dtype = matrix.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, " must be float64, float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must have 2 dimensions, got ", matrix.dim());
  // Expanded tensors can have any size; this bound keeps every later sum of sizes in int64.
  for (const int64_t size : {matrix.size(0), matrix.size(1)}) {
    STD_TORCH_CHECK(size >= 1 && size < int64_t{1} << 40, name,
                    " must have from 1 to 2^40 rows and columns, got shape [", matrix.size(0), ", ",
                    matrix.size(1), "]");
  }
}

void check_vector(const char* name, const Tensor& vector, ScalarType dtype, int64_t n) {
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(vector.scalar_type()));
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == n, name, " must have shape [", n,
                  "], got ", vector.dim(), " dimensions of ", vector.numel(), " elements");
}

void check_device(const char* name, const Tensor& tensor, const Tensor& embeddings) {
  STD_TORCH_CHECK(tensor.device() == embeddings.device(), name,
                  " must be on the device of embeddings");
}

Inputs checked(Tensor embeddings, std::optional<Tensor> ref_emb, Tensor labels,
               std::optional<Tensor> ref_labels, std::optional<Tensor> upstream) {
  check_matrix("embeddings", embeddings);
  const int64_t rows = embeddings.size(0), depth = embeddings.size(1);
  int64_t columns = rows;
  ScalarType accumulation = embeddings.scalar_type();
  check_vector("labels", labels, ScalarType::Long, rows);
  check_device("labels", labels, embeddings);
  STD_TORCH_CHECK(ref_emb.has_value() == ref_labels.has_value(),
                  "ref_emb and ref_labels must be given both or neither");
  if (ref_emb) {
    check_matrix("ref_emb", *ref_emb);
    check_device("ref_emb", *ref_emb, embeddings);
    columns = ref_emb->size(0);
    STD_TORCH_CHECK(ref_emb->size(1) == depth, "ref_emb must have ", depth,
                    " columns as embeddings has, got ", ref_emb->size(1));
    check_vector("ref_labels", *ref_labels, ScalarType::Long, columns);
    check_device("ref_labels", *ref_labels, embeddings);
    if (ref_emb->scalar_type() == ScalarType::Double) accumulation = ScalarType::Double;
  }
  if (accumulation != ScalarType::Double) accumulation = ScalarType::Float;
  if (upstream) {
    check_vector("upstream", *upstream, accumulation, rows);
    check_device("upstream", *upstream, embeddings);
  }
  return {std::move(embeddings), std::move(ref_emb), std::move(labels), std::move(ref_labels),
          std::move(upstream),   accumulation,       rows,              columns,
          depth};
}

Tensor empty_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(sizes.size() <= 3, "at most 3 dimensions");
  int64_t strides[3];
  int64_t numbers = 1;
  for (size_t k = sizes.size(); k-- > 0;) {
    const int64_t size = sizes.begin()[k];
    strides[k] = numbers;
    if (size > 0) numbers = checked_product(size, numbers);
  }
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  const int32_t type = dtype == ScalarType::Long     ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Double ? aoti_torch_dtype_float64()
                                                     : aoti_torch_dtype_float32();
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, type,
                               device_type, device_index, &made);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "cannot allocate memory for ", numbers, " numbers");
  return Tensor(made);
}

Tensor empty_scalar(ScalarType dtype, const Tensor& like) { return empty_tensor({}, dtype, like); }

Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& like) {
  return empty_tensor({n}, dtype, like);
}

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like) {
  return empty_tensor({rows, columns}, dtype, like);
}

StridedRows strided_rows(const Tensor& matrix) {
  const ScalarType dtype = matrix.scalar_type();
  const Element element = dtype == ScalarType::Double  ? Element::float64
                          : dtype == ScalarType::Float ? Element::float32
                          : dtype == ScalarType::Half  ? Element::float16
                                                       : Element::bfloat16;
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  // The stride of a dimension of one element has no meaning, and may be out of range.
  return {matrix.const_data_ptr(),
          element,
          rows,
          columns,
          rows > 1 ? matrix.stride(0) : 0,
          columns > 1 ? matrix.stride(1) : 1};
}

int64_t checked_product(int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows <= std::numeric_limits<int64_t>::max() / 64 / columns, "a matrix of ", rows,
                  " x ", columns, " numbers is beyond what can be addressed");
  return rows * columns;
}

}  // namespace bstriplet
