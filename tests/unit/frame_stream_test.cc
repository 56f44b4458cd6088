#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "world/frame.h"

namespace tokenyard::world_internal {
namespace {

using Bytes = std::vector<std::byte>;

Bytes bytes_of(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

// One of each, with values that differ from the defaults everywhere.
std::vector<Message> one_of_each() {
  Failure failure{
      .kind = FailureKind::timeout, .phase = Phase::barrier, .rank = 3, .peer = 70000, .expected = 1LL << 40, .seen = -2, .detail = "why"};
  const Call call{.key = {7, 1ULL << 50}, .phase = Phase::memory, .members = {4, 0, 65535}};
  return {
      Hello{"secret", 8, 5},
      Welcome{},
      Reject{"no"},
      GatherRequest{call, 12345, bytes_of("mine")},
      GatherPart{{1, 2}, bytes_of("part")},
      GatherDone{{3, 4}, 99},
      GatherFailed{{5, 6}, failure},
      RankLost{6},
      GiveUp{"tired"},
      Bye{},
  };
}

// Equal contents: equal bytes.
void expect_same(const Message& a, const Message& b) { EXPECT_EQ(encode(0, a), encode(0, b)) << "type " << a.index(); }

void put_u32(Bytes& frame, std::size_t at, std::uint32_t value) {
  for (int i = 0; i < 4; ++i) frame[at + i] = static_cast<std::byte>(value >> (8 * i));
}
constexpr std::size_t kSequenceAt = 8;
constexpr std::size_t kLengthAt = 12;

TEST(FrameStream, EveryMessageSurvivesTheWire) {
  const std::vector<Message> messages = one_of_each();
  ASSERT_EQ(messages.size(), std::variant_size_v<Message>);
  FrameReader reader(kMaxFrameBytes);
  for (std::size_t i = 0; i < messages.size(); ++i) {
    ASSERT_EQ(messages[i].index(), i);
    reader.feed(encode(static_cast<std::uint32_t>(i), messages[i]));
    auto message = reader.next();
    ASSERT_TRUE(message.has_value()) << message.error();
    ASSERT_TRUE(message->has_value());
    expect_same(**message, messages[i]);
  }
  EXPECT_FALSE(reader.next()->has_value());
}

TEST(FrameStream, FieldsKeepTheirValues) {
  FrameReader reader(kMaxFrameBytes);
  const std::vector<Message> messages = one_of_each();
  std::uint32_t sequence = 0;
  for (const Message& message : messages) reader.feed(encode(sequence++, message));
  std::vector<Message> read;
  for (std::size_t i = 0; i < messages.size(); ++i) read.push_back(std::move(**reader.next()));
  EXPECT_EQ(std::get<Hello>(read[0]).token, "secret");
  EXPECT_EQ(std::get<Hello>(read[0]).size, 8);
  EXPECT_EQ(std::get<Hello>(read[0]).rank, 5);
  EXPECT_EQ(std::get<Reject>(read[2]).reason, "no");
  const auto& request = std::get<GatherRequest>(read[3]);
  EXPECT_EQ(request.call.key, (GatherKey{7, 1ULL << 50}));
  EXPECT_EQ(request.call.phase, Phase::memory);
  EXPECT_EQ(request.call.members, (std::vector<int>{4, 0, 65535}));
  EXPECT_EQ(request.timeout_ms, 12345);
  EXPECT_EQ(request.bytes, bytes_of("mine"));
  EXPECT_EQ(std::get<GatherPart>(read[4]).bytes, bytes_of("part"));
  EXPECT_EQ(std::get<GatherDone>(read[5]).serial, 99U);
  const Failure& failure = std::get<GatherFailed>(read[6]).failure;
  EXPECT_EQ(failure.kind, FailureKind::timeout);
  EXPECT_EQ(failure.phase, Phase::barrier);
  EXPECT_EQ(failure.rank, 3);
  EXPECT_EQ(failure.peer, 70000);
  EXPECT_EQ(failure.expected, 1LL << 40);
  EXPECT_EQ(failure.seen, -2);
  EXPECT_EQ(failure.detail, "why");
  EXPECT_EQ(std::get<RankLost>(read[7]).rank, 6);
  EXPECT_EQ(std::get<GiveUp>(read[8]).reason, "tired");
}

TEST(FrameStream, APartStartIsTheFrameWithoutItsBytes) {
  const Bytes part = bytes_of("0123456789");
  Bytes frame = encode_part_start(17, {8, 9}, part.size());
  frame.insert(frame.end(), part.begin(), part.end());
  EXPECT_EQ(frame, encode(17, GatherPart{{8, 9}, part}));
}

TEST(FrameStream, ATruncatedFrameIsNoMessageYet) {
  for (const Message& message : one_of_each()) {
    const Bytes frame = encode(0, message);
    for (std::size_t cut = 0; cut < frame.size(); ++cut) {
      FrameReader reader(kMaxFrameBytes);
      reader.feed(std::span(frame).first(cut));
      const auto nothing = reader.next();
      ASSERT_TRUE(nothing.has_value()) << "type " << message.index() << " cut at " << cut << ": " << nothing.error();
      ASSERT_FALSE(nothing->has_value()) << "type " << message.index() << " cut at " << cut;
      reader.feed(std::span(frame).subspan(cut));
      const auto whole = reader.next();
      ASSERT_TRUE(whole.has_value() && whole->has_value());
      expect_same(**whole, message);
    }
  }
}

TEST(FrameStream, ABodyShorterThanItsTypeIsRefused) {
  for (const Message& message : one_of_each()) {
    // These end in bytes of any number; a shorter one is another valid message.
    const bool open_ended = std::holds_alternative<GatherRequest>(message) || std::holds_alternative<GatherPart>(message);
    const Bytes frame = encode(0, message);
    for (std::size_t body = 0; kHeaderBytes + body < frame.size(); ++body) {
      Bytes cut(frame.begin(), frame.begin() + static_cast<std::ptrdiff_t>(kHeaderBytes + body));
      put_u32(cut, kLengthAt, static_cast<std::uint32_t>(body));
      FrameReader reader(kMaxFrameBytes);
      reader.feed(cut);
      const auto result = reader.next();
      if (open_ended && result) continue;
      ASSERT_FALSE(result.has_value()) << "type " << message.index() << " with a body of " << body;
    }
  }
}

TEST(FrameStream, ABodyLongerThanItsTypeIsRefused) {
  for (const Message& message : one_of_each()) {
    if (std::holds_alternative<GatherRequest>(message) || std::holds_alternative<GatherPart>(message)) continue;
    Bytes frame = encode(0, message);
    frame.push_back(std::byte{0});
    put_u32(frame, kLengthAt, static_cast<std::uint32_t>(frame.size() - kHeaderBytes));
    FrameReader reader(kMaxFrameBytes);
    reader.feed(frame);
    EXPECT_FALSE(reader.next().has_value()) << "type " << message.index();
  }
}

TEST(FrameStream, AWrongHeaderIsRefusedForEver) {
  const Bytes good = encode(0, Bye{});
  for (std::size_t at = 0; at < kLengthAt; ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      Bytes bad = good;
      bad[at] ^= static_cast<std::byte>(1 << bit);
      // Another type with an empty body is another valid message.
      if (at == 6 && static_cast<std::size_t>(bad[at]) == Message(Welcome{}).index()) continue;
      FrameReader reader(kMaxFrameBytes);
      reader.feed(bad);
      const auto refused = reader.next();
      ASSERT_FALSE(refused.has_value()) << "byte " << at << " bit " << bit;
      reader.feed(good);
      const auto still = reader.next();
      ASSERT_FALSE(still.has_value());
      EXPECT_EQ(still.error(), refused.error());
    }
  }
}

TEST(FrameStream, SequenceNumbersCountUp) {
  FrameReader reader(kMaxFrameBytes);
  reader.feed(encode(0, Bye{}));
  EXPECT_TRUE(reader.next().has_value());
  reader.feed(encode(0, Bye{}));  // the same again
  const auto refused = reader.next();
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error(), "message number 0, expected 1");
  FrameReader skipping(kMaxFrameBytes);
  skipping.feed(encode(1, Bye{}));
  EXPECT_FALSE(skipping.next().has_value());
}

TEST(FrameStream, AnOversizedFrameIsRefusedBeforeItArrives) {
  Bytes frame = encode(0, Hello{std::string(100, 'x'), 1, 0});
  FrameReader reader(kMaxFrameBytes);
  put_u32(frame, kLengthAt, static_cast<std::uint32_t>(kMaxFrameBytes + 1));
  reader.feed(std::span(frame).first(kHeaderBytes));
  EXPECT_FALSE(reader.next().has_value());
  FrameReader strict(50);
  strict.feed(encode(0, Hello{std::string(100, 'x'), 1, 0}));
  const auto refused = strict.next();
  ASSERT_FALSE(refused.has_value());
  EXPECT_NE(refused.error().find("allowed are 50"), std::string::npos) << refused.error();
}

TEST(FrameStream, TheLargestPartFits) {
  const Call call{.key = {1, 2}, .phase = Phase::gather, .members = std::vector<int>(kMaxWorldSize, 1)};
  FrameReader reader(kMaxFrameBytes);
  reader.feed(encode(0, GatherRequest{call, 1, Bytes(kMaxPartBytes)}));
  EXPECT_TRUE(reader.next().has_value());
  FrameReader full(kMaxFrameBytes);
  full.feed(encode(0, GatherRequest{{.key = {1, 2}, .phase = Phase::gather, .members = {0}}, 1, Bytes(kMaxPartBytes + 1)}));
  EXPECT_FALSE(full.next().has_value());
}

TEST(FrameStream, EnumerationsAndCountsAreChecked) {
  const auto refuses = [](const Message& message, std::size_t at, std::uint8_t value) {
    Bytes frame = encode(0, message);
    frame[kHeaderBytes + at] = static_cast<std::byte>(value);
    FrameReader reader(kMaxFrameBytes);
    reader.feed(frame);
    return !reader.next().has_value();
  };
  const GatherRequest request{{.key = {1, 2}, .phase = Phase::gather, .members = {0}}, 5, {}};
  constexpr std::size_t kPhaseAt = 16;
  EXPECT_FALSE(refuses(request, kPhaseAt, static_cast<std::uint8_t>(Phase::collective)));
  EXPECT_TRUE(refuses(request, kPhaseAt, static_cast<std::uint8_t>(Phase::collective) + 1));
  EXPECT_TRUE(refuses(request, kPhaseAt + 1 + 3, 0x80)) << "a negative timeout";
  EXPECT_TRUE(refuses(request, kPhaseAt + 1 + 4, 0)) << "no members";
  EXPECT_TRUE(refuses(request, kPhaseAt + 1 + 4 + 3, 0xff)) << "more members than bytes";
  EXPECT_TRUE(refuses(GatherFailed{{1, 2}, {}}, kPhaseAt, 200)) << "a failure of no kind";
}

TEST(FrameStream, AnySplitOfTheStreamGivesTheSameMessages) {
  Bytes stream;
  std::vector<Message> messages;
  std::uint32_t sequence = 0;
  for (int round = 0; round < 3; ++round) {
    for (const Message& message : one_of_each()) {
      const Bytes frame = encode(sequence++, message);
      stream.insert(stream.end(), frame.begin(), frame.end());
      messages.push_back(message);
    }
  }
  const auto seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 200; ++round) {
    FrameReader reader(kMaxFrameBytes);
    std::size_t read = 0;
    for (std::size_t at = 0; at < stream.size();) {
      const std::size_t count = std::min<std::size_t>(1 + random() % 60, stream.size() - at);
      reader.feed(std::span(stream).subspan(at, count));
      at += count;
      while (true) {
        const auto message = reader.next();
        ASSERT_TRUE(message.has_value()) << message.error();
        if (!message->has_value()) break;
        expect_same(**message, messages[read++]);
      }
    }
    ASSERT_EQ(read, messages.size());
  }
}

TEST(FrameStream, SecretsCompareByValue) {
  EXPECT_TRUE(equal_secrets("", ""));
  EXPECT_TRUE(equal_secrets("abc", "abc"));
  EXPECT_FALSE(equal_secrets("abc", "abd"));
  EXPECT_FALSE(equal_secrets("abc", "ab"));
  EXPECT_FALSE(equal_secrets("ab", "abc"));
  EXPECT_FALSE(equal_secrets("", "a"));
  EXPECT_FALSE(equal_secrets(std::string_view("a\0", 2), "a"));
}

}  // namespace
}  // namespace tokenyard::world_internal
