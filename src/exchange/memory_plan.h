#pragma once
// From options to sizes: defaults filled in, every limit checked, every product checked for overflow.

#include "exchange/send_plan.h"
#include "protocol/arena.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

// UsageError with value, limit and remedy.
ExchangeOptions checked_options(const ExchangeOptions& options, int ranks);
protocol::ArenaShape shape_of(const ExchangeOptions& checked, int ranks);
// Rows of the output of expert_major with Sizing::capacity, at the largest alignment.
std::int64_t expert_major_rows(const ExchangeOptions& checked);

}  // namespace tokenyard::exchange_internal
