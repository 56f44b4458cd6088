// One rank of `verify`: every case with an exchange of its own, then what has its own shape of check.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "check.h"
#include "ranks.h"
#include "tokenyard/collective.h"
#include "verify.h"

namespace tokenyard::cli {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(VerifySettings, ranks, random, seed, timeout_ms, dump, self_test, transport, lose_rank)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(VerifyLine, what, status, detail, digest)

namespace {

using nlohmann::json;

// FNV-1a.
std::uint64_t digest_of(const std::vector<std::byte>& bytes) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const std::byte byte : bytes) hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3U;
  return hash;
}

class VerifyRank {
 public:
  VerifyRank(const World& world, const VerifySettings& settings, Progress& progress)
      : world_(world), settings_(settings), progress_(progress) {}

  json run() {
    const std::vector<VerifyCase> cases = verify_cases(settings_.ranks, settings_.random, static_cast<std::uint64_t>(settings_.seed));
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(cases.size() + 5);
    for (const VerifyCase& one : cases) line(one.what, [&] { return run_case(one); });
    line("two dispatches alive at once, one dispatched again along its handle", [&] { return leases_and_handles(); });
    line("gradients: <combine(y), g> = <y, combine_backward(g)>", [&] { return gradients(); });
    line("rows quantised inside dispatch are those of quantise()", [&] { return quantised_dispatch(); });
    line("one row more than the capacity is an overflow on every rank, and clear() ends it", [&] { return overflow(); });
    line("collectives: all_gather_v, reduce_scatter_v, all_to_all_v", [&] { return collectives(); });
    return lines_;
  }

 private:
  // An empty reason is success. The digest is that of all ranks' sums.
  struct Outcome {
    std::string reason;
    std::uint64_t digest = 0;
  };

  // What a check found; the first is told. A rank that found something goes on as if it had not: its peers make the same calls, and
  // would wait for it, or fail without it, where nothing is wrong with them.
  class Findings {
   public:
    explicit Findings(const VerifyRank& rank) : rank_(rank) {}
    void add(const std::optional<Difference>& found) {
      if (found) add(rank_.text_of(*found));
    }
    void add(std::string reason) {
      if (reason_.empty()) reason_ = std::move(reason);
    }
    Outcome outcome(std::uint64_t digest = 0) const { return {reason_, digest}; }

   private:
    const VerifyRank& rank_;
    std::string reason_;
  };

  // All ranks agree on the line; the lowest rank's failure is shown.
  void line(const std::string& what, const std::function<Outcome()>& check) {
    json mine = {{"status", "ok"}, {"reason", ""}, {"digest", 0}};
    try {
      const Outcome outcome = check();
      mine = {{"status", outcome.reason.empty() ? "ok" : "FAIL"}, {"reason", outcome.reason}, {"digest", outcome.digest}};
    } catch (const Error& failure) {
      mine = {{"status", "FAIL"}, {"reason", failure.what()}, {"digest", 0}};
    }
    VerifyLine result{what, "ok", "", 0};
    for (const json& rank : gather(world_, mine)) {
      result.digest = result.digest * 31 + rank["digest"].get<std::uint64_t>();
      if (rank["status"] == "ok" || result.status == "FAIL") continue;
      result.status = "FAIL";
      result.detail = rank["reason"];
    }
    lines_.push_back(result);
    if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
  }

  std::string text_of(const Difference& difference) const {
    if (settings_.dump) return difference.message();
    return fmt::format("{} of rank {}, slot {} differs; --dump shows both values", difference.what, difference.rank, difference.slot);
  }

  ExchangeOptions options_of(const VerifyCase& one, const Placement& placement) const {
    const Workload& workload = one.workload;
    ExchangeOptions options;
    options.max_tokens_per_rank = std::max<std::int64_t>(1, *std::max_element(workload.tokens.begin(), workload.tokens.end()));
    options.max_row_bytes = workload.hidden_size * std::max(size_of(workload.dtype), size_of(workload.expert_dtype()));
    options.max_scale_bytes = workload.scale_columns() * size_of(Dtype::float32);
    options.top_k = workload.top_k();
    options.max_local_experts = std::max(1, placement.max_local_experts());
    options.max_fanout = placement.max_fanout();
    options.expert_rows = pulls(one);
    options.mode = one.mode;
    options.transport = parse_transport(settings_.transport);
    options.num_threads = one.threads;
    options.timeout_ms = settings_.timeout_ms;
    return options;
  }

  // Whether combine is also checked with rows that peers pull from.
  static bool pulls(const VerifyCase& one) {
    return one.dispatch.layout == Layout::rank_slots || (one.dispatch.layout == Layout::token_major && one.mode == Mode::throughput);
  }

  static ConstTensorView view_of(const std::vector<std::byte>& y, const Received& received, Dtype dtype) {
    ConstTensorView view = received.rows();
    view.data = y.data();
    view.dtype = dtype;
    return view;
  }

  Outcome run_case(const VerifyCase& one) {
    const Workload& workload = one.workload;
    const Placement placement = placement_of(one);
    Exchange exchange(world_, options_of(one, placement));
    exchange.add(placement);
    const Batch batch = make_batch(workload, world_.rank());
    Received received = exchange.dispatch(batch.input, one.dispatch);
    if (settings_.self_test && received.num_rows() > 0) static_cast<std::byte*>(received.rows().data)[0] ^= std::byte{1};
    const Checker checker(workload, placement, world_.rank());
    Findings findings(*this);
    findings.add(checker.dispatched(received));

    const std::vector<std::byte> y = expert_output(workload, received, world_.rank());
    std::vector<std::byte> out(batch.rows.size() / static_cast<std::size_t>(size_of(workload.dtype)) *
                               static_cast<std::size_t>(size_of(workload.expert_dtype())));
    CombineOptions combine;
    combine.weighting = one.weighting;
    combine.order = one.order;
    if (one.weighting == Weighting::at_source) combine.source_weights = batch.input.topk_weights;
    combine.out = {out.data(), workload.expert_dtype(), {workload.tokens[world_.rank()], workload.hidden_size}};
    exchange.combine(view_of(y, received, workload.expert_dtype()), received.handle(), combine);
    findings.add(checker.combined(combine.out, one.dispatch.layout, one.weighting));
    const std::uint64_t digest = digest_of(out);
    if (!pulls(one)) return findings.outcome(digest);

    const TensorView pulled = exchange.expert_rows(received.handle(), workload.expert_dtype(), workload.hidden_size);
    if (!y.empty()) std::memcpy(pulled.data, y.data(), y.size());
    std::fill(out.begin(), out.end(), std::byte{0xff});
    exchange.combine(pulled, received.handle(), combine);
    if (digest_of(out) != digest) findings.add("combine from expert_rows() differs from combine from other memory");
    return findings.outcome(digest);
  }

  // A small case for the checks below.
  VerifyCase small_case(Dtype dtype) const {
    VerifyCase one = verify_cases(settings_.ranks, 0, static_cast<std::uint64_t>(settings_.seed)).front();
    one.workload.dtype = dtype;
    return one;
  }

  Outcome leases_and_handles() {
    const VerifyCase first = small_case(Dtype::bfloat16);
    VerifyCase second = first;
    second.workload.seed += 1;
    const Placement placement = placement_of(first);
    Exchange exchange(world_, options_of(first, placement));
    exchange.add(placement);
    const Batch batch = make_batch(first.workload, world_.rank());
    const Batch other = make_batch(second.workload, world_.rank());
    Received received = exchange.dispatch(batch.input, first.dispatch);
    const Received kept = exchange.dispatch(other.input, second.dispatch);
    const Checker checker(first.workload, placement, world_.rank());
    Findings findings(*this);
    findings.add(checker.dispatched(received));
    findings.add(Checker(second.workload, placement, world_.rank()).dispatched(kept));
    const Handle handle = received.handle();
    received.release();
    const Received again = exchange.dispatch({.rows = batch.input.rows}, handle, first.dispatch);
    findings.add(checker.dispatched(again));
    return findings.outcome();
  }

  static double dot(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * b[i];
    return sum;
  }

  static std::vector<float> values_of(const void* data, Dtype dtype, std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    decode(dtype, static_cast<const std::byte*>(data), values);
    return values;
  }

  Outcome gradients() {
    VerifyCase one = small_case(Dtype::float32);
    one.dispatch.layout = Layout::expert_major;
    const Placement placement = placement_of(one);
    Exchange exchange(world_, options_of(one, placement));
    exchange.add(placement);
    const Batch batch = make_batch(one.workload, world_.rank());
    Workload gradient_workload = one.workload;
    gradient_workload.seed += 2;
    const Batch gradient = make_batch(gradient_workload, world_.rank());
    const Received received = exchange.dispatch(batch.input, one.dispatch);
    const std::vector<std::byte> y = expert_output(one.workload, received, world_.rank());
    const ConstTensorView y_view = view_of(y, received, Dtype::float32);
    const CombineOptions options{.weighting = Weighting::at_expert};
    const Combined combined = exchange.combine(y_view, received.handle(), options);
    const CombineGradient backward = exchange.combine_backward(received.handle(), gradient.input.rows, y_view, options);
    const std::int64_t elements = one.workload.tokens[world_.rank()] * one.workload.hidden_size;
    const double forward_product =
        dot(values_of(combined.out.data, Dtype::float32, elements), values_of(gradient.rows.data(), Dtype::float32, elements));
    const std::int64_t received_elements = received.rows().num_elements();
    const double backward_product = dot(values_of(y.data(), Dtype::float32, received_elements),
                                        values_of(backward.rows.rows().data, Dtype::float32, received_elements));
    double left = 0, right = 0;
    for (const json& rank : gather(world_, {forward_product, backward_product})) {
      left += rank[0].get<double>();
      right += rank[1].get<double>();
    }
    // Sums of tens of thousands of float32 products of either sign.
    if (std::abs(left - right) <= 1e-4 * std::max({1.0, std::abs(left), std::abs(right)})) return {};
    return {fmt::format("{} and {}", left, right)};
  }

  Outcome quantised_dispatch() {
    VerifyCase one = small_case(Dtype::bfloat16);
    one.workload.hidden_size = 256;
    const Placement placement = placement_of(one);
    ExchangeOptions options = options_of(one, placement);
    const std::int64_t columns = scale_columns(one.workload.hidden_size, ScaleFormat::float32);
    options.max_scale_bytes = columns * size_of(Dtype::float32);
    Exchange exchange(world_, options);
    exchange.add(placement);
    const Batch batch = make_batch(one.workload, world_.rank());
    one.dispatch.quantise = ScaleFormat::float32;
    const Received received = exchange.dispatch(batch.input, one.dispatch);
    for (std::int64_t slot = 0; slot < received.num_rows(); ++slot) {
      std::vector<std::byte> row(static_cast<std::size_t>(one.workload.row_bytes()));
      fill_row(one.workload, received.source_rank().as<std::int32_t>()[slot], received.source_token().as<std::int32_t>()[slot], row.data());
      std::vector<std::uint8_t> q(static_cast<std::size_t>(one.workload.hidden_size));
      std::vector<float> scales(static_cast<std::size_t>(columns));
      quantise({row.data(), Dtype::bfloat16, {1, one.workload.hidden_size}}, {q.data(), Dtype::float8_e4m3, {1, one.workload.hidden_size}},
               {scales.data(), Dtype::float32, {1, columns}}, ScaleFormat::float32);
      const bool same = std::memcmp(q.data(), received.rows().row(slot), q.size()) == 0 &&
                        std::memcmp(scales.data(), received.scales().row(slot), scales.size() * sizeof(float)) == 0;
      if (!same) return {fmt::format("row {} of rank {} differs", slot, world_.rank())};
    }
    return {};
  }

  // Every token of every rank goes to rank 0, which has room for one row less.
  Outcome overflow() {
    VerifyCase one = small_case(Dtype::bfloat16);
    one.workload.pattern = IdPattern::one_expert;
    const Placement placement = placement_of(one);
    ExchangeOptions options = options_of(one, placement);
    std::int64_t rows = 0;
    for (const std::int64_t tokens : one.workload.tokens) rows += tokens;
    options.receive_rows = rows - 1;
    Exchange exchange(world_, options);
    exchange.add(placement);
    const Batch batch = make_batch(one.workload, world_.rank());
    try {
      exchange.dispatch(batch.input, one.dispatch);
      return {"no error"};
    } catch (const TransportError& error) {
      if (error.failure().kind != FailureKind::overflow) return {error.what()};
    }
    exchange.clear();
    Workload fitting = one.workload;
    for (std::int64_t& tokens : fitting.tokens) tokens -= 1;
    const Batch smaller = make_batch(fitting, world_.rank());
    const Received received = exchange.dispatch(smaller.input, one.dispatch);
    if (const auto found = Checker(fitting, placement, world_.rank()).dispatched(received)) return {text_of(*found)};
    return {};
  }

  // Row r of rank s is the number 100 s + r; counts differ between ranks, one is zero.
  Outcome collectives() {
    const int size = world_.size();
    const auto group = Collectives::create(world_, {.transport = parse_transport(settings_.transport), .timeout_ms = settings_.timeout_ms});
    std::vector<std::int64_t> counts;
    std::int64_t total = 0;
    for (int rank = 0; rank < size; ++rank) total += counts.emplace_back((rank + 1) % 3);
    const std::int64_t mine = counts[world_.rank()];
    std::vector<float> in, expected;
    for (int rank = 0; rank < size; ++rank) {
      for (std::int64_t r = 0; r < counts[rank]; ++r) {
        expected.push_back(static_cast<float>(std::int64_t{100} * rank + r));
        if (rank == world_.rank()) in.push_back(expected.back());
      }
    }
    std::vector<float> all(static_cast<std::size_t>(total));
    group->all_gather_v({in.data(), Dtype::float32, {mine, 1}}, counts, {all.data(), Dtype::float32, {total, 1}});
    Findings findings(*this);
    if (all != expected) findings.add("all_gather_v");

    std::vector<float> sums(static_cast<std::size_t>(mine));
    group->reduce_scatter_v({all.data(), Dtype::float32, {total, 1}}, counts, {sums.data(), Dtype::float32, {mine, 1}});
    for (std::int64_t r = 0; r < mine; ++r) {
      if (sums[r] != in[r] * static_cast<float>(size)) findings.add("reduce_scatter_v");
    }

    // To rank d go d % 3 rows of the sender's number.
    std::vector<std::int64_t> to(static_cast<std::size_t>(size)), from(static_cast<std::size_t>(size), world_.rank() % 3);
    std::int64_t sent = 0;
    for (int rank = 0; rank < size; ++rank) sent += to[rank] = rank % 3;
    const std::vector<float> out_rows(static_cast<std::size_t>(sent), static_cast<float>(world_.rank()));
    std::vector<float> in_rows(static_cast<std::size_t>(size) * (world_.rank() % 3), -1);
    group->all_to_all_v({out_rows.data(), Dtype::float32, {sent, 1}}, to, {in_rows.data(), Dtype::float32, {std::ssize(in_rows), 1}}, from);
    for (std::int64_t r = 0; r < std::ssize(in_rows); ++r) {
      const std::int64_t sender = r / (world_.rank() % 3);
      if (in_rows[r] != static_cast<float>(sender)) findings.add("all_to_all_v");
    }
    return findings.outcome();
  }

  const World& world_;
  const VerifySettings settings_;
  Progress& progress_;
  std::vector<VerifyLine> lines_;
};

// The last rank ends without a word; the others wait for its rows.
[[noreturn]] void lose_last_rank(const World& world, const VerifySettings& settings) {
  Exchange exchange(world, {.max_tokens_per_rank = 1, .max_row_bytes = 16, .timeout_ms = settings.timeout_ms});
  exchange.add(Placement::uniform(world.size(), world.size()));
  if (world.rank() == world.size() - 1) ::raise(SIGKILL);
  const std::vector<float> row(4, 1.0F);
  const std::int64_t id = 0;
  exchange.dispatch({.rows = {row.data(), Dtype::float32, {1, 4}}, .topk_ids = {&id, Dtype::int64, {1, 1}}});
  throw Error("dispatch succeeded without the lost rank");
}

}  // namespace

json to_json(const VerifySettings& settings) { return settings; }
VerifySettings verify_settings_from_json(const json& settings) { return settings.get<VerifySettings>(); }
json to_json(const VerifyLine& line) { return line; }
VerifyLine verify_line_from_json(const json& line) { return line.get<VerifyLine>(); }

json verify_role(const World& world, const json& settings, Progress& progress) {
  const VerifySettings wanted = verify_settings_from_json(settings);
  if (wanted.lose_rank) lose_last_rank(world, wanted);
  return VerifyRank(world, wanted, progress).run();
}

}  // namespace tokenyard::cli
