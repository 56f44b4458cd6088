#pragma once
// How far the rows of a dispatch have come, where a receiver does not wait for all of them: a sender tells when it has stored
// the tokens of a group, a receiver takes the rows of each source in parts.

#include <cstdint>

#include "protocol/host_device.h"

namespace tokenyard::protocol {

constexpr int kMostGroups = 16;  // of the tokens of a rank

// Tokens of each group; the last one may have fewer. 0 without tokens.
constexpr TY_HOST_DEVICE std::int32_t group_size(std::int32_t tokens) { return tokens / kMostGroups + (tokens % kMostGroups != 0 ? 1 : 0); }
// Of group `group`, which is not empty.
constexpr TY_HOST_DEVICE std::int32_t tokens_of_group(std::int32_t tokens, std::int32_t group) {
  const std::int32_t size = group_size(tokens);
  const std::int32_t left = tokens - group * size;
  return left < size ? left : size;
}

// One of `count` parts of what lies in order.
struct Part {
  int index = 0;
  int count = 1;

  constexpr TY_HOST_DEVICE std::int32_t begin(std::int32_t rows) const {
    return static_cast<std::int32_t>(std::int64_t{rows} * index / count);
  }
  constexpr TY_HOST_DEVICE std::int32_t end(std::int32_t rows) const {
    return static_cast<std::int32_t>(std::int64_t{rows} * (index + 1) / count);
  }
};

}  // namespace tokenyard::protocol
