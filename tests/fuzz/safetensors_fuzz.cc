// Headers of safetensors files from hostile bytes: refused with a UsageError, or every tensor lies in the file and no two overlap.

#include <cstdint>
#include <cstdlib>
#include <span>

#include "tokenyard/error.h"
#include "weights/safetensors_header.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {  // NOLINT(readability-identifier-naming)
  const std::span<const std::byte> file = std::as_bytes(std::span(data, size));
  try {
    std::size_t total = 0;
    for (const tokenyard::FileTensor& tensor : tokenyard::weights_internal::parse_header("fuzz", file).tensors) {
      if (tensor.bytes.data() < file.data() || tensor.bytes.data() + tensor.bytes.size() > file.data() + file.size()) std::abort();
      total += tensor.bytes.size();
    }
    if (total > size) std::abort();
  } catch (const tokenyard::UsageError&) {  // the right answer to a fault; anything else ends the program
  }
  return 0;
}
