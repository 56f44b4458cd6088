#pragma once
// What a command and its rank processes tell each other: one request, one answer per rank, and the progress. An anonymous file
// (memfd) that ranks open through /proc: nothing stays behind when any of them is killed.

#include <string>

#include "progress.h"

namespace tokenyard::cli {

class Channel {
 public:
  static constexpr int kMaxRanks = 64;

  static Channel create(const std::string& request);
  static Channel open(const std::string& path);
  Channel(Channel&& other) noexcept;
  Channel& operator=(Channel&&) = delete;
  ~Channel();

  // Valid on this machine for as long as the creator lives.
  std::string path() const;
  std::string request() const;
  Progress& progress() const;
  void answer(int rank, const std::string& text) const;
  // Empty: the rank has not answered.
  std::string answer_of(int rank) const;

 private:
  struct Header;
  explicit Channel(int fd);
  void write_at(long offset, const std::string& text) const;
  std::string read_at(long offset, std::size_t bytes) const;

  int fd_ = -1;
  Header* header_ = nullptr;
};

}  // namespace tokenyard::cli
