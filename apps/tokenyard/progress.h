#pragma once
// How far a run is, shared between its ranks and the command that shows it.

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>

namespace tokenyard::cli {

// Lives in memory that processes share, zero-filled.
struct Progress {
  std::atomic<std::uint32_t> done{0};
  std::atomic<std::uint32_t> total{0};
};

// Draws a bar on stderr while it lives, when that is a terminal; leaves an empty line behind.
class ProgressBar {
 public:
  ProgressBar(const Progress& progress, std::string label);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

 private:
  std::jthread drawer_;
};

}  // namespace tokenyard::cli
