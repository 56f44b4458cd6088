#pragma once
// Flag words on the host. Acquire and release order everything else; the words themselves are plain integers so that
// kernels can share the layout.

#include <atomic>
#include <cstdint>

namespace tokenyard::protocol {

template <class Word>
Word load_acquire(const Word& word) {
  return std::atomic_ref<Word>(const_cast<Word&>(word)).load(std::memory_order_acquire);
}

template <class Word>
void store_release(Word& word, Word value) {
  std::atomic_ref<Word>(word).store(value, std::memory_order_release);
}

}  // namespace tokenyard::protocol
