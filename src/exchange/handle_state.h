#pragma once
// Everything a dispatch learned: the source's plan, the receiver's rows, and the metadata that Received shows.

#include <cstdint>
#include <vector>

#include "exchange/handle_facts.h"
#include "exchange/send_plan.h"

namespace tokenyard::exchange_internal {

// The rows of a rank in the order (source rank, token), index i.
struct ReceivedRows {
  std::vector<std::int64_t> source_begin;  // [R+1]
  std::vector<std::int32_t> source_token;  // [N]
  std::vector<std::int32_t> partial_slot;  // [N]; -1: this rank's own token
  std::vector<std::int32_t> local_ids;     // [N,K]
  std::vector<float> weights;              // [N,K]
  std::int64_t size() const { return static_cast<std::int64_t>(source_token.size()); }
};

// The tensors of Received, in the shapes of the layout. Those a layout does not have are empty.
struct Metadata {
  std::vector<std::int64_t> rows_shape;  // of Received::rows without H
  std::int64_t num_rows = 0;             // what Received::num_rows says
  std::vector<std::int32_t> local_ids;
  std::vector<float> row_weights;
  std::vector<std::int32_t> source_rank;
  std::vector<std::int32_t> source_token;
  std::vector<std::int32_t> source_k;
  std::vector<std::int32_t> expert_counts;
  std::vector<std::int32_t> expert_offsets;
  std::vector<std::int32_t> expert_rows;
  std::vector<std::int32_t> rank_counts;
  std::vector<std::int32_t> sent_counts;
  std::vector<std::int32_t> ranges;
  std::vector<std::uint8_t> present;
  std::int64_t total_rows() const {
    std::int64_t rows = 1;
    for (std::int64_t size : rows_shape) rows *= size;
    return rows;
  }
};

// Of the CPU engine.
struct HandleState final : HandleFacts {
  SendPlan sent;
  ReceivedRows received;
  std::vector<std::int32_t> expert_row;    // expert layouts [N,K]: the output row of (i, k), -1 where there is none or it was dropped
  std::vector<std::int64_t> dropped_rows;  // [L]
  Metadata metadata;

  int top_k() const override { return sent.top_k; }
  std::int64_t num_tokens() const override { return sent.num_tokens; }
  std::int64_t num_token_rows() const override { return received.size(); }
  std::int64_t num_rows() const override { return metadata.num_rows; }
  const std::vector<std::int64_t>& rows_shape() const override { return metadata.rows_shape; }
  std::span<const std::int64_t> dropped() const override { return dropped_rows; }
  ReceivedViews views() const override;
};

}  // namespace tokenyard::exchange_internal
