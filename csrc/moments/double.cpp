// The second-moment path in double.
#include "moments/impl.h"

namespace bstriplet {

template void means_by_moments(const Sorted&, double, const MomentState<double>&, double*, double*);
template void gradient_by_moments(const Sorted&, const MomentState<const double>&, const double*, double,
                                  double*);

}  // namespace bstriplet
