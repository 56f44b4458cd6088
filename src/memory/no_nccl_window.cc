// Built instead of nccl_window.cc without TY_NCCL.

#include "memory/nccl_window.h"
#include "memory/offer.h"

namespace tokenyard {

Expected<std::unique_ptr<SymmetricMemory>> create_nccl_window(const World& world, std::size_t bytes, const NcclWindowOptions& options) {
  // The other ranks may have it: they are to learn that this one does not.
  const Offer mine{.bytes = bytes,
                   .transport = Transport::nccl_window,
                   .error = "this build has no windows of NCCL; configure with -DTY_CUDA=ON -DTY_NCCL=ON, or use transport cuda_peer"};
  auto offers = agree_on_offers(world, mine, Deadline::after_ms(options.timeout_ms));
  return unexpected(std::move(offers.error()));
}

}  // namespace tokenyard
