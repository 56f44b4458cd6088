// Every rank runs all tests in the same order. MPI serves the tests themselves only to agree on a port.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <mpi.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>

#include "mpi/mpi_world.h"
#include "tokenyard/collective.h"

namespace tokenyard::mpi_test {
namespace {

std::unique_ptr<World> the_world;

int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ::bind(fd, reinterpret_cast<const sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return ntohs(address.sin_port);
}

World connect() {
  WorldOptions options;
  MPI_Comm_rank(MPI_COMM_WORLD, &options.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &options.size);
  options.local_rank = options.rank;
  options.port = free_port();
  MPI_Bcast(&options.port, 1, MPI_INT, 0, MPI_COMM_WORLD);
  return World::connect(options);
}

}  // namespace

World& world() { return *the_world; }

int run(bool caller_initialises) {
  if (caller_initialises) {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided);
  } else {
    // A world of one rank needs nobody else, and so can be the first to use MPI.
    Collectives::create(World::in_process(1)[0], {.transport = Transport::mpi})->barrier();
  }
  the_world = std::make_unique<World>(connect());
  const int result = RUN_ALL_TESTS();
  the_world->barrier();
  the_world.reset();
  if (caller_initialises) MPI_Finalize();
  return result;
}

}  // namespace tokenyard::mpi_test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  return tokenyard::mpi_test::run(argc > 1 && std::strcmp(argv[1], "--caller-initialises") == 0);
}
