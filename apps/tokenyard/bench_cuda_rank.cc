// One rank of a benchmark on GPUs: checks the results first, then measures with events on the stream.

#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench_gpu.h"
#include "bench_samples.h"
#include "check.h"
#include "core/usage.h"
#include "exchange/cuda_collective.h"
#include "exchange/to_host.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_graph.h"
#include "ranks.h"
#include "settings.h"

namespace tokenyard::cli {
namespace {

using exchange_internal::CudaCollectiveExchange;
using nlohmann::json;

// A tensor of the host, in device memory.
struct Uploaded {
  DeviceBuffer memory;
  ConstTensorView view;
};
Uploaded upload(const ConstTensorView& host, int device) {
  Uploaded result;
  result.view = host;
  if (!host) return result;
  const auto bytes = static_cast<std::size_t>(host.num_elements() * size_of(host.dtype));
  result.memory = value_or_throw(make_device_buffer(device, bytes));
  cuda_check(cudaMemcpy(result.memory.data(), host.data, bytes, cudaMemcpyHostToDevice), "copying input to the GPU");
  result.view.data = result.memory.data();
  return result;
}

struct DeviceBatch {
  Uploaded rows, scales, ids, weights;
  DispatchInput input;
};
DeviceBatch upload(const Batch& batch, int device) {
  DeviceBatch result{upload(batch.input.rows, device),
                     upload(batch.input.scales, device),
                     upload(batch.input.topk_ids, device),
                     upload(batch.input.topk_weights, device),
                     {}};
  result.input = {result.rows.view, result.scales.view, result.ids.view, result.weights.view};
  return result;
}

// An exchange so small that its dispatch is a barrier of all GPUs.
ExchangeOptions barrier_options(const Settings& settings, int device) {
  ExchangeOptions options;
  options.max_tokens_per_rank = 1;
  options.max_row_bytes = 16;
  options.mode = Mode::latency;
  options.device = Device::cuda;
  options.device_index = device;
  options.sm_budget = 1;
  options.timeout_ms = settings.timeout_ms;
  options.max_local_experts = 1;
  return options;
}

// What the graph's kernels know of the routing is in the memory of the handle.
struct Replay {
  Handle handle;
  CudaGraph graph;
};

class CudaBenchRank {
 public:
  CudaBenchRank(const World& world, const Settings& settings, bool with_baseline, Progress& progress)
      : world_(world),
        settings_(settings),
        progress_(progress),
        device_(device_of(world)),
        placement_(placement_of(settings)),
        layout_(parse_layout(settings.layout)),
        stream_(value_or_throw(make_cuda_stream())),
        gate_(stream_.get()),
        begin_(timed_event()),
        end_(timed_event()),
        barrier_(world, barrier_options(settings, device_)),
        exchange_(world, with_device(exchange_options(settings, placement_), device_)) {
    barrier_.add(Placement::uniform(world.size(), world.size()));
    exchange_.add(placement_);
    if (with_baseline) baseline_.emplace(world, placement_, with_device(exchange_options(settings, placement_), device_));
    make_inputs(batches_);
    if (baseline_) make_inputs(baseline_batches_);
    dispatch_options_ = dispatch_options(settings);
    dispatch_options_.stream = stream_.get();
    combine_options_.weighting = weighting_of(layout_);
    combine_options_.stream = stream_.get();
    out_ = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(settings.tokens * combine_row_bytes())));
    combine_options_.out = {out_.data(), expert_dtype(), {settings.tokens, settings.hidden_size}};
  }

  json run() {
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(settings_.warmup + settings_.iterations);
    check();
    if (baseline_) check_baseline();
    if (is_enqueued_ahead()) capture();
    for (int i = 0; i < settings_.warmup + settings_.iterations; ++i) {
      if (i == settings_.warmup) samples_.clear();
      iterate(i % kInputSets);
      if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
    }
    return report();
  }

 private:
  void make_inputs(std::vector<DeviceBatch>& batches) const {
    for (int set = 0; set < kInputSets; ++set) batches.push_back(upload(make_batch(workload_of(settings_, set), world_.rank()), device_));
  }

  static ExchangeOptions with_device(ExchangeOptions options, int device) {
    options.device = Device::cuda;
    options.device_index = device;
    if (options.transport != Transport::nccl_window) options.transport = Transport::automatic;  // inproc: rank threads
    return options;
  }
  Dtype expert_dtype() const { return workload_of(settings_, 0).expert_dtype(); }
  std::int64_t combine_row_bytes() const { return settings_.hidden_size * size_of(expert_dtype()); }

  // Dispatch and combine of the first input set against what the seed says; all ranks fail together.
  void check() {
    const Workload workload = workload_of(settings_, 0);
    const Checker checker(workload, placement_, world_.rank());
    std::vector<std::string> faults;
    const auto note = [&](const char* call, const std::optional<Difference>& found) {
      if (found) faults.push_back(fmt::format("the exchange {}: {}", call, found->message()));
    };
    Received received = exchange_.dispatch(batches_[0].input, dispatch_options_);
    const Received here = exchange_internal::to_host(received, stream_.get());
    exchange_.check();
    note("dispatches wrongly", checker.dispatched(here));
    const std::vector<std::byte> y = expert_output(workload, here, world_.rank());
    y_ = value_or_throw(make_device_buffer(device_, y.size()));
    cuda_check(cudaMemcpy(y_.data(), y.data(), y.size(), cudaMemcpyHostToDevice), "copying expert rows to the GPU");
    exchange_.combine(view_of(y_.data(), received), received.handle(), combine_options_);
    note("combines wrongly", checker.combined(fetched_sums(), layout_, combine_options_.weighting));
    if (exchange_.options().expert_rows) {
      const TensorView pulled = exchange_.expert_rows(received.handle(), expert_dtype(), settings_.hidden_size, stream_.get());
      cuda_check(cudaMemcpyAsync(pulled.data, y_.data(), y.size(), cudaMemcpyDeviceToDevice, stream_.get()), "filling expert rows");
      exchange_.combine(pulled, received.handle(), combine_options_);
      note("combines wrongly from expert_rows", checker.combined(fetched_sums(), layout_, combine_options_.weighting));
    }
    fail_together(faults);
  }

  // The same of the baseline, whose rows come as token_major whatever the layout.
  void check_baseline() {
    const Workload workload = workload_of(settings_, 0);
    const Checker checker(workload, placement_, world_.rank());
    std::vector<std::string> faults;
    const Received received = baseline_->dispatch(baseline_batches_[0].input, stream_.get());
    baseline_->wait(stream_.get());
    const Received here = exchange_internal::to_host(received, stream_.get());
    if (const auto found = checker.dispatched(here))
      faults.push_back(fmt::format("the NCCL baseline dispatches wrongly: {}", found->message()));
    const std::vector<std::byte> y = expert_output(workload, here, world_.rank());
    const auto most = static_cast<std::size_t>(settings_.ranks * settings_.tokens * combine_row_bytes());
    baseline_y_ = value_or_throw(make_device_buffer(device_, most));
    for (std::size_t at = 0; at < most && !y.empty(); at += y.size()) {  // other input sets have more rows
      cuda_check(cudaMemcpy(baseline_y_.data() + at, y.data(), std::min(y.size(), most - at), cudaMemcpyHostToDevice),
                 "copying expert rows to the GPU");
    }
    baseline_->combine(view_of(baseline_y_.data(), received), combine_options_.out, stream_.get());
    baseline_->wait(stream_.get());
    if (const auto found = checker.combined(fetched_sums(), Layout::token_major, Weighting::none))
      faults.push_back(fmt::format("the NCCL baseline combines wrongly: {}", found->message()));
    fail_together(faults);
  }

  void fail_together(const std::vector<std::string>& faults) const {
    for (const json& rank : gather(world_, faults)) {
      if (!rank.empty()) throw Error(rank[0].get<std::string>());
    }
  }

  ConstTensorView fetched_sums() {
    cuda_check(cudaStreamSynchronize(stream_.get()), "waiting for a combine");
    exchange_.check();
    sums_.resize(out_.bytes());
    cuda_check(cudaMemcpy(sums_.data(), out_.data(), sums_.size(), cudaMemcpyDeviceToHost), "copying sums to the host");
    ConstTensorView view = combine_options_.out;
    view.data = sums_.data();
    return view;
  }

  ConstTensorView view_of(const std::byte* y, const Received& received) const {
    ConstTensorView view = received.rows();  // dense, of the same shape
    view.data = y;
    view.dtype = expert_dtype();
    return view;
  }

  // Exact sizing waits for counts in the midst of the call: it cannot be enqueued ahead.
  bool is_enqueued_ahead() const { return parse_sizing(settings_.sizing) == Sizing::capacity; }

  // Dispatch and combine of every input set as a graph.
  void capture() {
    std::vector<Handle> room;  // a capture must find the memory of its handles
    for (const DeviceBatch& batch : batches_) room.push_back(exchange_.dispatch(batch.input, dispatch_options_).handle());
    room.clear();
    for (const DeviceBatch& batch : batches_) {
      Handle handle;
      CudaGraph graph(stream_.get(), [&] {
        const Received received = exchange_.dispatch(batch.input, dispatch_options_);
        handle = received.handle();
        combine_from_its_place(received);
      });
      replays_.push_back({std::move(handle), std::move(graph)});
    }
  }

  void combine_from_its_place(const Received& received) {
    if (!has_expert_rows(layout_)) {
      exchange_.combine(view_of(y_.data(), received), received.handle(), combine_options_);
      return;
    }
    const TensorView pulled = exchange_.expert_rows(received.handle(), expert_dtype(), settings_.hidden_size, stream_.get());
    exchange_.combine(pulled, received.handle(), combine_options_);
  }

  template <class Body>
  void time(const char* series, bool enqueued_ahead, Body&& body) {
    cuda_check(cudaStreamSynchronize(stream_.get()), "between measurements");
    world_.barrier();
    if (enqueued_ahead) gate_.close();
    barrier_.dispatch(empty_, {.layout = Layout::rank_slots, .sizing = Sizing::capacity, .stream = stream_.get()});
    cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
    body();
    cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
    gate_.open();
    if (baseline_) baseline_->wait(stream_.get());  // has a deadline
    cuda_check(cudaEventSynchronize(end_.get()), "waiting for a measurement");
    exchange_.check();
    float milliseconds = 0;
    cuda_check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
    samples_[series].push_back(1e3 * milliseconds);
    add_phases(series, exchange_.take_spans(), samples_);
  }

  // Exact shapes differ between input sets. What the rows hold does not matter, as long as it is finite.
  void make_room(const Received& received) {
    const auto bytes = static_cast<std::size_t>(received.rows().num_elements() * size_of(expert_dtype()));
    if (bytes <= y_.bytes()) return;
    cuda_check(cudaStreamSynchronize(stream_.get()), "before more room for expert rows");
    y_ = value_or_throw(make_device_buffer(device_, bytes));
    constexpr int kAnyFinite = 0x3c;
    cuda_check(cudaMemset(y_.data(), kAnyFinite, bytes), "filling expert rows");
  }

  void iterate(int set) {
    Received received;
    const bool ahead = is_enqueued_ahead();
    time("dispatch", ahead, [&] { received = exchange_.dispatch(batches_[set].input, dispatch_options_); });
    note_bytes(set, received);
    make_room(received);
    time("combine_copy", ahead, [&] { exchange_.combine(view_of(y_.data(), received), received.handle(), combine_options_); });
    if (has_expert_rows(layout_)) {
      const TensorView pulled = exchange_.expert_rows(received.handle(), expert_dtype(), settings_.hidden_size, stream_.get());
      time("combine", ahead, [&] { exchange_.combine(pulled, received.handle(), combine_options_); });
    }
    if (!replays_.empty()) time("graph", ahead, [&] { replays_[static_cast<std::size_t>(set)].graph.launch(); });
    if (baseline_) iterate_baseline(set);
  }

  // Its dispatch waits for counts on the host in the midst of the call, its combine does not.
  void iterate_baseline(int set) {
    Received received;
    time("baseline_dispatch", false, [&] { received = baseline_->dispatch(baseline_batches_[set].input, stream_.get()); });
    const ConstTensorView y = view_of(baseline_y_.data(), received);
    time("baseline_combine", is_enqueued_ahead(), [&] { baseline_->combine(y, combine_options_.out, stream_.get()); });
  }

  void note_bytes(int set, const Received& received) {
    if (sent_.contains(set)) return;
    std::vector<std::int32_t> counts(static_cast<std::size_t>(world_.size()));
    cuda_check(cudaMemcpy(counts.data(), received.sent_counts().data, counts.size() * 4, cudaMemcpyDeviceToHost), "copying counts");
    std::int64_t all = 0;
    for (const std::int32_t count : counts) all += count;
    sent_[set] = {all, all - counts[static_cast<std::size_t>(world_.rank())]};
  }

  json report() {
    json result = summarise(gather(world_, {{"samples", samples_}, {"sent", sent_}}));
    const Workload workload = workload_of(settings_, 0);
    cudaDeviceProp properties{};
    cuda_check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
    int driver = 0, devices = 0;
    cuda_check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    result["dispatch_row_bytes"] = workload.row_bytes() + workload.scale_columns() * 4;
    result["combine_row_bytes"] = combine_row_bytes();
    if (baseline_) result["baseline_library"] = fmt::format("NCCL {}", baseline_->library_version());
    result["transport"] = name(exchange_.transport());
    result["gpu"] = {{"name", properties.name},
                     {"count", std::min(devices, world_.size())},
                     {"driver_cuda", driver},
                     {"runtime_cuda", CUDART_VERSION},
                     {"sm_budget", exchange_.options().sm_budget}};
    return result;
  }

  const World& world_;
  const Settings settings_;
  Progress& progress_;
  const int device_;
  const Placement placement_;
  const Layout layout_;
  CudaStream stream_;
  StreamGate gate_;
  TimedEvent begin_, end_;
  Exchange barrier_;
  Exchange exchange_;
  std::optional<CudaCollectiveExchange> baseline_;
  std::int64_t no_ids_ = 0;
  // No tokens at all.
  const DispatchInput empty_{.rows = {nullptr, Dtype::uint8, {0, 16}}, .topk_ids = {&no_ids_, Dtype::int64, {0, 1}}};
  std::vector<DeviceBatch> batches_, baseline_batches_;
  std::vector<Replay> replays_;
  DispatchOptions dispatch_options_;
  CombineOptions combine_options_;
  DeviceBuffer out_, y_, baseline_y_;
  std::vector<std::byte> sums_;
  Samples samples_;
  SentRows sent_;
};

}  // namespace

json bench_cuda_role(const World& world, const json& settings, Progress& progress) {
  return CudaBenchRank(world, settings_from_json(settings["settings"]), settings["with_baseline"], progress).run();
}

}  // namespace tokenyard::cli
