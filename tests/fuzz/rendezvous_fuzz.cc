// A store between two honest ranks and a hostile one: whatever the third sends, before or after a right hello, the two go
// on, what the store says stays well-formed, and who breaks the rules is told and closed. One thing a rank that knows the
// token may do: call a meeting of survivors, and so give up those that do not come.
//
// The first byte of an input chooses: its lowest bit whether the hostile client first says a right hello, the next whether
// the rest is its bytes or a script of well-formed messages, the others the size of the pieces in which bytes arrive.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "world/identity.h"
#include "world/server_protocol.h"

namespace {

using namespace tokenyard::world_internal;
using tokenyard::Deadline;
using tokenyard::Phase;
using Bytes = std::vector<std::byte>;

// Every input is rejected sooner or later, and said so.
[[maybe_unused]] const int quiet = setenv("TOKENYARD_LOG", "off", 0);

constexpr int kRanks = 3;
constexpr const char* kToken = "token";

void require(bool condition) {
  if (!condition) std::abort();
}

class Client {
 public:
  Client(ServerProtocol& server, int id) : server_(server), id_(id), connection_(server.open(id, "fuzz", Deadline::Clock::now())) {}

  void say(const Message& message) { server_.receive(id_, encode(sequence_++, message)); }
  void say_bytes(std::span<const std::byte> bytes) { server_.receive(id_, bytes); }
  bool closing() const { return connection_.closing; }
  void hang_up() { server_.close(id_, "its connection ended"); }
  // Everything that the store had to say, which must be messages.
  std::vector<Message> heard() {
    std::vector<Message> messages;
    for (const Chunk& chunk : connection_.outgoing) {
      reader_.feed(chunk.rest_of_head());
      reader_.feed(chunk.rest_of_tail());
      while (true) {
        auto message = reader_.next();
        require(message.has_value());
        if (!*message) break;
        messages.push_back(std::move(**message));
      }
    }
    connection_.outgoing.clear();
    return messages;
  }

 private:
  ServerProtocol& server_;
  int id_;
  ServerProtocol::Connection& connection_;
  std::uint32_t sequence_ = 0;
  FrameReader reader_{kMaxFrameBytes};
};

GatherRequest request_of(std::vector<int> members, std::uint64_t sequence) {
  return {{.key = {kRootGeneration, sequence}, .phase = Phase::gather, .members = std::move(members)}, 1'000'000, Bytes(5)};
}

bool given_up(const Message& message) {
  const auto* failed = std::get_if<GatherFailed>(&message);
  return failed != nullptr && failed->failure.detail.find("did not come when the survivors met") != std::string::npos;
}

// The two honest ranks meet.
void expect_undisturbed(std::vector<Client>& honest, std::uint64_t sequence) {
  for (Client& rank : honest) rank.say(request_of({0, 1}, sequence));
  for (Client& rank : honest) {
    require(!rank.closing());
    int parts = 0;
    int done = 0;
    for (const Message& message : rank.heard()) {
      if (given_up(message)) return;
      if (const auto* part = std::get_if<GatherPart>(&message)) parts += part->bytes.size() == 5;
      done += std::holds_alternative<GatherDone>(message);
      require(!std::holds_alternative<Reject>(message) && !std::holds_alternative<GatherFailed>(message));
    }
    require(parts == 2 && done == 1);
  }
}

// Bytes as numbers, and numbers as messages.
class Script {
 public:
  explicit Script(std::span<const std::byte> bytes) : rest_(bytes) {}
  bool empty() const { return rest_.empty(); }
  Message next() {
    switch (number() % 8) {
      case 0:
        return Hello{number() % 2 == 0 ? kToken : "x", number() % 5, number() % 5 - 1};
      case 1:
        return GiveUp{std::string(static_cast<std::size_t>(number()), 'r')};
      case 2:
        return Bye{};
      case 3:
        return RankLost{number() % 4};
      default:
        return gather();
    }
  }

 private:
  int number() {
    if (rest_.empty()) return 0;
    const auto value = static_cast<int>(rest_.front());
    rest_ = rest_.subspan(1);
    return value;
  }
  GatherRequest gather() {
    GatherRequest request;
    request.call.key = {static_cast<std::uint64_t>(number() % 3), static_cast<std::uint64_t>(number() % 8)};
    request.call.phase = static_cast<Phase>(number() % (static_cast<int>(Phase::collective) + 1));
    for (int members = 1 + number() % 4; members > 0; --members) request.call.members.push_back(number() % 4);
    request.timeout_ms = number();
    request.bytes.resize(static_cast<std::size_t>(number()));
    return request;
  }
  std::span<const std::byte> rest_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> input = std::as_bytes(std::span(data, size));
  static_cast<void>(tokenyard::world_internal::Identity::decode(input));
  const int choice = input.empty() ? 0 : static_cast<int>(input[0]);
  std::span<const std::byte> rest = input.subspan(std::min<std::size_t>(1, input.size()));

  ServerProtocol server(kRanks, kToken);
  std::vector<Client> honest;
  for (int rank = 0; rank < 2; ++rank) {
    honest.emplace_back(server, rank);
    honest.back().say(Hello{kToken, kRanks, rank});
  }
  Client hostile(server, 2);
  if (choice & 1) hostile.say(Hello{kToken, kRanks, 2});
  if (choice & 2) {
    for (Script script(rest); !script.empty() && !hostile.closing();) hostile.say(script.next());
  } else {
    const auto piece = static_cast<std::size_t>(1 + choice / 4);
    for (; !rest.empty(); rest = rest.subspan(std::min(piece, rest.size()))) hostile.say_bytes(rest.first(std::min(piece, rest.size())));
  }
  hostile.heard();
  expect_undisturbed(honest, 1000);
  server.tick(Deadline::Clock::now() + std::chrono::milliseconds(500));  // deadlines of the hostile, not of the honest
  hostile.heard();
  expect_undisturbed(honest, 1001);
  hostile.hang_up();
  expect_undisturbed(honest, 1002);
  return 0;
}
