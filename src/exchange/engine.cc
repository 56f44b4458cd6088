#include "exchange/engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>

#include "core/usage.h"
#include "exchange/make_transport.h"
#include "exchange/memory_plan.h"

namespace tokenyard::exchange_internal {
namespace {

std::int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

}  // namespace

Engine::WaitMeter::WaitMeter(const RowTransport& transport, protocol::Operation operation, const TensorView& waits)
    : transport_(transport), operation_(operation), waits_(waits) {
  if (waits_) before_ = waited();
}

Engine::WaitMeter::~WaitMeter() {
  if (!waits_) return;
  const std::vector<std::int64_t> now = waited();
  for (std::size_t rank = 0; rank < now.size(); ++rank) waits_.as<std::int64_t>()[rank] += now[rank] - before_[rank];
}

std::vector<std::int64_t> Engine::WaitMeter::waited() const {
  PeerWaits waits = transport_.peer_waits();
  return operation_ == protocol::Operation::combine ? std::move(waits.combine) : std::move(waits.dispatch);
}

Engine::Span::Span(Engine& engine, const char* phase, std::uint64_t call) : engine_(engine) {
  if (!engine_.options_.trace) return;
  span_ = {.phase = phase, .call = call, .begin_ns = now_ns(), .end_ns = 0};
}

Engine::Span::~Span() {
  if (!engine_.options_.trace) return;
  span_.end_ns = now_ns();
  const std::lock_guard lock(engine_.mutex_);
  engine_.spans_.push_back(std::move(span_));
}

Engine::Engine(const World& world, const ExchangeOptions& options) : ExchangeEngine(world, options), pool_(options_.num_threads) {
  transport_ = value_or_throw(make_transport(world_, options_, shape_, pool_));
  expert_board_ = std::make_shared<LeaseBoard>(options_.depth, [](int) {});
  expert_memory_.resize(options_.depth);
}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  transport_->cancel();
  changed_.notify_all();
  if (worker_.joinable()) worker_.join();
}

template <class Make>
auto Engine::admit(Make&& make) {
  check();
  const std::uint64_t call = ++last_call_;
  try {
    return make(call);
  } catch (const UsageError& error) {
    enqueue([this, call, reason = std::string(error.what())] { transport_->reject_call(call, reason); });
    throw;
  }
}

void Engine::abandon(const std::string& reason) {
  check();
  enqueue([this, call = ++last_call_, reason] { transport_->reject_call(call, reason); });
}

template <class Result, class Job>
Pending<Result> Engine::start(Job job) {
  auto task =
      std::make_shared<std::packaged_task<Result()>>([this, shared = std::make_shared<Job>(std::move(job))] { return execute(*shared); });
  auto pending = std::make_shared<PendingState<Result>>();
  auto future = std::make_shared<std::future<Result>>(task->get_future());
  pending->finish = [future] { return future->get(); };
  pending->ready = [future] { return future->wait_for(std::chrono::seconds(0)) == std::future_status::ready; };
  {
    const std::lock_guard lock(mutex_);
    tasks_.emplace_back([task] { (*task)(); });
    if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
  }
  changed_.notify_all();
  return Pending<Result>(std::move(pending));
}

// Runs the task behind those that are queued: at once when there are none.
void Engine::enqueue(std::function<void()> task) {
  if (is_idle()) return task();
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
}

bool Engine::is_idle() {
  const std::lock_guard lock(mutex_);
  return tasks_.empty() && !running_;
}

void Engine::wait_idle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return tasks_.empty() && !running_; });
}

void Engine::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
    if (tasks_.empty()) return;  // closing, and every started call has ended: its waits gave up
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    running_ = true;
    lock.unlock();
    task();
    task = nullptr;  // inputs and results go before anybody is told that this rank is idle
    lock.lock();
    running_ = false;
    changed_.notify_all();
  }
}

template <class Result, class Steps>
Result Engine::guarded(const protocol::CallHeader& header, Steps&& steps) {
  check();
  Failure failure;
  try {
    Expected<Result> result = steps();
    if (result) {
      transport_->end_call(header, nullptr);
      return std::move(*result);
    }
    failure = std::move(result.error());
  } catch (const std::exception& error) {  // out of memory, or a broken invariant: the peers must learn of it too
    failure = {.kind = FailureKind::system, .phase = Phase::none, .detail = error.what()};
  }
  fail(header, std::move(failure));
}

void Engine::fail(const protocol::CallHeader& header, Failure failure) {
  failure.rank = world_.rank();
  failure.epoch = header.call;
  if (failure.peer < 0) failure.peer = world_.rank();
  transport_->end_call(header, &failure);
  if (failure.kind != FailureKind::aborted) {
    const std::lock_guard lock(mutex_);
    status_.failure = failure;
  }
  throw TransportError(std::move(failure));
}

Received Engine::execute(DispatchJob& job) {
  struct Promises {  // buffers that a failed call never leased
    Engine& engine;
    DispatchJob& job;
    ~Promises() {
      if (job.holds_receive_buffer) engine.transport_->unreserve_receive_buffer();
      if (job.holds_expert_buffer) engine.expert_board_->unreserve();
    }
  } promises{*this, job};
  const WaitMeter meter(*transport_, job.header.operation, job.options.waits);
  return guarded<Received>(job.header, [&] { return dispatch_steps(job); });
}

Combined Engine::execute(CombineJob& job) {
  const WaitMeter meter(*transport_, job.header.operation, job.options.waits);
  return guarded<Combined>(job.header, [&] { return combine_steps(job); });
}

Received Engine::dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) {
  if (!is_idle()) return start_dispatch(input, options, cached).finish();
  DispatchJob job = admit([&](std::uint64_t call) { return make_dispatch(input, options, cached, call); });
  return execute(job);
}

Combined Engine::combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  if (!is_idle()) return start_combine(y, handle, options).finish();
  CombineJob job = admit([&](std::uint64_t call) { return make_combine(y, handle, options, call); });
  return execute(job);
}

Pending<Received> Engine::start_dispatch(const DispatchInput& input, const DispatchOptions& options, const Handle* cached) {
  return start<Received>(admit([&](std::uint64_t call) { return make_dispatch(input, options, cached, call); }));
}

Pending<Combined> Engine::start_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options) {
  return start<Combined>(admit([&](std::uint64_t call) { return make_combine(y, handle, options, call); }));
}

// The gradient of combine: rows of grad_out travel like the dispatch, then weights come back as in a combine.
CombineGradient Engine::combine_backward(const Handle& handle, const ConstTensorView& grad_out, const ConstTensorView& y,
                                         const CombineOptions& options) {
  const bool weighs = options.weighting == Weighting::at_expert || options.weighting == Weighting::at_source;
  CombineGradient gradient;
  gradient.rows = dispatch({.rows = grad_out}, {.waits = options.waits}, &handle);
  if (!weighs) return gradient;
  CombineJob job = admit([&](std::uint64_t call) {
    if (y.dtype != grad_out.dtype) usage_error("y is {} but grad_out is {}; give both in one dtype", describe(y), describe(grad_out));
    CombineOptions checked = options;
    checked.out = {};
    CombineJob made = make_combine(y, handle, checked, call);
    made.gradient = WeightGradient{gradient.rows.rows(), y};
    made.y = {};
    made.header.row_bytes = 0;
    made.header.row_weights = 1;
    return made;
  });
  wait_idle();
  Combined combined = execute(job);
  gradient.topk_weights = combined.combined_weights;
  gradient.memory = std::move(combined.memory);
  return gradient;
}

TensorView Engine::expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size, void* /*stream*/) {
  check_expert_rows(*this, handle, dtype, hidden_size);
  check();
  wait_idle();
  auto memory = transport_->expert_rows();
  if (!memory) fail({.call = last_call_}, std::move(memory.error()));
  const std::vector<std::int64_t>& shape = handle.state()->rows_shape();
  if (shape.size() == 2) return {*memory, dtype, {shape[0], shape[1], hidden_size}};
  return {*memory, dtype, {shape[0], hidden_size}};
}

void Engine::check() const {
  const std::lock_guard lock(mutex_);
  if (status_.failure) throw TransportError(*status_.failure);
}

ExchangeStatus Engine::status() const {
  const std::lock_guard lock(mutex_);
  return status_;
}

void Engine::clear() {
  wait_idle();
  last_call_ = value_or_throw(transport_->reset(last_call_));
  const std::lock_guard lock(mutex_);
  status_.failure.reset();
}

std::vector<int> Engine::recover() {
  wait_idle();
  Survivors left = world_.survivors();
  const ExchangeOptions options = options_without_lost(left.ranks);
  const protocol::ArenaShape shape = shape_of(options, left.world.size());
  // New memory, not the old one cleaned: a rank that is only slow may still write into what it knows.
  auto transport = value_or_throw(make_transport(left.world, options, shape, pool_));
  last_call_ = value_or_throw(transport->reset(last_call_));
  transport_ = std::move(transport);
  shrink_to(left, options);
  const std::lock_guard lock(mutex_);
  status_.failure.reset();
  return std::move(left.ranks);
}

std::vector<PhaseSpan> Engine::take_spans() {
  const std::lock_guard lock(mutex_);
  return std::exchange(spans_, {});
}

std::unique_ptr<ExchangeEngine> make_cpu_engine(const World& world, const ExchangeOptions& options) {
  return std::make_unique<Engine>(world, options);
}

}  // namespace tokenyard::exchange_internal
