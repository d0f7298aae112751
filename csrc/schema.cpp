// The schemas of the operators, declared once for all devices. The options of batch_similarity have
// defaults, because each argument of a call costs time.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bstriplet, library) {
  library.def(
      "batch_similarity(Tensor embeddings, Tensor labels, bool gradient=True, float margin=0.9, "
      "bool mean=True, bool signed=False, float sigma=1.0, float eps=1e-12, Tensor? ref_emb=None, "
      "Tensor? ref_labels=None, Tensor? upstream=None) "
      "-> (Tensor loss, Tensor means, Tensor grad, Tensor grad_ref)");
  library.def(
      "moment_means(Tensor embeddings, Tensor labels, float eps, int smallest_moment) -> (Tensor "
      "positive, Tensor negative, Tensor table, Tensor small, Tensor slots, Tensor order, Tensor "
      "inverse)");
  library.def(
      "moment_gradient(Tensor a, Tensor embeddings, Tensor table, Tensor small, Tensor slots, "
      "Tensor order, Tensor inverse, float sigma) -> Tensor");
  library.def("instruction_set() -> str");
}
