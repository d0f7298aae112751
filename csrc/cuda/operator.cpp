// batch_similarity on CUDA: checks and allocates, then launches the kernel of small_batch.cu.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/small_batch.h"
#include "operator.h"

namespace bstriplet {
namespace {

Results run(const Inputs& in, const Spec& spec) {
  const int64_t n = in.rows, d = in.depth;
  STD_TORCH_CHECK(n <= kMaxRows && !in.ref_emb, "on CUDA batch_similarity takes up to ", kMaxRows,
                  " rows and no ref_emb, got ", n, " rows");
  const int device = in.embeddings.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Tensor loss = empty_scalar(in.accumulation, in.embeddings);
  Tensor means = empty_matrix(2, n, in.accumulation, in.embeddings);
  Tensor nothing = empty_vector(0, in.accumulation, in.embeddings);
  Tensor grad = spec.gradient ? empty_matrix(n, d, in.accumulation, in.embeddings) : nothing;
  const SmallBatch batch{
      strided_rows(in.embeddings),
      static_cast<const int64_t*>(in.labels.const_data_ptr()),
      in.labels.stride(0),
      in.upstream ? in.upstream->const_data_ptr() : nullptr,
      in.upstream ? in.upstream->stride(0) : 0,
      spec,
      loss.mutable_data_ptr(),
      means.mutable_data_ptr(),
      grad.mutable_data_ptr(),
  };
  const char* const error = launch(batch, device, stream);
  STD_TORCH_CHECK(error == nullptr, "batch_similarity on CUDA, embeddings [", n, ", ", d,
                  "]: ", error);
  return {loss, means, grad, nothing};
}

}  // namespace
}  // namespace bstriplet

STABLE_TORCH_LIBRARY_IMPL(bstriplet, CUDA, library) {
  library.impl("batch_similarity", TORCH_BOX(&bstriplet::batch_similarity<&bstriplet::run>));
}
