#pragma once
// Ends ranks that stopped themselves: the launcher waits for every rank, and a stopped one never ends.

#include <signal.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace tokenyard::world_test {

// Kills every process it was told of that has been stopped (SIGSTOP) for `after_ms`.
class EndStopped {
 public:
  explicit EndStopped(int after_ms) : thread_([this, after_ms](const std::stop_token& stop) { watch(stop, after_ms); }) {}
  // For LaunchOptions::on_start.
  std::function<void(int rank, int pid)> on_start() {
    return [this](int, int pid) {
      const std::lock_guard lock(mutex_);
      processes_.push_back({pid, 0});
    };
  }

 private:
  struct Process {
    int pid;
    int stopped_ms;
  };

  static bool is_stopped(int pid) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
    std::string line;
    std::getline(file, line);
    const std::size_t name_end = line.rfind(") ");
    return name_end != std::string::npos && line[name_end + 2] == 'T';
  }
  void watch(const std::stop_token& stop, int after_ms) {
    constexpr int kTickMs = 50;
    while (!stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(kTickMs));
      const std::lock_guard lock(mutex_);
      for (Process& process : processes_) {
        process.stopped_ms = is_stopped(process.pid) ? process.stopped_ms + kTickMs : 0;
        if (process.stopped_ms >= after_ms) kill(process.pid, SIGKILL);
      }
    }
  }

  std::mutex mutex_;
  std::vector<Process> processes_;
  std::jthread thread_;
};

}  // namespace tokenyard::world_test
