#include "tokenyard/error.h"

#include <fmt/core.h>

#include "core/name_table.h"

namespace tokenyard {
namespace {

constexpr NamedValue<FailureKind> kFailureKinds[] = {
    {FailureKind::timeout, "timeout"},   {FailureKind::peer_lost, "peer_lost"}, {FailureKind::aborted, "aborted"},
    {FailureKind::mismatch, "mismatch"}, {FailureKind::overflow, "overflow"},   {FailureKind::system, "system"},
};

constexpr NamedValue<Phase> kPhases[] = {
    {Phase::none, "none"},
    {Phase::rendezvous, "rendezvous"},
    {Phase::split, "split"},
    {Phase::gather, "gather"},
    {Phase::barrier, "barrier"},
    {Phase::recover, "recover"},
    {Phase::memory, "memory"},
    {Phase::dispatch_credit, "dispatch_credit"},
    {Phase::dispatch_counts, "dispatch_counts"},
    {Phase::dispatch_rows, "dispatch_rows"},
    {Phase::combine_weights, "combine_weights"},
    {Phase::combine_credit, "combine_credit"},
    {Phase::combine_rows, "combine_rows"},
    {Phase::combine_read, "combine_read"},
    {Phase::collective, "collective"},
};

}  // namespace

std::string_view name(FailureKind kind) { return name_in(kFailureKinds, kind); }
std::string_view name(Phase phase) { return name_in(kPhases, phase); }

std::string Failure::message() const {
  const bool waited = kind == FailureKind::timeout;
  std::string text;
  if (rank >= 0) text += fmt::format("rank {}: ", rank);
  text += name(kind);
  if (phase != Phase::none) text += fmt::format("{} {}", waited ? " after waiting in" : " in", name(phase));
  if (epoch > 0) text += fmt::format(" of call {}", epoch);
  if (peer >= 0) text += fmt::format("{} rank {}", waited ? " for" : ", peer", peer);
  if (expected != seen) text += fmt::format(": expected {}, seen {}", expected, seen);
  if (!detail.empty()) text += "; " + detail;
  // One line, whatever a peer or the operating system wrote into the detail.
  for (char& c : text) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  return text;
}

}  // namespace tokenyard
