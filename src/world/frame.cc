#include "world/frame.h"

#include <fmt/format.h>

#include <algorithm>
#include <type_traits>

#include "world/bytes.h"

namespace tokenyard::world_internal {
namespace {

void put(ByteWriter& out, const GatherKey& key) {
  out.put(key.generation);
  out.put(key.sequence);
}
GatherKey get_key(ByteReader& in) {
  const auto generation = in.get<std::uint64_t>();
  return {generation, in.get<std::uint64_t>()};
}

void put_body(ByteWriter& out, const Hello& hello) {
  out.put(hello.size);
  out.put(hello.rank);
  out.put_text(hello.token);
}
void put_body(ByteWriter&, const Welcome&) {}
void put_body(ByteWriter& out, const Reject& reject) { out.put_text(reject.reason); }
void put_body(ByteWriter& out, const GatherRequest& request) {
  put(out, request.call.key);
  out.put(static_cast<std::uint8_t>(request.call.phase));
  out.put(request.timeout_ms);
  out.put(static_cast<std::uint32_t>(request.call.members.size()));
  for (const int member : request.call.members) out.put(static_cast<std::int32_t>(member));
  out.put_bytes(request.bytes);
}
void put_body(ByteWriter& out, const GatherPart& part) {
  put(out, part.key);
  out.put_bytes(part.bytes);
}
void put_body(ByteWriter& out, const GatherDone& done) {
  put(out, done.key);
  out.put(done.serial);
}
void put_body(ByteWriter& out, const GatherFailed& failed) {
  put(out, failed.key);
  out.put(static_cast<std::uint8_t>(failed.failure.kind));
  out.put(static_cast<std::uint8_t>(failed.failure.phase));
  out.put(static_cast<std::int32_t>(failed.failure.rank));
  out.put(static_cast<std::int32_t>(failed.failure.peer));
  out.put(failed.failure.expected);
  out.put(failed.failure.seen);
  out.put_text(failed.failure.detail);
}
void put_body(ByteWriter& out, const RankLost& lost) { out.put(lost.rank); }
void put_body(ByteWriter& out, const GiveUp& give_up) { out.put_text(give_up.reason); }
void put_body(ByteWriter&, const Bye&) {}

// Enumerations are range-checked: a value outside would be undefined behaviour further on.
template <class Enum>
Enum get_enum(ByteReader& in, Enum last, bool& ok) {
  const auto value = in.get<std::uint8_t>();
  if (value > static_cast<std::uint8_t>(last)) ok = false;
  return ok ? static_cast<Enum>(value) : Enum{};
}

void get_body(ByteReader& in, Hello& hello, bool&) {
  hello.size = in.get<std::int32_t>();
  hello.rank = in.get<std::int32_t>();
  hello.token = in.get_text();
}
void get_body(ByteReader&, Welcome&, bool&) {}
void get_body(ByteReader& in, Reject& reject, bool&) { reject.reason = in.get_text(); }
void get_body(ByteReader& in, GatherRequest& request, bool& ok) {
  request.call.key = get_key(in);
  request.call.phase = get_enum(in, Phase::collective, ok);
  request.timeout_ms = in.get<std::int32_t>();
  const auto members = in.get<std::uint32_t>();
  if (members < 1 || members > kMaxWorldSize || request.timeout_ms < 0) ok = false;
  for (std::uint32_t i = 0; ok && in.ok() && i < members; ++i) request.call.members.push_back(in.get<std::int32_t>());
  const auto bytes = in.rest();
  if (bytes.size() > kMaxPartBytes) ok = false;
  request.bytes.assign(bytes.begin(), bytes.end());
}
void get_body(ByteReader& in, GatherPart& part, bool&) {
  part.key = get_key(in);
  const auto bytes = in.rest();
  part.bytes.assign(bytes.begin(), bytes.end());
}
void get_body(ByteReader& in, GatherDone& done, bool&) {
  done.key = get_key(in);
  done.serial = in.get<std::uint64_t>();
}
void get_body(ByteReader& in, GatherFailed& failed, bool& ok) {
  failed.key = get_key(in);
  failed.failure.kind = get_enum(in, FailureKind::system, ok);
  failed.failure.phase = get_enum(in, Phase::collective, ok);
  failed.failure.rank = in.get<std::int32_t>();
  failed.failure.peer = in.get<std::int32_t>();
  failed.failure.expected = in.get<std::int64_t>();
  failed.failure.seen = in.get<std::int64_t>();
  failed.failure.detail = in.get_text();
}
void get_body(ByteReader& in, RankLost& lost, bool&) { lost.rank = in.get<std::int32_t>(); }
void get_body(ByteReader& in, GiveUp& give_up, bool&) { give_up.reason = in.get_text(); }
void get_body(ByteReader&, Bye&, bool&) {}

// The message of alternative `type` of the variant.
template <std::size_t kType = 0>
std::optional<Message> decode_body(std::size_t type, std::span<const std::byte> body) {
  if constexpr (kType == std::variant_size_v<Message>) {
    return std::nullopt;
  } else {
    if (type != kType) return decode_body<kType + 1>(type, body);
    ByteReader in(body);
    std::variant_alternative_t<kType, Message> message;
    bool ok = true;
    get_body(in, message, ok);
    if (!ok || !in.finished()) return std::nullopt;
    return message;
  }
}

void put_header(ByteWriter& out, std::size_t type, std::uint32_t sequence, std::size_t length) {
  out.put(kMagic);
  out.put(kVersion);
  out.put(static_cast<std::uint16_t>(type));
  out.put(sequence);
  out.put(static_cast<std::uint32_t>(length));
}

}  // namespace

std::vector<std::byte> encode(std::uint32_t sequence, const Message& message) {
  ByteWriter body;
  std::visit([&](const auto& alternative) { put_body(body, alternative); }, message);
  const std::vector<std::byte> bytes = body.take();
  ByteWriter out;
  put_header(out, message.index(), sequence, bytes.size());
  out.put_bytes(bytes);
  return out.take();
}

std::vector<std::byte> encode_part_start(std::uint32_t sequence, GatherKey key, std::size_t part_bytes) {
  constexpr std::size_t kKeyBytes = 16;
  ByteWriter out;
  put_header(out, Message(GatherPart{}).index(), sequence, kKeyBytes + part_bytes);
  put(out, key);
  return out.take();
}

void FrameReader::feed(std::span<const std::byte> bytes) {
  if (!refused_.empty()) return;
  buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(consumed_));
  consumed_ = 0;
  buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
}

tl::unexpected<std::string> FrameReader::refuse(std::string reason) {
  refused_ = std::move(reason);
  buffer_.clear();
  consumed_ = 0;
  return tl::unexpected(refused_);
}

tl::expected<std::optional<Message>, std::string> FrameReader::next() {
  if (!refused_.empty()) return tl::unexpected(refused_);
  const std::span<const std::byte> rest = std::span(buffer_).subspan(consumed_);
  if (rest.size() < kHeaderBytes) return std::nullopt;
  ByteReader header(rest);
  const auto magic = header.get<std::uint32_t>();
  const auto version = header.get<std::uint16_t>();
  const auto type = header.get<std::uint16_t>();
  const auto sequence = header.get<std::uint32_t>();
  const auto length = header.get<std::uint32_t>();
  if (magic != kMagic) return refuse(fmt::format("not a Tokenyard connection: magic {:#010x}, expected {:#010x}", magic, kMagic));
  if (version != kVersion) return refuse(fmt::format("protocol version {}, expected {}: do all ranks run one release?", version, kVersion));
  if (sequence != sequence_) return refuse(fmt::format("message number {}, expected {}", sequence, sequence_));
  if (length > max_body_bytes_) return refuse(fmt::format("a message of {} bytes, allowed are {}", length, max_body_bytes_));
  if (rest.size() - kHeaderBytes < length) return std::nullopt;
  std::optional<Message> message = decode_body(type, rest.subspan(kHeaderBytes, length));
  if (!message) return refuse(fmt::format("a malformed message of type {} and {} bytes", type, length));
  consumed_ += kHeaderBytes + length;
  ++sequence_;
  return message;
}

bool equal_secrets(std::string_view a, std::string_view b) {
  const std::size_t length = std::max(a.size(), b.size());
  volatile unsigned char difference = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < length; ++i) {
    const auto left = static_cast<unsigned char>(i < a.size() ? a[i] : 0);
    const auto right = static_cast<unsigned char>(i < b.size() ? b[i] : 0);
    difference = difference | (left ^ right);
  }
  return difference == 0;
}

}  // namespace tokenyard::world_internal
