#include "collective/ordered_sum.h"

#include "kernels/cpu/kernels.h"

namespace tokenyard::collective_internal {

void OrderedSum::add(const Call& call, std::int64_t begin, std::int64_t size) {
  const int ranks = static_cast<int>(terms_.size());
  const RowBytes<std::byte> out = call.receive_bytes(rank_);
  const RowBytes<const std::byte> own = call.send_bytes(rank_);
  const auto add_run = [&](std::byte* to, const std::byte* mine, std::int64_t at, std::int64_t run_size) {
    for (int peer = 0; peer < ranks; ++peer) run_terms_[peer] = peer == rank_ ? mine : terms_[peer] + at;
    cpu::reduce({.partials = run_terms_.data(),
                 .count = ranks,
                 .dtype = call.dtype(),
                 .out_dtype = call.dtype(),
                 .elements = run_size / size_of(call.dtype()),
                 .out = to});
  };
  out.for_each_run(begin, size, [&](std::byte* to, std::int64_t out_at, std::int64_t out_size) {
    own.for_each_run(begin + out_at, out_size,
                     [&](const std::byte* mine, std::int64_t at, std::int64_t run_size) { add_run(to + at, mine, out_at + at, run_size); });
  });
}

}  // namespace tokenyard::collective_internal
