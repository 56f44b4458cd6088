#pragma once
// Page-aligned memory for rows that the exchange hands out: left untouched until used, large pages where allowed.

#include <cstddef>
#include <cstdint>
#include <memory>

namespace tokenyard::exchange_internal {

struct RowMemory {
  std::shared_ptr<std::byte> data;
  std::int64_t bytes = 0;
};

// Contents are unspecified. std::bad_alloc when the machine has not that much.
RowMemory allocate_rows(std::int64_t bytes);

}  // namespace tokenyard::exchange_internal
