// Built instead of cuda_peer.cc without TY_CUDA.

#include "memory/cuda_peer.h"
#include "memory/offer.h"

namespace tokenyard {

Expected<std::unique_ptr<SymmetricMemory>> CudaPeerMemory::create(const World& world, std::size_t bytes, int, Deadline deadline,
                                                                  CudaSharing) {
  // The other ranks may have it: they are to learn that this one does not.
  const Offer mine{.bytes = bytes,
                   .transport = Transport::cuda_peer,
                   .error = "this build has no memory of GPUs; configure with -DTY_CUDA=ON (needs the CUDA toolkit, 12.4 or newer)"};
  auto offers = agree_on_offers(world, mine, deadline);
  return unexpected(std::move(offers.error()));
}

}  // namespace tokenyard
