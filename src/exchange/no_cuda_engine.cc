// Instead of the CUDA engine, where it is not built.

#include "core/usage.h"
#include "exchange/exchange_engine.h"

namespace tokenyard::exchange_internal {

std::unique_ptr<ExchangeEngine> make_cuda_engine(const World& /*world*/, const ExchangeOptions& /*options*/) {
  usage_error("device = cuda: this build of tokenyard has no device code; configure it with -DTY_CUDA=ON, or use device = cpu");
}

}  // namespace tokenyard::exchange_internal
