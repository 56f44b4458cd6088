#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "world/server_protocol.h"

namespace tokenyard::world_internal {
namespace {

using Bytes = std::vector<std::byte>;
using Time = ServerProtocol::Time;

// A client in bytes: what it sends is fed to the server, what the server has for it is decoded.
class Client {
 public:
  Client(ServerProtocol& server, int id, Time now = Deadline::Clock::now())
      : server_(server), id_(id), connection_(&server.open(id, "a test", now)) {}

  void say(const Message& message) { say_bytes(encode(sequence_++, message)); }
  void say_bytes(const Bytes& bytes) { server_.receive(id_, bytes); }
  void skip_a_number() { ++sequence_; }
  void hang_up() { server_.close(id_, "its connection ended"); }
  bool closing() const { return connection_->closing; }

  std::vector<Message> heard() {
    while (!connection_->outgoing.empty()) {
      Chunk& chunk = connection_->outgoing.front();
      reader_.feed(chunk.rest_of_head());
      reader_.feed(chunk.rest_of_tail());
      connection_->outgoing.pop_front();
    }
    std::vector<Message> messages;
    while (true) {
      auto message = reader_.next();
      EXPECT_TRUE(message.has_value()) << message.error();
      if (!message || !*message) return messages;
      messages.push_back(std::move(**message));
    }
  }
  // The one thing that was said, which is a T.
  template <class T>
  T only() {
    std::vector<Message> messages = heard();
    EXPECT_EQ(messages.size(), 1U);
    if (messages.size() != 1 || !std::holds_alternative<T>(messages[0])) {
      ADD_FAILURE() << "expected one message of another type";
      return {};
    }
    return std::get<T>(messages[0]);
  }

 private:
  ServerProtocol& server_;
  int id_;
  ServerProtocol::Connection* connection_;
  std::uint32_t sequence_ = 0;
  FrameReader reader_{kMaxFrameBytes};
};

constexpr const char* kToken = "open sesame";

GatherRequest request_of(std::vector<int> members, std::uint64_t sequence = 0) {
  return {{.key = {kRootGeneration, sequence}, .phase = Phase::gather, .members = std::move(members)}, 60'000, Bytes(3, std::byte{42})};
}

// Two ranks that joined, of three.
class StoreServer : public testing::Test {
 protected:
  void SetUp() override {
    for (int rank = 0; rank < 2; ++rank) {
      ranks_.emplace_back(server_, rank);
      ranks_.back().say(Hello{kToken, 3, rank});
      ranks_.back().only<Welcome>();
    }
  }
  // The bystanders' next gather succeeds.
  void expect_undisturbed() {
    for (Client& rank : ranks_) rank.say(request_of({0, 1}, sequence_));
    ++sequence_;
    for (Client& rank : ranks_) {
      const std::vector<Message> messages = rank.heard();
      ASSERT_EQ(messages.size(), 3U);
      EXPECT_EQ(std::get<GatherPart>(messages[0]).bytes, Bytes(3, std::byte{42}));
      EXPECT_TRUE(std::holds_alternative<GatherDone>(messages[2]));
    }
  }
  void expect_rejected(Client& client, const std::string& reason) {
    EXPECT_NE(client.only<Reject>().reason.find(reason), std::string::npos);
    EXPECT_TRUE(client.closing());
    expect_undisturbed();
  }

  ServerProtocol server_{3, kToken};
  std::vector<Client> ranks_;
  std::uint64_t sequence_ = 0;
};

TEST_F(StoreServer, AWrongTokenIsToldNothingElse) {
  for (const char* token : {"", "open", "open sesame!", "OPEN SESAME"}) {
    Client client(server_, 10);
    client.say(Hello{token, 99, 99});
    expect_rejected(client, "wrong token");
    client.hang_up();
  }
}

TEST_F(StoreServer, AnotherWorldSizeIsNamed) {
  Client client(server_, 10);
  client.say(Hello{kToken, 4, 2});
  expect_rejected(client, "world size 4, but this store serves 3 ranks");
}

TEST_F(StoreServer, ARankOutsideTheWorldIsRejected) {
  for (const int rank : {3, -1, 1 << 30}) {
    Client client(server_, 10);
    client.say(Hello{kToken, 3, rank});
    expect_rejected(client, "rank " + std::to_string(rank));
    client.hang_up();
  }
}

TEST_F(StoreServer, TheSecondProcessOfARankIsRejectedAndTheFirstStays) {
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 1});
  expect_rejected(client, "rank 1 has joined before");
}

TEST_F(StoreServer, ARankCannotComeBack) {
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  client.only<Welcome>();
  client.hang_up();
  Client again(server_, 11);
  again.say(Hello{kToken, 3, 2});
  EXPECT_NE(again.only<Reject>().reason.find("joined before"), std::string::npos);
}

TEST_F(StoreServer, MessagesBeforeHelloAreRejected) {
  const std::vector<Message> early{request_of({0, 1}), Bye{}, GiveUp{"x"}, Welcome{}, RankLost{0}, GatherDone{{1, 0}, 5}};
  for (const Message& message : early) {
    Client client(server_, 10);
    client.say(message);
    expect_rejected(client, "before hello");
    client.hang_up();
  }
}

TEST_F(StoreServer, AStrangerCannotMakeTheServerHoldMuch) {
  Client client(server_, 10);
  client.say(Hello{std::string(kMaxHelloBytes, 'x'), 3, 2});
  expect_rejected(client, "allowed are");
}

TEST_F(StoreServer, NoiseIsRejected) {
  Client client(server_, 10);
  const auto noise = std::as_bytes(std::span(std::string_view("GET / HTTP/1.1\r\nHost: here\r\n\r\n")));
  client.say_bytes({noise.begin(), noise.end()});
  expect_rejected(client, "not a Tokenyard connection");
}

TEST_F(StoreServer, SilenceIsRejectedAfterAWhile) {
  const Time now = Deadline::Clock::now();
  Client client(server_, 10, now);
  server_.tick(now + std::chrono::milliseconds(ServerProtocol::kHelloTimeoutMs - 1));
  EXPECT_TRUE(client.heard().empty());
  ASSERT_TRUE(server_.next_deadline());
  server_.tick(*server_.next_deadline());
  expect_rejected(client, "no hello within");
}

// A rank that breaks the protocol is lost for the others, with the reason.
TEST_F(StoreServer, ARankOutOfSequenceIsLost) {
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  client.only<Welcome>();
  ranks_[0].say(request_of({0, 1, 2}, 77));
  client.skip_a_number();
  client.say(request_of({0, 1, 2}, 77));
  EXPECT_NE(client.only<Reject>().reason.find("message number 2, expected 1"), std::string::npos);
  const std::vector<Message> heard = ranks_[0].heard();
  ASSERT_EQ(heard.size(), 2U);
  const Failure& failure = std::get<GatherFailed>(heard[1]).failure;
  EXPECT_EQ(failure.kind, FailureKind::peer_lost);
  EXPECT_EQ(failure.peer, 2);
  EXPECT_NE(failure.detail.find("message number 2, expected 1"), std::string::npos) << failure.detail;
  EXPECT_EQ(std::get<RankLost>(heard[0]).rank, 2);
  EXPECT_EQ(ranks_[1].only<RankLost>().rank, 2);
  expect_undisturbed();
}

TEST_F(StoreServer, BadGathersOfARankAreRejected) {
  const std::vector<std::pair<GatherRequest, std::string>> bad{
      {request_of({0, 1}), "no member of its own call"},
      {request_of({2, 3}), "member 3"},
      {request_of({2, 2}), "named twice"},
  };
  int id = 10;
  for (const auto& [request, reason] : bad) {
    ServerProtocol server(3, "");
    Client client(server, id++);
    client.say(Hello{"", 3, 2});
    client.only<Welcome>();
    client.say(request);
    EXPECT_NE(client.only<Reject>().reason.find(reason), std::string::npos) << reason;
    EXPECT_TRUE(client.closing());
  }
}

TEST_F(StoreServer, HelloTwiceIsRejected) {
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  client.say(Hello{kToken, 3, 2});
  const std::vector<Message> heard = client.heard();
  ASSERT_EQ(heard.size(), 2U);
  EXPECT_NE(std::get<Reject>(heard[1]).reason.find("after hello"), std::string::npos);
}

TEST_F(StoreServer, AFloodOfGathersEndsTheRankThatSendsIt) {
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  client.only<Welcome>();
  for (int i = 0; i < ServerProtocol::kMaxOpenGathers; ++i) client.say(request_of({0, 1, 2}, 1000 + i));
  EXPECT_TRUE(client.heard().empty());
  client.say(request_of({0, 1, 2}, 9999));
  EXPECT_NE(client.only<Reject>().reason.find("gathers at once"), std::string::npos);
  for (Client& rank : ranks_) EXPECT_EQ(rank.only<RankLost>().rank, 2);
  expect_undisturbed();
}

TEST_F(StoreServer, FinishedGathersDoNotCount) {
  for (int i = 0; i < 2 * ServerProtocol::kMaxOpenGathers; ++i) expect_undisturbed();
}

TEST_F(StoreServer, AnEndedConnectionIsALostRankUnlessItSaidBye) {
  ranks_[0].say(Bye{});
  EXPECT_TRUE(ranks_[0].closing());
  EXPECT_EQ(server_.num_connected(), 1);
  ranks_[0].hang_up();
  EXPECT_TRUE(ranks_[1].heard().empty()) << "closed in order";
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  client.only<Welcome>();
  client.hang_up();
  EXPECT_EQ(ranks_[1].only<RankLost>().rank, 2);
}

TEST_F(StoreServer, WhoComesLateLearnsWhoIsLost) {
  server_.lose(0, "was killed");
  Client client(server_, 10);
  client.say(Hello{kToken, 3, 2});
  const std::vector<Message> heard = client.heard();
  ASSERT_EQ(heard.size(), 2U);
  EXPECT_TRUE(std::holds_alternative<Welcome>(heard[0]));
  EXPECT_EQ(std::get<RankLost>(heard[1]).rank, 0);
}

TEST_F(StoreServer, DeadlinesNameTheMissing) {
  GatherRequest request = request_of({0, 1, 2});
  request.timeout_ms = 1;
  ranks_[0].say(request);
  ranks_[1].say(request_of({0, 1, 2}));
  server_.tick(Deadline::Clock::now() + std::chrono::milliseconds(2));
  for (int rank = 0; rank < 2; ++rank) {
    const Failure failure = ranks_[rank].only<GatherFailed>().failure;
    EXPECT_EQ(failure.kind, FailureKind::timeout);
    EXPECT_EQ(failure.rank, rank);
    EXPECT_EQ(failure.peer, 2);
  }
}

}  // namespace
}  // namespace tokenyard::world_internal
