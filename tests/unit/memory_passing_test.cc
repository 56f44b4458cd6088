#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <vector>

#include "memory/fd_exchange.h"
#include "tokenyard/world.h"

namespace tokenyard {
namespace {

using world_internal::Fd;

// A file whose length tells whose it is.
Fd file_of(int rank) {
  Fd fd(memfd_create("passing", MFD_CLOEXEC));
  EXPECT_EQ(ftruncate(fd.get(), 1000 + rank), 0);
  return fd;
}
off_t length_of(const Fd& fd) {
  struct stat status = {};
  return fstat(fd.get(), &status) == 0 ? status.st_size : -1;
}

std::vector<FdExchange::Endpoint> all_endpoints(const World& world, const FdExchange& exchange) {
  const std::string mine = exchange.endpoint().secret + exchange.endpoint().address;
  std::vector<FdExchange::Endpoint> endpoints;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(mine)))) {
    const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    endpoints.push_back(
        {.address = text.substr(exchange.endpoint().secret.size()), .secret = text.substr(0, exchange.endpoint().secret.size())});
  }
  return endpoints;
}

Fd connect_to(const std::string& name) {
  Fd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  EXPECT_EQ(connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length), 0) << std::strerror(errno);
  return fd;
}

TEST(MemoryPassing, EveryRankGetsEveryRanksDescriptor) {
  for (const int size : {1, 2, 8}) {
    run_ranks(size, [&](World& world) {
      const auto exchange = FdExchange::listen();
      ASSERT_TRUE(exchange.has_value());
      const Fd mine = file_of(world.rank());
      const auto fds = exchange->swap(world, all_endpoints(world, *exchange), mine.get(), Deadline::after_ms(30'000));
      ASSERT_TRUE(fds.has_value()) << fds.error().message();
      ASSERT_EQ(static_cast<int>(fds->size()), size);
      for (int rank = 0; rank < size; ++rank) {
        if (rank == world.rank())
          EXPECT_FALSE((*fds)[rank]);
        else
          EXPECT_EQ(length_of((*fds)[rank]), 1000 + rank);
      }
    });
  }
}

TEST(MemoryPassing, StrangersAreIgnored) {
  run_ranks(2, [&](World& world) {
    const auto exchange = FdExchange::listen();
    ASSERT_TRUE(exchange.has_value());
    const auto endpoints = all_endpoints(world, *exchange);
    Fd silent;
    Fd wrong;
    Fd noisy;
    if (world.rank() == 1) {
      silent = connect_to(endpoints[0].address);
      wrong = connect_to(endpoints[0].address);
      // Right length and rank, no descriptor, and not the secret.
      const struct {
        char secret[16];
        std::int32_t rank;
      } guess{{}, 1};
      ASSERT_EQ(send(wrong.get(), &guess, sizeof guess, MSG_NOSIGNAL), static_cast<ssize_t>(sizeof guess));
      noisy = connect_to(endpoints[0].address);
      ASSERT_EQ(send(noisy.get(), "noise", 5, MSG_NOSIGNAL), 5);
    }
    world.barrier();
    const Fd mine = file_of(world.rank());
    const auto fds = exchange->swap(world, endpoints, mine.get(), Deadline::after_ms(30'000));
    ASSERT_TRUE(fds.has_value()) << fds.error().message();
    EXPECT_EQ(length_of((*fds)[1 - world.rank()]), 1000 + (1 - world.rank()));
    world.barrier();
  });
}

TEST(MemoryPassing, ARankThatDoesNotPassItsOwnIsNamed) {
  run_ranks(3, [&](World& world) {
    const auto exchange = FdExchange::listen();
    ASSERT_TRUE(exchange.has_value());
    const auto endpoints = all_endpoints(world, *exchange);
    const Fd mine = file_of(world.rank());
    if (world.rank() == 2) {
      world.barrier();
      return;
    }
    const auto fds = exchange->swap(world, endpoints, mine.get(), Deadline::after_ms(200));
    ASSERT_FALSE(fds.has_value());
    EXPECT_EQ(fds.error().kind, FailureKind::timeout);
    EXPECT_EQ(fds.error().peer, 2);
    world.barrier();
  });
}

TEST(MemoryPassing, ARankThatIsLostIsNamedAtOnce) {
  run_ranks(3, [&](World& world) {
    auto exchange = FdExchange::listen();
    ASSERT_TRUE(exchange.has_value());
    const auto endpoints = all_endpoints(world, *exchange);
    const Fd mine = file_of(world.rank());
    if (world.rank() == 2) return world.leave();
    const auto fds = exchange->swap(world, endpoints, mine.get(), Deadline::after_ms(60'000));
    ASSERT_FALSE(fds.has_value());
    EXPECT_EQ(fds.error().kind, FailureKind::peer_lost);
    EXPECT_EQ(fds.error().peer, 2);
  });
}

}  // namespace
}  // namespace tokenyard
