#pragma once
// Whom a rank blames whose wait has timed out.

namespace tokenyard::protocol {

// Follows who waits for whom from `peer` on, as ranks told before their own deadlines ended. waiting_on(rank): the rank it waits for, < 0
// for none. In a circle through `rank` nobody is to blame more than `peer`, for whom it waits itself.
template <class WaitingOn>
int end_of_chain(int rank, int ranks, int peer, WaitingOn&& waiting_on) {
  int at = peer;
  for (int step = 0; step < ranks; ++step) {
    const int next = waiting_on(at);
    if (next < 0 || next == at) return at;
    if (next == rank) return peer;
    at = next;
  }
  return peer;
}

}  // namespace tokenyard::protocol
