#pragma once
// The header of a safetensors file, from and to bytes.

#include <map>
#include <span>
#include <string>
#include <vector>

#include "tokenyard/safetensors.h"

namespace tokenyard::weights_internal {

struct Header {
  std::vector<FileTensor> tensors;  // ascending by name; their bytes point into the file
  std::map<std::string, std::string> metadata;
};

// The whole file's bytes. UsageError naming `path`, tensor and reason for whatever the format does not allow.
Header parse_header(const std::string& path, std::span<const std::byte> file);

// Where a writer puts its tensors: eight bytes, JSON padded to a multiple of eight, then the tensors in order.
struct WrittenHeader {
  std::string bytes;
  std::vector<std::int64_t> offsets;  // of each tensor, from the beginning of the file
  std::int64_t file_bytes = 0;
};
// UsageError for a repeated or empty name, a dtype that the format lacks, a negative shape, or sizes beyond 64 bits.
WrittenHeader format_header(const std::vector<TensorPlan>& tensors, const std::map<std::string, std::string>& metadata);

// Bytes of a dense tensor; nothing when a size is negative or the product overflows.
std::optional<std::int64_t> dense_bytes(const std::vector<std::int64_t>& shape, std::int64_t element_bits);

}  // namespace tokenyard::weights_internal
