// The second-moment path in float.
#include "moments/impl.h"

namespace bstriplet {

template void means_by_moments(const Sorted&, double, const MomentState<float>&, float*, float*);
template void gradient_by_moments(const Sorted&, const MomentState<const float>&, const float*, double,
                                  float*);

}  // namespace bstriplet
