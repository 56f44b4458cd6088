// One rank of the demo: batch after batch through the layer, every row checked.

#include <fmt/core.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "check.h"
#include "demo_model.h"
#include "ranks.h"
#include "tokenyard/layer.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double now_us() { return std::chrono::duration<double, std::micro>(Clock::now().time_since_epoch()).count(); }

std::shared_ptr<ExpertGroup> make_group(const World& world, const DemoSettings& settings, const DemoModel& model) {
  return std::make_shared<ExpertGroup>(world, solve_parallel({.device_count = world.size(), .ep = world.size(), .mlp_tp = 1}),
                                       ExpertGroupOptions{.num_experts = model.num_experts(),
                                                          .top_k = model.top_k(),
                                                          .hidden_size = model.hidden_size(),
                                                          .dtype = model.dtype(),
                                                          .max_tokens_per_rank = settings.batch_tokens,
                                                          .num_threads = settings.threads,
                                                          .trace = true,
                                                          .timeout_ms = settings.timeout_ms});
}

class DemoRank {
 public:
  DemoRank(const World& world, const DemoSettings& settings, std::string text, Progress& progress)
      : world_(world),
        settings_(settings),
        text_(std::move(text)),
        progress_(progress),
        model_(settings),
        group_(make_group(world, settings, model_)),
        placement_(group_->placement(model_.num_experts())),
        layer_(group_, model_.weights(placement_.local_experts(world.rank())), {.gate = model_.gate()}),
        load_(placement_.local_experts(world.rank()).size(), 0) {}

  json run() {
    const std::int64_t per_batch = settings_.batch_tokens * world_.size();
    const std::int64_t batches = (std::ssize(text_) + per_batch - 1) / per_batch;
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(batches);
    for (std::int64_t batch = 0; batch < batches; ++batch) {
      // The middle one is drawn: the first one still warms caches, the last one may be short.
      run_batch(batch * per_batch, batch == batches / 2);
      if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
    }
    const json mine = {{"load", load_},
                       {"rows_received", rows_received_},
                       {"rows_sent", rows_sent_},
                       {"tokens", tokens_},
                       {"link_bytes", alone() ? std::vector<std::int64_t>{0} : group_->exchange()->link_bytes()},
                       {"phases_us", phases_},
                       {"timeline", timeline_},
                       {"rows_checked", rows_checked_},
                       {"outputs_checked", outputs_checked_},
                       {"largest_error", largest_error_},
                       {"fault", fault_}};
    return {{"ranks", gather(world_, mine)}};
  }

 private:
  // This rank's part of the batch that begins at byte `begin` of the text: consecutive bytes, maybe none.
  std::int64_t first_token(std::int64_t begin, int rank) const {
    return std::min(begin + rank * settings_.batch_tokens, std::ssize(text_));
  }

  template <class Body>
  void phase(const char* name, Body&& body) {
    const double begin = now_us();
    body();
    const double end = now_us();
    phases_[name].push_back(end - begin);
    if (drawn_) timeline_.push_back({{"phase", name}, {"begin_us", begin}, {"end_us", end}, {"inner", false}});
  }

  // One rank holds all experts, so nothing is exchanged.
  bool alone() const { return group_->exchange() == nullptr; }

  void run_batch(std::int64_t begin, bool drawn) {
    drawn_ = drawn;
    const std::int64_t first = first_token(begin, world_.rank());
    const std::int64_t count = first_token(begin, world_.rank() + 1) - first;
    std::vector<std::byte> rows(static_cast<std::size_t>(count * model_.row_bytes())), sums(rows.size());
    const TensorView out(sums.data(), model_.dtype(), {count, model_.hidden_size()});
    group_->take_spans();
    if (!alone()) group_->exchange()->take_spans();
    world_.barrier();  // so that no phase shows how long the others' checks take
    phase("embed", [&] {
      for (std::int64_t t = 0; t < count; ++t) model_.embed(text_, first + t, rows.data() + t * model_.row_bytes());
    });
    layer_.forward({rows.data(), model_.dtype(), {count, model_.hidden_size()}}, out, {}, &step_);
    note_batch(count);
    phase("check", [&] {
      if (!alone()) check_received(step_.received(), begin);
      check_outputs(rows, step_.routing(), out);
    });
  }

  void note_batch(std::int64_t count) {
    tokens_ += count;
    for (const PhaseSpan& span : group_->take_spans()) {
      phases_[span.phase].push_back(static_cast<double>(span.end_ns - span.begin_ns) / 1e3);
      draw(span, false);
    }
    if (alone()) {
      for (std::size_t l = 0; l < load_.size(); ++l) load_[l] += step_.routing().load[l];
      return;
    }
    const Received& received = step_.received();
    for (std::size_t l = 0; l < load_.size(); ++l) load_[l] += received.expert_counts().as<std::int32_t>()[l];
    for (int rank = 0; rank < world_.size(); ++rank) {
      rows_received_ += received.rank_counts().as<std::int32_t>()[rank];
      rows_sent_ += received.sent_counts().as<std::int32_t>()[rank];
    }
    for (const PhaseSpan& span : group_->exchange()->take_spans()) draw(span, true);
  }

  void draw(const PhaseSpan& span, bool inner) {
    if (!drawn_) return;
    timeline_.push_back({{"phase", span.phase},
                         {"begin_us", static_cast<double>(span.begin_ns) / 1e3},
                         {"end_us", static_cast<double>(span.end_ns) / 1e3},
                         {"inner", inner}});
  }

  // Every row that arrived against the text itself, bit for bit.
  void check_received(const Received& received, std::int64_t begin) {
    std::vector<std::byte> expected(static_cast<std::size_t>(model_.row_bytes()));
    for (std::int64_t slot = 0; slot < received.num_rows(); ++slot) {
      const int source = received.source_rank().as<std::int32_t>()[slot];
      const int token = received.source_token().as<std::int32_t>()[slot];
      model_.embed(text_, first_token(begin, source) + token, expected.data());
      const bool same = std::memcmp(expected.data(), received.rows().row(slot), expected.size()) == 0;
      if (!same) note_fault(fmt::format("row {} from rank {}, token {} differs from the text's embedding", slot, source, token));
      ++rows_checked_;
    }
  }

  // Every output against the sum over its token's experts, computed here alone.
  void check_outputs(const std::vector<std::byte>& rows, const Routing& routing, const ConstTensorView& out) {
    const double tolerance = Checker::tolerance(model_.dtype());
    std::vector<float> values(static_cast<std::size_t>(model_.hidden_size()));
    for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
      std::vector<double> sums(values.size(), 0), magnitudes(values.size(), 0);
      for (std::int64_t at = t * model_.top_k(); at < (t + 1) * model_.top_k(); ++at) {
        model_.add_expert(static_cast<int>(routing.topk_ids[at]), rows.data() + t * model_.row_bytes(), routing.topk_weights[at], sums,
                          magnitudes);
      }
      decode(model_.dtype(), out.row(t), values);
      for (std::size_t h = 0; h < values.size(); ++h) check_element(t, values[h], sums[h], magnitudes[h], tolerance);
      ++outputs_checked_;
    }
  }

  void check_element(std::int64_t token, double seen, double expected, double magnitude, double tolerance) {
    const double error = std::abs(seen - expected);
    if (magnitude > 0) largest_error_ = std::max(largest_error_, error / magnitude);
    if (error <= tolerance * magnitude) return;
    note_fault(fmt::format("output of token {} of rank {}: expected {}, seen {}", token, world_.rank(), expected, seen));
  }

  void note_fault(std::string text) {
    if (fault_.empty()) fault_ = std::move(text);
  }

  const World& world_;
  const DemoSettings settings_;
  const std::string text_;
  Progress& progress_;
  const DemoModel model_;
  const std::shared_ptr<ExpertGroup> group_;
  const Placement placement_;
  MoeLayer layer_;
  MoeActivations step_;             // of the batch: its routing, and the rows that arrived
  std::vector<std::int64_t> load_;  // rows per local expert
  std::int64_t rows_received_ = 0, rows_sent_ = 0, tokens_ = 0;
  std::int64_t rows_checked_ = 0, outputs_checked_ = 0;
  double largest_error_ = 0;
  std::string fault_;  // the first
  bool drawn_ = false;
  std::map<std::string, std::vector<double>> phases_;
  json timeline_ = json::array();
};

}  // namespace

json demo_role(const World& world, const json& settings, Progress& progress) {
  const auto& text = settings["text"].get_binary();
  return DemoRank(world, demo_settings_from_json(settings["settings"]), std::string(text.begin(), text.end()), progress).run();
}

}  // namespace tokenyard::cli
