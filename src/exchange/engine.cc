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

std::atomic<std::uint64_t> next_exchange_id{1};

std::int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

ExchangeOptions with_timeout(ExchangeOptions options, const World& world) {
  if (options.timeout_ms == 0) options.timeout_ms = world.timeout_ms();
  return options;
}

// Every option that ranks must share, as text: a mismatch is shown as it stands.
std::string shared_options(const ExchangeOptions& o) {
  std::string text = fmt::format(
      "max_tokens_per_rank = {}, max_row_bytes = {}, max_scale_bytes = {}, top_k = {}, max_local_experts = {}, max_fanout = {}, "
      "receive_rows = {}, "
      "max_expert_rows = {}, depth = {}, expert_rows = {}, unfolded = {}, transport = {}, timeout_ms = {}",
      o.max_tokens_per_rank, o.max_row_bytes, o.max_scale_bytes, o.top_k, o.max_local_experts, o.max_fanout, o.receive_rows,
      o.max_expert_rows, o.depth, o.expert_rows, o.unfolded, name(o.transport), o.timeout_ms);
  text += ", reduction_groups = [";
  for (const int group : o.reduction_groups) text += fmt::format("{} ", group);
  return text + "]";
}

// The first "name = value" in which two option texts differ.
std::pair<std::string, std::string> first_difference(const std::string& mine, const std::string& theirs) {
  std::size_t at = 0;
  while (at < std::min(mine.size(), theirs.size()) && mine[at] == theirs[at]) ++at;
  const std::size_t before = mine.rfind(", ", at);
  const std::size_t begin = before == std::string::npos ? 0 : before + 2;
  auto item = [begin](const std::string& text) { return text.substr(begin, text.find(", ", begin) - begin); };
  return {item(mine), item(theirs)};
}

// The options of the world that is left; groups keep their order and close their gaps.
ExchangeOptions without_lost(ExchangeOptions options, const std::vector<int>& survivors) {
  const auto ranks = static_cast<std::int64_t>(survivors.size());
  options.receive_rows = std::min(options.receive_rows, ranks * options.max_tokens_per_rank);
  options.max_fanout = static_cast<int>(std::min<std::int64_t>(options.max_fanout, ranks));
  if (options.reduction_groups.empty()) return options;
  std::map<int, int> renumbered;
  for (const int rank : survivors) renumbered[options.reduction_groups[rank]] = 0;
  int next = 0;
  for (auto& [group, number] : renumbered) number = next++;
  std::vector<int> groups;
  for (const int rank : survivors) groups.push_back(renumbered[options.reduction_groups[rank]]);
  options.reduction_groups = std::move(groups);
  return options;
}

RegisteredPlacement registered(const Placement& placement, int rank) {
  RegisteredPlacement entry{placement, std::vector<std::int32_t>(placement.local_experts(rank).size(), 0)};
  for (const Instance& instance : placement.instances()) {
    if (instance.rank != rank) continue;
    const auto& shards = placement.replicas(instance.expert)[instance.replica].shard_ranks;
    entry.shard_ordinals[instance.local_index] =
        static_cast<std::int32_t>(std::count_if(shards.begin(), shards.end(), [rank](int other) { return other < rank; }));
  }
  return entry;
}

}  // namespace

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

Engine::Engine(const World& world, const ExchangeOptions& options)
    : world_(world),
      options_(checked_options(with_timeout(options, world), world.size())),
      shape_(shape_of(options_, world.size())),
      id_(next_exchange_id++),
      pool_(options_.num_threads) {
  agree_on_options();
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

void Engine::agree_on_options() {
  const std::string mine = shared_options(options_);
  const auto all = world_.all_gather(std::as_bytes(std::span(mine)));
  for (int peer = 0; peer < world_.size(); ++peer) {
    const std::string theirs(reinterpret_cast<const char*>(all[peer].data()), all[peer].size());
    if (theirs == mine) continue;
    const auto [ours, other] = first_difference(mine, theirs);
    Failure failure{.kind = FailureKind::mismatch, .phase = Phase::gather, .rank = world_.rank(), .peer = peer};
    failure.detail =
        fmt::format("exchange options differ: rank {} has {}, rank {} has {}; give all ranks the same", world_.rank(), ours, peer, other);
    throw TransportError(std::move(failure));
  }
}

int Engine::add(const Placement& placement) {
  if (placement.ranks() != world_.size())
    usage_error("the placement is for {} ranks; this exchange has {}", placement.ranks(), world_.size());
  if (placement.max_local_experts() > options_.max_local_experts) {
    usage_error("the placement puts {} experts on one rank; the exchange was made for max_local_experts = {}",
                placement.max_local_experts(), options_.max_local_experts);
  }
  if (placement.max_fanout() > options_.max_fanout) {
    usage_error("the placement cuts an expert into {} shards; the exchange was made for max_fanout = {}", placement.max_fanout(),
                options_.max_fanout);
  }
  const std::uint64_t mine[2] = {placement.hash(), placements_.size()};
  const auto all = world_.all_gather(std::as_bytes(std::span(mine)));
  for (int peer = 0; peer < world_.size(); ++peer) {
    std::uint64_t theirs[2];
    std::memcpy(theirs, all[peer].data(), sizeof theirs);
    if (theirs[0] == mine[0] && theirs[1] == mine[1]) continue;
    Failure failure{.kind = FailureKind::mismatch, .phase = Phase::gather, .rank = world_.rank(), .peer = peer};
    failure.detail = fmt::format("rank {} adds placement {:x} as number {}, rank {} adds {:x} as number {}", world_.rank(), mine[0],
                                 mine[1], peer, theirs[0], theirs[1]);
    throw TransportError(std::move(failure));
  }
  wait_idle();
  placements_.push_back(registered(placement, world_.rank()));
  return static_cast<int>(placements_.size()) - 1;
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

template <class Result, class Job>
Pending<Result> Engine::start(Job job) {
  auto task =
      std::make_shared<std::packaged_task<Result()>>([this, shared = std::make_shared<Job>(std::move(job))] { return execute(*shared); });
  auto pending = std::make_shared<PendingState<Result>>();
  pending->future = task->get_future();
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
  return guarded<Received>(job.header, [&] { return dispatch_steps(job); });
}

Combined Engine::execute(CombineJob& job) {
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
  gradient.rows = dispatch({.rows = grad_out}, {}, &handle);
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

TensorView Engine::expert_rows(const Handle& handle, Dtype dtype, std::int64_t hidden_size) {
  check_handle(*this, handle);
  if (!options_.expert_rows) usage_error("expert_rows() needs memory for them: make the exchange with expert_rows = true");
  const HandleState& state = *handle.state();
  if (state.is_expert_layout())
    usage_error("expert_rows() for layout = {}; its rows are folded anyway: pass your own memory to combine", name(state.layout));
  const std::int64_t row_bytes = hidden_size * size_of(dtype);
  if (row_bytes < 16 || row_bytes % 16 != 0 || row_bytes > options_.max_row_bytes) {
    usage_error("expert rows of {} {} are {} bytes; expected a multiple of 16 up to max_row_bytes = {}", hidden_size, name(dtype),
                row_bytes, options_.max_row_bytes);
  }
  check();
  wait_idle();
  auto memory = transport_->expert_rows();
  if (!memory) fail({.call = last_call_}, std::move(memory.error()));
  const std::vector<std::int64_t>& shape = state.metadata.rows_shape;
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
  const ExchangeOptions options = without_lost(options_, left.ranks);
  const protocol::ArenaShape shape = shape_of(options, left.world.size());
  // New memory, not the old one cleaned: a rank that is only slow may still write into what it knows.
  auto transport = value_or_throw(make_transport(left.world, options, shape, pool_));
  last_call_ = value_or_throw(transport->reset(last_call_));
  transport_ = std::move(transport);
  world_ = left.world;
  options_ = options;
  shape_ = shape;
  id_ = next_exchange_id++;
  for (RegisteredPlacement& entry : placements_) entry = registered(entry.placement.restricted_to(left.ranks), world_.rank());
  const std::lock_guard lock(mutex_);
  status_.failure.reset();
  return std::move(left.ranks);
}

std::vector<PhaseSpan> Engine::take_spans() {
  const std::lock_guard lock(mutex_);
  return std::exchange(spans_, {});
}

}  // namespace tokenyard::exchange_internal
