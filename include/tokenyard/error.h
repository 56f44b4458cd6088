#pragma once
// The three kinds of failure: the caller's fault (UsageError), an operating failure (TransportError), and a broken
// invariant of the library itself (std::logic_error from TY_ASSERT, src/core/assert.h).

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace tokenyard {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The caller passed something that can never work. The text carries the value, the expectation and the remedy.
class UsageError : public Error {
 public:
  using Error::Error;
};

// What went wrong while operating.
enum class FailureKind : std::uint8_t {
  timeout,    // a wait outlived its deadline
  peer_lost,  // a rank's process ended, or its connection did
  aborted,    // a peer rejected the same call; `detail` carries its reason
  mismatch,   // ranks made different calls, or passed different options; `detail` names both
  overflow,   // more rows than the receive buffer, or an expert's capacity, holds
  system,     // the operating system refused something; `detail` carries errno's text
};
std::string_view name(FailureKind kind);

// Where a wait was, in the order in which an exchange goes through them.
enum class Phase : std::uint8_t {
  none,
  rendezvous,
  split,
  gather,
  barrier,
  recover,  // survivors of a lost rank meeting again
  memory,
  dispatch_credit,  // waiting for a destination to grant a receive buffer
  dispatch_counts,  // waiting for the row counts of every source
  dispatch_rows,    // waiting for rows to arrive
  combine_weights,  // waiting for the source's weights (Weighting::at_source)
  combine_credit,   // waiting for the owner's staging slots to be free
  combine_rows,     // waiting for partial sums
  combine_read,     // waiting for peers to have read expert rows
  collective,
};
std::string_view name(Phase phase);

// The record of one operating failure. Ranks are those of the world in which the wait happened; -1 where none applies.
struct Failure {
  FailureKind kind = FailureKind::system;
  Phase phase = Phase::none;
  int rank = -1;            // who reports
  int peer = -1;            // who is blamed: the end of the chain of ranks that wait for each other
  std::uint64_t epoch = 0;  // the call number on this exchange
  std::int64_t expected = 0;
  std::int64_t seen = 0;
  std::string detail{};  // free text: reason, remedy
  // One line with every field that applies.
  std::string message() const;
};

class TransportError : public Error {
 public:
  explicit TransportError(Failure failure) : Error(failure.message()), failure_(std::move(failure)) {}
  const Failure& failure() const { return failure_; }

 private:
  Failure failure_;
};

}  // namespace tokenyard
