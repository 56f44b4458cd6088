// One rank of bench layer: checks a sample of rows against the host, then measures whole steps, and in a group of its own phases, by
// events on the stream, from behind a barrier of all GPUs.

#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "bench_gpu.h"
#include "bench_layer.h"
#include "bench_layer_model.h"
#include "bench_samples.h"
#include "cublas.h"
#include "ranks.h"
#include "tokenyard/collective.h"

namespace tokenyard::cli {
namespace {

using nlohmann::json;

constexpr Dtype kDtype = Dtype::bfloat16;
constexpr std::int64_t kRowsChecked = 4;

class LayerRank {
 public:
  LayerRank(const World& world, const LayerSettings& settings, Progress& progress)
      : world_(world),
        settings_(settings),
        preset_(model_preset(settings.preset)),
        progress_(progress),
        device_(device_of(world)),
        stream_(value_or_throw(make_cuda_stream())),
        gate_(stream_.get()),
        begin_(timed_event()),
        end_(timed_event()),
        model_(preset_, settings.tokens),
        weights_(model_.on_rank(device_, Placement::uniform(preset_.num_experts, world.size()), world.rank())),
        rows_(model_.rows(device_, world.rank())),
        out_(value_or_throw(make_device_buffer(device_, rows_.bytes()))),
        logits_(value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(settings.tokens * preset_.num_experts) * 4))),
        barrier_(DeviceCollectives::create(world, {.device_index = device_,
                                                   .transport = Transport::cuda_peer,
                                                   .staging_bytes = 4096,
                                                   .sm_budget = 1,
                                                   .timeout_ms = settings.timeout_ms})) {
    limits_ = measure_limits();
  }

  json run() {
    if (world_.rank() == 0) progress_.total = static_cast<std::uint32_t>(2 * (settings_.warmup + settings_.iterations));
    for (const bool traced : {false, true}) {
      const auto group = make_group(traced);
      MoeLayer layer(group, weights_.weights, {.gate = preset_.gate});
      if (!traced) check(*group, layer);
      for (int i = 0; i < settings_.warmup + settings_.iterations; ++i) {
        time(*group, layer, traced, i >= settings_.warmup);
        if (world_.rank() == 0) progress_.done.fetch_add(1, std::memory_order_relaxed);
      }
      world_.barrier();
    }
    return report();
  }

 private:
  MoeStepOptions options() const { return {.mode = parse_mode(settings_.mode), .stream = stream_.get()}; }
  TensorView view(const DeviceBuffer& rows) const { return {rows.data(), kDtype, {settings_.tokens, preset_.hidden_size}}; }

  std::shared_ptr<ExpertGroup> make_group(bool traced) const {
    const ParallelConfig config = solve_parallel({.device_count = world_.size(), .ep = world_.size(), .outer_dp = 1, .mlp_tp = 1});
    return std::make_shared<ExpertGroup>(world_, config,
                                         ExpertGroupOptions{.num_experts = preset_.num_experts,
                                                            .top_k = preset_.top_k,
                                                            .hidden_size = preset_.hidden_size,
                                                            .dtype = kDtype,
                                                            .max_tokens_per_rank = settings_.tokens,
                                                            .trace = traced,
                                                            .timeout_ms = settings_.timeout_ms,
                                                            .device = Device::cuda,
                                                            .device_index = device_,
                                                            .sm_budget = settings_.sm_budget});
  }

  template <class Number>
  std::vector<Number> fetched(const DeviceBuffer& from) const {
    cuda_check(cudaStreamSynchronize(stream_.get()), "waiting for a step");
    std::vector<Number> values(from.bytes() / sizeof(Number));
    cuda_check(cudaMemcpy(values.data(), from.data(), from.bytes(), cudaMemcpyDeviceToHost), "copying results to the host");
    return values;
  }

  // Some rows against the host's, with the routing that the CPU makes of the step's logits; and what the step had to do.
  void check(ExpertGroup& group, MoeLayer& layer) {
    MoeStepOptions first = options();
    first.logits = {logits_.data(), Dtype::float32, {settings_.tokens, preset_.num_experts}};
    layer.forward(view(rows_), view(out_), first);
    const auto logits = fetched<float>(logits_);
    group.exchange()->check();
    const auto sums = fetched<std::uint16_t>(out_);
    const std::vector<float>& bias = model_.selection_bias();
    const Routing routing =
        route({.logits = {logits.data(), Dtype::float32, {settings_.tokens, preset_.num_experts}},
               .bias = bias.empty() ? ConstTensorView() : ConstTensorView(bias.data(), Dtype::float32, {std::ssize(bias)})},
              preset_.gate);
    std::string fault;
    for (std::int64_t i = 0; i < std::min(kRowsChecked, settings_.tokens); ++i) {
      const std::int64_t token = i * (settings_.tokens - 1) / std::max<std::int64_t>(kRowsChecked - 1, 1);
      const std::int64_t at = token * preset_.top_k;
      expect_near("logits", token, {logits.begin() + token * preset_.num_experts, logits.begin() + (token + 1) * preset_.num_experts},
                  model_.logits(world_.rank(), token), 1e-4, fault);
      std::vector<float> row;
      for (std::int64_t h = 0; h < preset_.hidden_size; ++h) row.push_back(bfloat16_to_float(sums[token * preset_.hidden_size + h]));
      const auto top_k = static_cast<std::size_t>(preset_.top_k);
      expect_near("row", token, row,
                  model_.expected(world_.rank(), token, std::span(routing.topk_ids).subspan(at, top_k),
                                  std::span(routing.topk_weights).subspan(at, top_k)),
                  2e-2, fault);
    }
    for (const json& of_rank : gather(world_, fault)) {
      if (!of_rank.get<std::string>().empty()) throw Error(of_rank.get<std::string>());
    }
    load_ = routing.load;
    bytes_before_ = bytes_to_others(group);
    layer.forward(view(rows_), view(out_), options());
    cuda_check(cudaStreamSynchronize(stream_.get()), "waiting for a step");
    step_bytes_ = bytes_to_others(group) - bytes_before_;
  }

  void expect_near(const char* what, std::int64_t token, const std::vector<float>& found, const std::vector<float>& expected, double bound,
                   std::string& fault) const {
    double error = 0, size = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      error += std::pow(static_cast<double>(found[i]) - expected[i], 2);
      size += std::pow(expected[i], 2);
    }
    if (!(std::sqrt(error) <= bound * std::sqrt(size)))
      fault = fmt::format("rank {}: {} of token {} is off by {:.2e} of its norm", world_.rank(), what, token, std::sqrt(error / size));
  }

  std::int64_t bytes_to_others(const ExpertGroup& group) const {
    std::int64_t bytes = 0;
    const std::vector<std::int64_t> all = const_cast<ExpertGroup&>(group).exchange()->link_bytes();
    for (std::size_t rank = 0; rank < all.size(); ++rank) bytes += static_cast<int>(rank) == world_.rank() ? 0 : all[rank];
    return bytes;
  }

  template <class Body>
  double timed(Body&& body) {
    cuda_check(cudaStreamSynchronize(stream_.get()), "between measurements");
    world_.barrier();
    gate_.close();
    const std::vector<std::int64_t> none(static_cast<std::size_t>(world_.size()));
    const AllToAllRows nothing{{nullptr, Dtype::uint8, {0, 16}}, none, {nullptr, Dtype::uint8, {0, 16}}, none};
    barrier_->all_to_all_v(std::span(&nothing, 1), stream_.get());
    cuda_check(cudaEventRecord(begin_.get(), stream_.get()), "cudaEventRecord");
    body();
    cuda_check(cudaEventRecord(end_.get(), stream_.get()), "cudaEventRecord");
    gate_.open();
    barrier_->wait(stream_.get());
    float milliseconds = 0;
    cuda_check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "cudaEventElapsedTime");
    return 1e3 * milliseconds;
  }

  void time(ExpertGroup& group, MoeLayer& layer, bool traced, bool counts) {
    const double us = timed([&] { layer.forward(view(rows_), view(out_), options()); });
    group.exchange()->check();
    const std::vector<PhaseSpan> spans = group.take_spans();
    if (!counts) return;
    const std::string series = traced ? "traced_layer" : "layer";
    samples_[series].push_back(us);
    add_phases(series, spans, samples_);
  }

  // All ranks copy to the next one at once; a large product, and a large copy within the GPU.
  json measure_limits() {
    constexpr std::size_t kCopied = std::size_t{256} << 20;
    constexpr int kSize = 8192, kTimes = 5;
    const int devices = std::max(1, device_count());
    const int next = (device_ + 1) % devices;
    const DrawnTensor drawn(9, 1.0, 1);
    const DeviceBuffer source = drawn.on_device(device_, 0, static_cast<std::int64_t>(kCopied));  // two bytes each
    DeviceBuffer target;
    {
      const CudaDeviceScope scope(next);
      target = value_or_throw(make_device_buffer(next, kCopied));
    }
    json limits;
    const auto best = [&](const std::function<void()>& call) {
      double us = 0;
      for (int i = 0; i < kTimes; ++i) us = i == 0 ? timed(call) : std::min(us, timed(call));
      return us;
    };
    if (next != device_) {
      if (cudaDeviceEnablePeerAccess(next, 0) != cudaSuccess) cudaGetLastError();  // it is on already, or the copy goes another way
      const double us = best([&] {
        cuda_check(cudaMemcpyPeerAsync(target.data(), next, source.data(), device_, kCopied, stream_.get()), "cudaMemcpyPeerAsync");
      });
      limits["link_bytes_per_us"] = static_cast<double>(kCopied) / us;
    }
    const double copy_us = best([&] {
      cuda_check(cudaMemcpyAsync(source.data() + kCopied, source.data(), kCopied, cudaMemcpyDeviceToDevice, stream_.get()),
                 "cudaMemcpyAsync");
    });
    limits["memory_bytes_per_us"] = 2.0 * static_cast<double>(kCopied) / copy_us;
    Cublas cublas(kDtype);
    limits["no_matrix_limit"] = cublas.missing();
    if (!cublas.missing().empty()) return limits;
    const DeviceBuffer a = drawn.on_device(device_, 0, std::int64_t{kSize} * kSize),
                       b = drawn.on_device(device_, 7, std::int64_t{kSize} * kSize);
    const DeviceBuffer c = value_or_throw(make_device_buffer(device_, std::size_t{2} * kSize * kSize));
    const std::vector<MatrixProduct> product = {{kSize, kSize, kSize, a.data(), b.data(), c.data(), false, true, false}};
    cublas.loop(product, stream_.get());  // loads what it needs
    limits["flops_per_us"] = 2.0 * std::pow(kSize, 3) / best([&] { cublas.loop(product, stream_.get()); });
    return limits;
  }

  static int device_count() {
    int count = 0;
    cuda_check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return count;
  }

  // Of the busiest rank.
  json work() {
    std::vector<std::int64_t> load(static_cast<std::size_t>(preset_.num_experts));
    std::int64_t most_bytes = 0;
    for (const json& of_rank : gather(world_, {{"load", load_}, {"bytes", step_bytes_}})) {
      const auto theirs = of_rank["load"].get<std::vector<std::int64_t>>();
      for (std::size_t e = 0; e < load.size(); ++e) load[e] += theirs[e];
      most_bytes = std::max(most_bytes, of_rank["bytes"].get<std::int64_t>());
    }
    std::int64_t most_rows = 0, most_experts = 0;
    const Placement placement = Placement::uniform(preset_.num_experts, world_.size());
    for (int rank = 0; rank < world_.size(); ++rank) {
      std::int64_t rows = 0, experts = 0;
      for (const int expert : placement.local_experts(rank)) {
        rows += load[static_cast<std::size_t>(expert)];
        experts += load[static_cast<std::size_t>(expert)] > 0 ? 1 : 0;
      }
      most_rows = std::max(most_rows, rows);
      most_experts = std::max(most_experts, experts);
    }
    return {{"expert_rows", most_rows},
            {"experts_with_rows", most_experts},
            {"flops", model_.flops(most_rows)},
            {"weight_bytes", model_.weight_bytes(most_experts)},
            {"bytes_to_others", most_bytes}};
  }

  json report() {
    json result = summarise(gather(world_, {{"samples", samples_}, {"sent", SentRows()}}));
    cudaDeviceProp properties{};
    cuda_check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
    result["gpu"] = {{"name", properties.name}, {"runtime_cuda", CUDART_VERSION}};
    result["limits"] = limits_;
    result["work"] = work();
    return result;
  }

  const World& world_;
  const LayerSettings settings_;
  const ModelPreset preset_;
  Progress& progress_;
  const int device_;
  CudaStream stream_;
  StreamGate gate_;
  TimedEvent begin_, end_;
  LayerModel model_;
  LayerModel::OnRank weights_;
  DeviceBuffer rows_, out_, logits_;
  std::unique_ptr<DeviceCollectives> barrier_;
  json limits_;
  std::vector<std::int64_t> load_;
  std::int64_t bytes_before_ = 0, step_bytes_ = 0;
  Samples samples_;
};

}  // namespace

json bench_layer_role(const World& world, const json& settings, Progress& progress) {
  return LayerRank(world, layer_settings_from_json(settings), progress).run();
}

}  // namespace tokenyard::cli
