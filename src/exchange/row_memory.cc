#include "exchange/row_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace tokenyard::exchange_internal {
namespace {

// Below this a mapping of its own costs more than it saves.
constexpr std::int64_t kMapBytes = 1 << 20;
constexpr std::align_val_t kAlignment{64};

}  // namespace

RowMemory allocate_rows(std::int64_t bytes) {
  const auto size = static_cast<std::size_t>(std::max<std::int64_t>(bytes, 64));
  if (bytes < kMapBytes) {
    return {{static_cast<std::byte*>(::operator new(size, kAlignment)), [](std::byte* data) { ::operator delete(data, kAlignment); }},
            bytes};
  }
  void* const data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  madvise(data, size, MADV_HUGEPAGE);  // an offer: fine when it is refused
  return {{static_cast<std::byte*>(data), [size](std::byte* mapped) { munmap(mapped, size); }}, bytes};
}

}  // namespace tokenyard::exchange_internal
