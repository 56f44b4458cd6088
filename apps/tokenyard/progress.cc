#include "progress.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

namespace tokenyard::cli {
namespace {

constexpr int kWidth = 30;

void draw(const Progress& progress, const std::string& label) {
  const std::uint32_t total = progress.total.load(std::memory_order_relaxed);
  const std::uint32_t done = std::min(progress.done.load(std::memory_order_relaxed), total);
  const int filled = total == 0 ? 0 : static_cast<int>(std::uint64_t{done} * kWidth / total);
  std::string bar;
  for (int i = 0; i < kWidth; ++i) bar += i < filled ? "█" : "░";
  fmt::print(stderr, "\r\033[K{} {} {}/{}", label, bar, done, total);
  std::fflush(stderr);
}

}  // namespace

ProgressBar::ProgressBar(const Progress& progress, std::string label) {
  if (::isatty(STDERR_FILENO) == 0) return;
  drawer_ = std::jthread([&progress, label = std::move(label)](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      draw(progress, label);
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
    fmt::print(stderr, "\r\033[K");
    std::fflush(stderr);
  });
}

ProgressBar::~ProgressBar() = default;

}  // namespace tokenyard::cli
