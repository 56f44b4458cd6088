#include "core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/usage.h"

namespace tokenyard {
namespace {

using Body = std::function<void(std::int64_t, std::int64_t, int)>;

// Waiters yield this often before they sleep: phases of one call follow each other within microseconds, and a yield
// hands the core over at once where ranks outnumber cores.
constexpr int kYields = 32;

struct Job {
  const Body* body = nullptr;
  std::int64_t count = 0;
  int parts = 0;

  void run(int part) const { (*body)(begin(part), begin(part + 1), part); }
  // The first count % parts parts are one longer; no product that could overflow.
  std::int64_t begin(int part) const { return count / parts * part + std::min<std::int64_t>(part, count % parts); }
};

}  // namespace

struct ThreadPool::State {
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable done;
  std::atomic<std::uint64_t> generation{0};  // of the job; changes under the mutex
  std::atomic<int> running{0};               // workers that still owe their part
  Job job;
  bool stop = false;
  std::vector<std::exception_ptr> errors;  // [thread], each written by its thread only
  std::vector<std::thread> workers;

  ~State() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
      generation.fetch_add(1, std::memory_order_release);
    }
    work.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  void start(int num_threads) {
    errors.resize(num_threads);
    workers.reserve(num_threads - 1);
    for (int thread = 1; thread < num_threads; ++thread) workers.emplace_back([this, thread] { serve(thread); });
  }

  void serve(int thread) {
    std::uint64_t seen = 0;
    while (true) {
      for (int i = 0; i < kYields && generation.load(std::memory_order_acquire) == seen; ++i) std::this_thread::yield();
      std::unique_lock lock(mutex);
      work.wait(lock, [&] { return generation.load(std::memory_order_relaxed) != seen; });
      if (stop) return;
      seen = generation.load(std::memory_order_relaxed);
      const Job mine = job;
      lock.unlock();
      if (thread < mine.parts) finish_part(mine, thread);
    }
  }

  void run_part(const Job& from, int part) noexcept {
    try {
      from.run(part);
    } catch (...) {
      errors[part] = std::current_exception();
    }
  }

  void finish_part(const Job& from, int part) {
    run_part(from, part);
    // release: the part's writes are the caller's to read once it has seen 0.
    if (running.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    const std::lock_guard lock(mutex);
    done.notify_one();
  }

  void wait_for_workers() {
    for (int i = 0; i < kYields && running.load(std::memory_order_acquire) != 0; ++i) std::this_thread::yield();
    std::unique_lock lock(mutex);
    done.wait(lock, [&] { return running.load(std::memory_order_acquire) == 0; });
    job = {};
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  if (num_threads < 1) usage_error("num_threads = {}; expected at least 1 (the calling thread)", num_threads);
  state_->start(num_threads);
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::num_threads() const { return static_cast<int>(state_->errors.size()); }

void ThreadPool::parallel_for(std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int parts = static_cast<int>(std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, num_threads()));
  if (parts == 1) return body(0, count, 0);
  State& state = *state_;
  const Job job{&body, count, parts};
  {
    const std::lock_guard lock(state.mutex);
    TY_ASSERT(state.job.body == nullptr);  // one call at a time, none from inside a body
    state.job = job;
    state.running.store(parts - 1, std::memory_order_relaxed);
    state.generation.fetch_add(1, std::memory_order_release);
  }
  state.work.notify_all();
  state.run_part(job, 0);
  state.wait_for_workers();
  std::exception_ptr first;
  for (std::exception_ptr& error : state.errors) {
    if (!first) first = error;
    error = nullptr;
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace tokenyard
