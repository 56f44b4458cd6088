#pragma once
// What travels between a rank and a store in another process. Pure functions over bytes: no sockets, no clocks.
//
// A frame is a header {magic, version, type, sequence, length} and a body of `length` bytes, all little-endian. Each
// direction of a connection counts its frames from 0. A client says hello and is welcomed or rejected; after that its
// gathers are answered in any order by parts and a done, or by a failed.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tl/expected.hpp>
#include <variant>
#include <vector>

#include "world/store.h"

namespace tokenyard::world_internal {

inline constexpr std::uint32_t kMagic = 0x44594b54;  // "TKYD"
inline constexpr std::uint16_t kVersion = 1;
inline constexpr std::size_t kHeaderBytes = 16;
inline constexpr std::size_t kMaxFrameBytes = kMaxPartBytes + sizeof(std::int32_t) * kMaxWorldSize + 64;  // a part, and who it is for
inline constexpr std::size_t kMaxHelloBytes = 4096;                                                       // before a client is known

struct Hello {
  std::string token;
  std::int32_t size = 0;
  std::int32_t rank = 0;
};
struct Welcome {};
// The server closes the connection after it.
struct Reject {
  std::string reason;
};
struct GatherRequest {
  Call call;
  std::int32_t timeout_ms = 0;
  std::vector<std::byte> bytes;
};
// Parts of one gather come in the order of its members.
struct GatherPart {
  GatherKey key;
  std::vector<std::byte> bytes;
};
struct GatherDone {
  GatherKey key;
  std::uint64_t serial = 0;
};
struct GatherFailed {
  GatherKey key;
  Failure failure;  // without epoch
};
struct RankLost {
  std::int32_t rank = 0;
};
struct GiveUp {
  std::string reason;
};
struct Bye {};

using Message = std::variant<Hello, Welcome, Reject, GatherRequest, GatherPart, GatherDone, GatherFailed, RankLost, GiveUp, Bye>;

// A whole frame.
std::vector<std::byte> encode(std::uint32_t sequence, const Message& message);
// The frame of a GatherPart without its bytes, which follow it on the wire: the store sends one part to many ranks.
std::vector<std::byte> encode_part_start(std::uint32_t sequence, GatherKey key, std::size_t part_bytes);

// Turns a byte stream into messages. Refuses, for ever, a stream with a wrong magic, version or type, a frame out of
// sequence or larger than the limit, and a body that is not exactly what its type says.
class FrameReader {
 public:
  explicit FrameReader(std::size_t max_body_bytes) : max_body_bytes_(max_body_bytes) {}
  void set_max_body_bytes(std::size_t bytes) { max_body_bytes_ = bytes; }
  void feed(std::span<const std::byte> bytes);
  // The next message, nothing when more bytes are needed, or why the stream is refused.
  tl::expected<std::optional<Message>, std::string> next();

 private:
  tl::unexpected<std::string> refuse(std::string reason);

  std::size_t max_body_bytes_;
  std::uint32_t sequence_ = 0;
  std::vector<std::byte> buffer_;
  std::size_t consumed_ = 0;
  std::string refused_;
};

// In a time that does not tell where they differ.
bool equal_secrets(std::string_view a, std::string_view b);

}  // namespace tokenyard::world_internal
