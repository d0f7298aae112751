// The options of batch_similarity, the same on every device; needs no headers of torch.
#pragma once

namespace bstriplet {

struct Spec {
  double margin;       // m of Eq. 3
  double sigma;        // the sign of Eq. 3's second mean
  double squared_eps;  // |f_i|^2 up to which row i is a zero row
  double scale;        // L = scale sum max(0, h_i): 1 / N or 1; without upstream also dL/dl_i
  bool is_signed;      // phi(s) = s|s| instead of s^2
  bool gradient;       // whether the gradients are wanted
};

}  // namespace bstriplet
