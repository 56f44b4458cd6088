#include <gtest/gtest.h>
#include <netinet/in.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <thread>

#include "tokenyard/error.h"
#include "tokenyard/world.h"
#include "world/tcp_server.h"
#include "world/tcp_store.h"

namespace tokenyard::world_internal {
namespace {

using Clock = std::chrono::steady_clock;

// A port that nobody uses right now.
int free_port() {
  const auto listener = listen_at(*resolve("127.0.0.1", 0));
  return listener->port;
}

std::int64_t ms_since(Clock::time_point begin) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin).count();
}

Failure failure_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const TransportError& error) {
    return error.failure();
  }
  ADD_FAILURE() << "no TransportError";
  return {};
}

WorldOptions options_of(int rank, int size, int port, int timeout_ms = 30'000) {
  return {.rank = rank, .size = size, .local_rank = rank, .port = port, .timeout_ms = timeout_ms};
}

// Ranks as threads of this process that meet over TCP, as processes would.
void run_over_tcp(int size, const std::function<void(World&)>& fn, int timeout_ms = 30'000) {
  const int port = free_port();
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        World world = World::connect(options_of(rank, size, port, timeout_ms));
        fn(world);
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
  }
}

void expect_gathers(const World& world, int rounds, std::size_t bytes = 10) {
  for (int round = 0; round < rounds; ++round) {
    const auto all = world.all_gather(std::vector<std::byte>(bytes + world.rank(), std::byte(round + world.rank())));
    ASSERT_EQ(static_cast<int>(all.size()), world.size());
    for (int rank = 0; rank < world.size(); ++rank) {
      ASSERT_EQ(all[rank], std::vector<std::byte>(bytes + rank, std::byte(round + rank)));
    }
  }
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

TEST(StoreTcp, RanksMeetGatherAndSplit) {
  for (const int size : {2, 3, 8}) {
    run_over_tcp(size, [&](World& world) {
      EXPECT_FALSE(world.is_in_process());
      EXPECT_EQ(world.local_rank(), world.rank());
      for (int peer = 0; peer < size; ++peer) {
        EXPECT_TRUE(world.alive(peer));
        EXPECT_EQ(world.link(peer), peer == world.rank() ? LinkKind::self : LinkKind::peer);
        EXPECT_EQ(world.host(peer), world.host(world.rank()));
      }
      expect_gathers(world, 20);
      const auto sub = world.split(world.rank() % 2, -world.rank());
      ASSERT_TRUE(sub);
      EXPECT_NE(sub->generation(), world.generation());
      expect_gathers(*sub, 20);
      world.barrier();
    });
  }
}

TEST(StoreTcp, SubWorldsAreUsedAtOnce) {
  run_over_tcp(4, [](World& world) {
    const auto pair = world.split(world.rank() / 2, 0);
    const auto cross = world.split(world.rank() % 2, 0);
    std::jthread other([&] { expect_gathers(*cross, 200); });
    expect_gathers(*pair, 200);
  });
}

TEST(StoreTcp, LargePartsPassWhole) {
  run_over_tcp(3, [](World& world) { expect_gathers(world, 2, std::size_t{5} << 20); });
}

TEST(StoreTcp, TheRankThatDoesNotJoinIsNamed) {
  const int port = free_port();
  const auto begin = Clock::now();
  std::vector<std::jthread> threads;
  for (const int rank : {0, 2}) {
    threads.emplace_back([=] {
      const Failure failure = failure_of([&] { World::connect(options_of(rank, 4, port, 400)); });
      EXPECT_EQ(failure.kind, FailureKind::timeout);
      EXPECT_EQ(failure.phase, Phase::rendezvous);
      EXPECT_EQ(failure.rank, rank);
      EXPECT_EQ(failure.peer, 1);
      EXPECT_NE(failure.detail.find("ranks 1, 3"), std::string::npos) << failure.detail;
    });
  }
  threads.clear();
  EXPECT_LT(ms_since(begin), 5000);
}

TEST(StoreTcp, WithoutAStoreRankZeroIsNamed) {
  const Failure failure = failure_of([] { World::connect(options_of(1, 2, free_port(), 200)); });
  EXPECT_EQ(failure.kind, FailureKind::timeout);
  EXPECT_EQ(failure.phase, Phase::rendezvous);
  EXPECT_EQ(failure.peer, 0);
  EXPECT_NE(failure.detail.find("Connection refused"), std::string::npos) << failure.detail;
}

TEST(StoreTcp, AnotherProgramsPortIsSaid) {
  const auto listener = listen_at(*resolve("127.0.0.1", 0));
  const Failure taken = failure_of([&] { World::connect(options_of(0, 2, listener->port, 1000)); });
  EXPECT_EQ(taken.kind, FailureKind::system);
  EXPECT_NE(taken.detail.find("TOKENYARD_PORT"), std::string::npos) << taken.detail;
  std::jthread other([&] {
    pollfd readable{.fd = listener->fd.get(), .events = POLLIN, .revents = 0};
    poll(&readable, 1, 10'000);
    const Fd fd(accept4(listener->fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
    ASSERT_EQ(send(fd.get(), "220 mail.example ready\r\n", 24, MSG_NOSIGNAL), 24);
  });
  const Failure failure = failure_of([&] { World::connect(options_of(1, 2, listener->port, 5000)); });
  EXPECT_EQ(failure.kind, FailureKind::mismatch);
  EXPECT_NE(failure.detail.find("not a Tokenyard connection"), std::string::npos) << failure.detail;
}

TEST(StoreTcp, AnAddressThatDoesNotResolveIsNamed) {
  WorldOptions options = options_of(1, 2, 9999, 200);
  options.address = "no such host";
  const Failure failure = failure_of([&] { World::connect(options); });
  EXPECT_EQ(failure.kind, FailureKind::system);
  EXPECT_NE(failure.detail.find("no such host"), std::string::npos) << failure.detail;
}

TEST(StoreTcp, ThoseThatAreRejectedDisturbNobody) {
  const int port = free_port();
  std::atomic<int> joined{0};
  const auto rank_body = [&](int rank) {
    WorldOptions options = options_of(rank, 2, port);
    options.token = "right";
    const World world = World::connect(options);
    ++joined;
    for (int round = 0; round < 50; ++round) {
      expect_gathers(world, 1);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  };
  std::jthread first(rank_body, 0);
  std::jthread second(rank_body, 1);
  while (joined < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const auto rejected = [&](int rank, int size, const std::string& token, const std::string& reason) {
    WorldOptions options = options_of(rank, size, port, 5000);
    options.token = token;
    options.store_elsewhere = true;
    const Failure failure = failure_of([&] { World::connect(options); });
    EXPECT_EQ(failure.kind, FailureKind::aborted);
    EXPECT_NE(failure.detail.find(reason), std::string::npos) << failure.detail;
  };
  rejected(1, 2, "wrong", "wrong token");
  rejected(1, 2, "", "wrong token");
  rejected(1, 2, "right", "rank 1 has joined before");
  rejected(2, 3, "right", "world size 3");
  const auto address = *resolve("127.0.0.1", port);
  for (int i = 0; i < 100; ++i) {
    const Attempt noise = try_connect(address, Deadline::after_ms(1000));
    ASSERT_TRUE(noise.fd);
    if (i % 2 == 0) send(noise.fd.get(), "noise noise noise noise", 23, MSG_NOSIGNAL);
  }
}

TEST(StoreTcp, ARankWhoseConnectionEndsIsLost) {
  const auto server = TcpServer::start(*resolve("127.0.0.1", 0), 2, "");
  ASSERT_TRUE(server.has_value());
  const StoreAddress address{.socket = *resolve("127.0.0.1", (*server)->port()), .holder = -1};
  auto store = TcpStore::connect(address, {.token = "", .size = 2, .rank = 0}, Deadline::after_ms(5000));
  ASSERT_TRUE(store.has_value());
  Attempt other = try_connect(address.socket, Deadline::after_ms(5000));
  ASSERT_TRUE(send_all(other.fd.get(), encode(0, Hello{"", 2, 1}), Deadline::after_ms(5000)));
  std::jthread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    other.fd.reset();
  });
  const auto begin = Clock::now();
  const Call call{.key = {kRootGeneration, 0}, .phase = Phase::gather, .members = {0, 1}};
  const auto gathered = (*store)->gather(call, std::make_shared<const Part>(), Deadline::after_ms(60'000));
  ASSERT_FALSE(gathered.has_value());
  EXPECT_EQ(gathered.error().kind, FailureKind::peer_lost);
  EXPECT_EQ(gathered.error().peer, 1);
  EXPECT_LT(ms_since(begin), 2000);
  while (!(*store)->lost(1) && ms_since(begin) < 5000) std::this_thread::yield();
  EXPECT_TRUE((*store)->lost(1));
}

TEST(StoreTcp, TheLossOfTheStoreIsSaid) {
  auto server = TcpServer::start(*resolve("127.0.0.1", 0), 2, "");
  ASSERT_TRUE(server.has_value());
  const int port = (*server)->port();
  std::vector<std::jthread> ranks;
  std::atomic<int> joined{0};
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      WorldOptions options = options_of(rank, 2, port);
      options.store_elsewhere = true;
      const World world = World::connect(options);
      ++joined;
      if (rank == 1) {  // waits when it happens; rank 0 calls afterwards
        const Failure failure = failure_of([&] { world.barrier(); });
        EXPECT_EQ(failure.kind, FailureKind::peer_lost);
        EXPECT_EQ(failure.peer, -1) << "no rank is to blame";
        EXPECT_NE(failure.detail.find("the store at 127.0.0.1:" + std::to_string(port) + " (the launcher) ended"), std::string::npos)
            << failure.detail;
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        EXPECT_NE(failure_of([&] { world.barrier(); }).detail.find("the store at"), std::string::npos);
      }
      EXPECT_TRUE(world.alive(1 - rank));
    });
  }
  while (joined < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  server->reset();
}

TEST(StoreTcp, TheStoreOutlivesRankZerosWorldWhileOthersUseIt) {
  std::atomic<bool> closed{false};
  run_over_tcp(3, [&](World& world) {
    const auto rest = world.split(world.rank() == 0 ? -1 : 0, 0);
    if (world.rank() == 0) {
      std::jthread note([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        closed = true;
      });
      return;  // this thread now waits in its destructor, holding the store
    }
    while (!closed) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    expect_gathers(*rest, 20);
    const Failure failure = failure_of([&] { world.barrier(); });
    EXPECT_EQ(failure.peer, 0);
    EXPECT_NE(failure.detail.find("has closed its world"), std::string::npos) << failure.detail;
  });
}

TEST(StoreTcp, LeavingIsToldToTheOthers) {
  run_over_tcp(3, [](World& world) {
    if (world.rank() == 1) {
      world.leave();
      EXPECT_FALSE(world.alive(1));
      EXPECT_EQ(failure_of([&] { world.barrier(); }).peer, 1);
      return;
    }
    const Failure failure = failure_of([&] { world.barrier(); });
    EXPECT_EQ(failure.kind, FailureKind::peer_lost);
    EXPECT_EQ(failure.peer, 1);
    const auto begin = Clock::now();
    while (world.alive(1) && ms_since(begin) < 5000) std::this_thread::yield();
    EXPECT_FALSE(world.alive(1));
    EXPECT_TRUE(world.alive(2 - world.rank()));
  });
}

TEST(StoreTcp, TheDeadlineNamesTheMissing) {
  std::atomic<int> given_up{0};
  run_over_tcp(
      3,
      [&](World& world) {
        if (world.rank() == 1) {
          while (given_up < 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
          return;
        }
        const auto begin = Clock::now();
        const Failure failure = failure_of([&] { world.barrier(); });
        EXPECT_EQ(failure.kind, FailureKind::timeout);
        EXPECT_EQ(failure.phase, Phase::barrier);
        EXPECT_EQ(failure.rank, world.rank());
        EXPECT_EQ(failure.peer, 1);
        EXPECT_LT(ms_since(begin), 600 + 1000);
        ++given_up;
      },
      600);
}

TEST(StoreTcp, ManyWorldsLeaveNothingBehind) {
  run_over_tcp(2, [](World& world) { world.barrier(); });
  const std::size_t before = open_descriptors();
  for (int i = 0; i < 30; ++i) {
    run_over_tcp(3, [](World& world) { static_cast<void>(world.split(0, 0)); });
  }
  EXPECT_EQ(open_descriptors(), before);
}

}  // namespace
}  // namespace tokenyard::world_internal
