// The operators' schemas, declared once for every device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bstriplet, library) {
  library.def(
      "batch_similarity(Tensor embeddings, Tensor? ref_emb, Tensor labels, Tensor? ref_labels, "
      "Tensor? upstream, float margin, float sigma, bool signed, float eps, bool mean, "
      "bool gradient) -> (Tensor loss, Tensor means, Tensor grad, Tensor grad_ref)");
  library.def(
      "moment_means(Tensor embeddings, Tensor labels, float eps, int smallest_moment) -> (Tensor "
      "positive, Tensor negative, Tensor table, Tensor small, Tensor slots, Tensor order, Tensor "
      "inverse)");
  library.def(
      "moment_gradient(Tensor a, Tensor embeddings, Tensor table, Tensor small, Tensor slots, "
      "Tensor order, Tensor inverse, float sigma) -> Tensor");
  library.def("instruction_set() -> str");
}
