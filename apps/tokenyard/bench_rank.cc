// One rank of a benchmark: checks the results first, then measures.

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench_plain.h"
#include "bench_samples.h"
#include "check.h"
#include "core/thread_pool.h"
#include "core/usage.h"
#include "ranks.h"
#include "settings.h"
#include "tokenyard/collective.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

// An exchange with its placement, as one side of the comparison.
struct Side {
  Side(const World& world, const ExchangeOptions& options, const Placement& placement, const DispatchOptions& dispatch)
      : exchange(world, options), dispatch_options(dispatch) {
    exchange.add(placement);
  }
  Exchange exchange;
  DispatchOptions dispatch_options;
};

ExchangeOptions baseline_options(const Settings& settings, const Placement& placement) {
  ExchangeOptions options = exchange_options(settings, placement);
  options.transport = Transport::mpi;
  options.expert_rows = false;  // MPI sends from any memory
  return options;
}

std::int64_t sum(const ConstTensorView& counts) {
  std::int64_t total = 0;
  for (std::int64_t r = 0; r < counts.num_elements(); ++r) total += counts.as<std::int32_t>()[r];
  return total;
}

class BenchRank {
 public:
  BenchRank(const World& world, const Settings& settings, bool with_baseline, Progress& progress)
      : world_(world),
        settings_(settings),
        placement_(placement_of(settings)),
        barrier_(Collectives::create(world, {.timeout_ms = settings.timeout_ms})),
        progress_(progress),
        pool_(settings.threads),
        direct_(world, exchange_options(settings, placement_), placement_, dispatch_options(settings)),
        layout_(parse_layout(settings.layout)) {
    if (with_baseline) baseline_.emplace(world, baseline_options(settings, placement_), placement_, dispatch_options(settings));
    if (with_baseline && PlainExchange::serves(layout_, workload_of(settings, 0).scale_columns())) {
      plain_.emplace(world, placement_, PlainExchange::Shape{settings.tokens, combine_row_bytes(), layout_, settings.timeout_ms}, pool_);
    }
    make_inputs(kDirect);
    if (baseline_) make_inputs(kTuned);
    if (plain_) make_inputs(kPlain);
    combine_options_.weighting = weighting_of(layout_);
    out_.resize(static_cast<std::size_t>(settings.tokens * combine_row_bytes()));
    combine_options_.out = {out_.data(), workload_of(settings, 0).expert_dtype(), {settings.tokens, settings.hidden_size}};
  }

  json run() {
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(settings_.warmup + settings_.iterations);
    check(direct_, "the exchange");
    if (baseline_) check(*baseline_, "the MPI baseline");
    if (plain_) check_plain();
    for (int i = 0; i < settings_.warmup + settings_.iterations; ++i) {
      if (i == settings_.warmup) samples_.clear();
      iterate(i % kInputSets);
      if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
    }
    return report();
  }

 private:
  void make_inputs(System system) {
    for (int set = 0; set < kInputSets; ++set) inputs_[system].push_back(make_batch(workload_of(settings_, set), world_.rank()));
  }

  std::int64_t combine_row_bytes() const { return settings_.hidden_size * size_of(workload_of(settings_, 0).expert_dtype()); }

  // Dispatch and combine of the first input set against what the seed says; all ranks fail together.
  void check(Side& side, const char* what) {
    const Workload workload = workload_of(settings_, 0);
    const Checker checker(workload, placement_, world_.rank());
    std::vector<std::string> faults;
    Received received = side.exchange.dispatch(inputs_[kDirect][0].input, side.dispatch_options);
    const auto note = [&](const char* call, const std::optional<Difference>& found) {
      if (found) faults.push_back(fmt::format("{} {}: {}", what, call, found->message()));
    };
    note("dispatches wrongly", checker.dispatched(received));
    const std::vector<std::byte> y = expert_output(workload, received, world_.rank());
    side.exchange.combine(view_of(y.data(), received), received.handle(), combine_options_);
    note("combines wrongly", checker.combined(combine_options_.out, layout_, combine_options_.weighting));
    if (side.exchange.options().expert_rows) {
      const TensorView pulled = side.exchange.expert_rows(received.handle(), combine_options_.out.dtype, settings_.hidden_size);
      std::memcpy(pulled.data, y.data(), y.size());
      side.exchange.combine(pulled, received.handle(), combine_options_);
      note("combines wrongly from expert_rows", checker.combined(combine_options_.out, layout_, combine_options_.weighting));
    }
    fail_together(faults);
  }

  void fail_together(const std::vector<std::string>& faults) const {
    for (const json& rank : gather(world_, faults)) {
      if (!rank.empty()) throw Error(rank[0].get<std::string>());
    }
  }

  // The same rows as the exchange, and the same sums from the same results.
  void check_plain() {
    const Workload workload = workload_of(settings_, 0);
    const Checker checker(workload, placement_, world_.rank());
    std::vector<std::string> faults;
    const Received received = direct_.exchange.dispatch(inputs_[kDirect][0].input, direct_.dispatch_options);
    plain_->dispatch(inputs_[kPlain][0].input);
    if (plain_->num_rows() != received.num_rows()) faults.emplace_back("the plain MPI baseline receives another number of rows");
    const std::vector<std::byte> y = expert_output(workload, received, world_.rank());
    plain_->combine(y.data(), combine_options_.out.dtype, combine_options_.out);
    if (const auto found = checker.combined(combine_options_.out, layout_, combine_options_.weighting)) {
      faults.push_back(fmt::format("the plain MPI baseline combines wrongly: {}", found->message()));
    }
    const auto* const rows = static_cast<const std::byte*>(received.rows().data);
    const std::int64_t slots = received.rows().num_elements() / settings_.hidden_size;
    for (std::int64_t at = 0; faults.empty() && at < slots; ++at) {
      if (layout_ == Layout::rank_slots && received.present().as<std::uint8_t>()[at] == 0) continue;
      const std::int64_t byte = at * combine_row_bytes();
      if (std::memcmp(plain_->rows() + byte, rows + byte, static_cast<std::size_t>(combine_row_bytes())) == 0) continue;
      faults.push_back(fmt::format("the plain MPI baseline dispatches row {} wrongly", at));
    }
    fail_together(faults);
  }

  ConstTensorView view_of(const std::byte* y, const Received& received) const {
    ConstTensorView view = received.rows();  // dense, of the same shape
    view.data = y;
    view.dtype = combine_options_.out.dtype;
    return view;
  }

  template <class Body>
  void time(const char* series, Body&& body) {
    barrier_->barrier();
    const Clock::time_point start = Clock::now();
    body();
    samples_[series].push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    // Where ranks share a core, what this one does next would be part of the time of one that has yet to notice its end.
    barrier_->barrier();
  }

  template <class Body>
  void time_traced(const char* series, Body&& body) {
    time(series, body);
    add_phases(series, direct_.exchange.take_spans(), samples_);
  }

  // The expert that returns its rows: untimed, but it leaves the caches as real experts would.
  void copy_rows(void* to, const Received& received) const {
    const std::int64_t bytes = received.rows().num_elements() * size_of(combine_options_.out.dtype);
    if (combine_options_.out.dtype == received.rows().dtype) {
      std::memcpy(to, received.rows().data, static_cast<std::size_t>(bytes));
    } else {
      std::memset(to, 0x3e, static_cast<std::size_t>(bytes));  // fp8 rows, bfloat16 results: any finite numbers
    }
  }

  void iterate(int set) {
    const DispatchInput& input = inputs_[kDirect][set].input;
    Received received;
    time_traced("dispatch", [&] { received = direct_.exchange.dispatch(input, direct_.dispatch_options); });
    const std::int64_t rows = sum(received.sent_counts());
    y_.resize(std::max(y_.size(), static_cast<std::size_t>(received.rows().num_elements() * size_of(combine_options_.out.dtype))));
    copy_rows(y_.data(), received);
    time_traced("combine_copy", [&] { direct_.exchange.combine(view_of(y_.data(), received), received.handle(), combine_options_); });
    if (has_expert_rows(layout_)) {
      const TensorView pulled = direct_.exchange.expert_rows(received.handle(), combine_options_.out.dtype, settings_.hidden_size);
      copy_rows(pulled.data, received);
      time_traced("combine", [&] { direct_.exchange.combine(pulled, received.handle(), combine_options_); });
    }
    note_bytes(set, received);
    received.release();
    if (baseline_) iterate_baseline(set);
    time_memcpy("memcpy_dispatch", rows * (workload_of(settings_, 0).row_bytes() + workload_of(settings_, 0).scale_columns() * 4));
    time_memcpy("memcpy_combine", rows * combine_row_bytes());
  }

  void iterate_baseline(int set) {
    Received received;
    const DispatchInput& input = inputs_[kTuned][set].input;
    time("baseline_dispatch", [&] { received = baseline_->exchange.dispatch(input, baseline_->dispatch_options); });
    y_.resize(std::max(y_.size(), static_cast<std::size_t>(received.rows().num_elements() * size_of(combine_options_.out.dtype))));
    copy_rows(y_.data(), received);
    time("baseline_combine", [&] { baseline_->exchange.combine(view_of(y_.data(), received), received.handle(), combine_options_); });
    if (!plain_) return;
    time("plain_dispatch", [&] { plain_->dispatch(inputs_[kPlain][set].input); });
    std::memcpy(y_.data(), plain_->rows(), static_cast<std::size_t>(received.rows().num_elements() * size_of(received.rows().dtype)));
    time("plain_combine", [&] { plain_->combine(y_.data(), combine_options_.out.dtype, combine_options_.out); });
  }

  // The limit: this rank copies as many bytes as it sends, from one buffer to another.
  void time_memcpy(const char* series, std::int64_t bytes) {
    copy_from_.resize(std::max(copy_from_.size(), static_cast<std::size_t>(bytes)), std::byte{1});
    copy_to_.resize(copy_from_.size());
    time(series, [&] {
      pool_.parallel_for(bytes, 1 << 16, [&](std::int64_t begin, std::int64_t end, int) {
        std::memcpy(copy_to_.data() + begin, copy_from_.data() + begin, static_cast<std::size_t>(end - begin));
      });
    });
  }

  void note_bytes(int set, const Received& received) {
    if (sent_.contains(set)) return;
    const std::int64_t all = sum(received.sent_counts());
    sent_[set] = {all, all - received.sent_counts().as<std::int32_t>()[world_.rank()]};
  }

  json report() {
    json result = summarise(gather(world_, {{"samples", samples_}, {"sent", sent_}}));
    const Workload workload = workload_of(settings_, 0);
    result["dispatch_row_bytes"] = workload.row_bytes() + workload.scale_columns() * 4;
    result["combine_row_bytes"] = combine_row_bytes();
    result["transport"] = name(direct_.exchange.transport());
    return result;
  }

  const World& world_;
  const Settings settings_;
  const Placement placement_;
  const std::unique_ptr<Collectives> barrier_;
  Progress& progress_;
  ThreadPool pool_;
  Side direct_;
  std::optional<Side> baseline_;
  std::optional<PlainExchange> plain_;
  const Layout layout_;
  std::array<std::vector<Batch>, kSystems> inputs_;
  CombineOptions combine_options_;
  std::vector<std::byte> out_, y_, copy_from_, copy_to_;
  Samples samples_;
  SentRows sent_;
};

}  // namespace

json bench_role(const World& world, const json& settings, Progress& progress) {
  return BenchRank(world, settings_from_json(settings["settings"]), settings["with_baseline"], progress).run();
}

}  // namespace tokenyard::cli
