#pragma once
// Little-endian fields in byte strings, for messages between processes that may not trust each other.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace tokenyard::world_internal {

class ByteWriter {
 public:
  template <class Integer>
  void put(Integer value) {
    static_assert(std::is_integral_v<Integer>);
    const auto bits = static_cast<std::make_unsigned_t<Integer>>(value);
    for (std::size_t i = 0; i < sizeof bits; ++i) bytes_.push_back(static_cast<std::byte>(bits >> (8 * i) & 0xff));
  }
  void put_bytes(std::span<const std::byte> bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }
  // With its length in front.
  void put_text(std::string_view text) {
    put(static_cast<std::uint32_t>(text.size()));
    put_bytes(std::as_bytes(std::span(text)));
  }
  std::vector<std::byte> take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

// Reading past the end gives zeros and clears ok().
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <class Integer>
  Integer get() {
    static_assert(std::is_integral_v<Integer>);
    std::make_unsigned_t<Integer> bits = 0;
    const std::span<const std::byte> field = get_bytes(sizeof bits);
    for (std::size_t i = 0; i < field.size(); ++i) bits |= static_cast<decltype(bits)>(static_cast<decltype(bits)>(field[i]) << (8 * i));
    return static_cast<Integer>(bits);
  }
  std::span<const std::byte> get_bytes(std::size_t count) {
    if (count > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const auto field = rest_.first(count);
    rest_ = rest_.subspan(count);
    return field;
  }
  std::string get_text() {
    const auto text = get_bytes(get<std::uint32_t>());
    return {reinterpret_cast<const char*>(text.data()), text.size()};
  }
  std::span<const std::byte> rest() { return get_bytes(rest_.size()); }
  bool ok() const { return ok_; }
  // Everything was there, and nothing more.
  bool finished() const { return ok_ && rest_.empty(); }

 private:
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace tokenyard::world_internal
