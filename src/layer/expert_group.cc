// The ranks that hold all experts together, and the worlds, collectives and exchange of them that every layer uses.

#include <algorithm>
#include <exception>
#include <utility>

#include "core/usage.h"
#include "layer/moe_engine.h"

namespace tokenyard {
namespace {

void check_sizes(const ParallelConfig& config, const ExpertGroupOptions& options, int ranks) {
  check_parallel(config);
  if (ranks != config.device_count) {
    usage_error("the world has {} ranks and the configuration {} devices; use solve_parallel() for this world", ranks, config.device_count);
  }
  if (options.num_experts < 1 || options.top_k < 1 || options.top_k > options.num_experts || options.hidden_size < 1) {
    usage_error("num_experts = {}, top_k = {}, hidden_size = {}; expected at least 1 each, and top_k experts", options.num_experts,
                options.top_k, options.hidden_size);
  }
  const int group = config.ep * config.mlp_tp;
  if (options.dense_tp < 1 || group % options.dense_tp != 0) {
    usage_error("dense_tp = {} with ep x mlp_tp = {} x {} ranks; use a divisor of {}", options.dense_tp, config.ep, config.mlp_tp, group);
  }
  if (options.same_tokens && config.ep > 1) {
    usage_error("same_tokens with ep = {}; it is for ep = 1: with expert parallelism every rank has its own tokens (reduce_scatter_norm)",
                config.ep);
  }
}

World split(const World& world, const SplitArguments& at) { return *world.split(at.color, at.key); }

// On GPUs rows go to float8 experts as float8.
std::int64_t max_scale_bytes(const ExpertGroupOptions& options) {
  if (options.device != Device::cuda) return 0;
  return scale_columns(options.hidden_size, ScaleFormat::float32) * static_cast<std::int64_t>(sizeof(float));
}

ExchangeOptions exchange_options(const ExpertGroupOptions& options, int max_fanout) {
  return {.max_tokens_per_rank = options.max_tokens_per_rank,
          .max_row_bytes = options.hidden_size * size_of(options.dtype),
          .max_scale_bytes = max_scale_bytes(options),
          .top_k = options.top_k,
          .max_local_experts = options.max_local_experts,
          .max_fanout = max_fanout,
          .receive_rows = options.receive_rows,
          .max_expert_rows = options.max_expert_rows,
          .depth = options.depth,
          .transport = options.transport,
          .device = options.device,
          .device_index = options.device_index,
          .sm_budget = options.sm_budget,
          .num_threads = options.num_threads,
          .trace = options.trace,
          .timeout_ms = options.timeout_ms};
}

// With an exchange, on GPUs. Gathered rows are computed without anybody counting them before: they must fit.
void set_max_expert_rows(const ParallelConfig& config, bool is_gathered, ExpertGroupOptions& options) {
  const std::int64_t ranks = is_gathered ? config.ep : std::int64_t{config.ep} * config.mlp_tp;
  const std::int64_t bound = ranks * options.max_tokens_per_rank;
  const std::int64_t rows = options.receive_rows != 0 ? std::min(options.receive_rows, bound) : bound;
  const std::int64_t all = is_gathered ? config.mlp_tp * rows * options.top_k : rows * std::min(options.top_k, options.max_local_experts);
  if (is_gathered && options.max_expert_rows != 0 && options.max_expert_rows < all) {
    usage_error(
        "max_expert_rows = {} with gathered experts on GPUs; expected 0 or at least {} (mlp_tp x receive_rows x top_k): lower "
        "receive_rows instead",
        options.max_expert_rows, all);
  }
  if (options.max_expert_rows == 0) options.max_expert_rows = all;
}

// Counts stay on the device: over peer memory alone.
DeviceCollectiveOptions device_options(const ExpertGroupOptions& options) {
  return {.device_index = options.device_index,
          .transport = Transport::cuda_peer,
          .sm_budget = options.sm_budget,
          .timeout_ms = options.timeout_ms};
}

}  // namespace

std::string_view name(ExpertTp expert_tp) { return expert_tp == ExpertTp::virtual_experts ? "virtual" : "gathered"; }

ExpertTp parse_expert_tp(std::string_view text) {
  if (text == "virtual") return ExpertTp::virtual_experts;
  if (text == "gathered") return ExpertTp::gathered;
  usage_error("expert_tp \"{}\"; use virtual or gathered", text);
}

ExpertGroup::ExpertGroup(const World& world, const ParallelConfig& config, const ExpertGroupOptions& options)
    : options_(options), config_(config) {
  check_sizes(config, options, world.size());
  if (options_.timeout_ms == 0) options_.timeout_ms = world.timeout_ms();
  if (options_.max_local_experts == 0) options_.max_local_experts = (options.num_experts + config.ep - 1) / config.ep;
  const bool is_on_gpu = options.device == Device::cuda;
  world_ = split(world, config.split_arguments(SubWorld::ep_tp, world.rank()));
  const CollectiveOptions collective = {.transport = options.transport, .timeout_ms = options_.timeout_ms};
  const bool is_gathered = config.ep == 1 || options.expert_tp == ExpertTp::gathered;
  if (config.mlp_tp > 1 && is_gathered) {
    const World ranks = split(world, config.split_arguments(SubWorld::tp, world.rank()));
    if (is_on_gpu) {
      tp_on_gpus_ = DeviceCollectives::create(ranks, device_options(options_));
    } else {
      tp_ = Collectives::create(ranks, collective);
    }
  }
  if (options.dense_tp > 1) {
    const int rank = world_->rank();
    const World ranks = split(*world_, {.color = rank / options.dense_tp, .key = rank % options.dense_tp});
    if (is_on_gpu) {
      dense_on_gpus_ = DeviceCollectives::create(ranks, device_options(options_));
    } else {
      dense_ = Collectives::create(ranks, collective);
    }
  }
  if (config.ep == 1) {
    make_workspace();
    return;
  }
  if (is_on_gpu) set_max_expert_rows(config, tp_on_gpus_ != nullptr, options_);
  if (is_gathered) {
    exchange_ = std::make_unique<Exchange>(split(world, config.split_arguments(SubWorld::ep, world.rank())), exchange_options(options_, 1));
  } else {
    exchange_ = std::make_unique<Exchange>(*world_, exchange_options(options_, config.mlp_tp));
  }
  make_workspace();
}

void ExpertGroup::make_workspace() {
  if (options_.device != Device::cuda) return;
  const int shards = tp_on_gpus_ ? config_.mlp_tp : 1;
  workspace_ = layer_internal::make_device_workspace(options_, exchange_.get(), shards);
  options_.device_index = layer_internal::device_of(*workspace_);
  world_->barrier();  // nobody waits in a kernel while another rank still allocates
}

ExpertGroup::~ExpertGroup() = default;

Placement ExpertGroup::placement(int num_experts) const { return Placement::tensor_parallel(num_experts, config_.ep, config_.mlp_tp); }

int ExpertGroup::add(const Placement& placement) {
  if (!exchange_) usage_error("a placement without an exchange; with ep = 1 every rank holds every expert: give none");
  const auto found = std::find(added_.begin(), added_.end(), placement.hash());
  if (found != added_.end()) return static_cast<int>(found - added_.begin());
  const int number = exchange_->add(placement);
  added_.push_back(placement.hash());
  return number;
}

// A refused step is refused in all that it calls, and told once.
void ExpertGroup::check() {
  std::exception_ptr first;
  const auto look = [&](auto* at) {
    try {
      if (at != nullptr) at->check();
    } catch (const TransportError&) {
      if (!first) first = std::current_exception();
    }
  };
  look(exchange_.get());
  look(tp_on_gpus_.get());
  look(dense_on_gpus_.get());
  if (first) std::rethrow_exception(first);
}

void ExpertGroup::note(PhaseSpan span) {
  if (options_.trace) spans_.push_back(std::move(span));
}

std::vector<PhaseSpan> ExpertGroup::take_spans() {
  return workspace_ ? layer_internal::take_spans(*workspace_) : std::exchange(spans_, {});
}

}  // namespace tokenyard
