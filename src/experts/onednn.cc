// oneDNN's sgemm chooses and caches its kernels by shape, and takes rows of any stride.

#include <dnnl.h>

#include <algorithm>

#include "core/usage.h"
#include "experts/sgemm.h"

namespace tokenyard::experts_internal {

void multiply(const Product& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    for (std::int64_t row = 0; row < p.m && !p.accumulate; ++row) std::fill_n(p.c + row * p.c_stride, p.n, 0.0F);
    return;
  }
  const dnnl_status_t status = dnnl_sgemm(p.a.transposed ? 'T' : 'N', p.b.transposed ? 'T' : 'N', p.m, p.n, p.k, 1.0F, p.a.data, p.a.stride,
                                          p.b.data, p.b.stride, p.accumulate ? 1.0F : 0.0F, p.c, p.c_stride);
  TY_ASSERT(status == dnnl_success);
}

}  // namespace tokenyard::experts_internal
